"""Writes a report's contents as one self-contained page, for report.html.

Styles, bars and thumbnails are inside the file, and there is no script. All text is escaped, since
a prompt may contain anything. Each bar is in a table next to its number, so screen readers can
read the page.
"""

import base64
import hashlib
import string
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from jaxdiff.evaluation.report import drawings, examples, wording
from jaxdiff.evaluation.report.examples import Thumbnails
from jaxdiff.evaluation.report.wording import MOST_ROWS

ASSETS = Path(__file__).parents[2] / "assets"


def page(contents: dict, pictures: examples.Pictures) -> str:
    """Returns the page's HTML.

    Args:
      contents: from `report.contents_of`.
      pictures: as in `report.write`.
    """
    thumbnails = examples.thumbnails(contents, pictures)
    style = (ASSETS / "report" / "report.css").read_text("utf-8")
    icon = (ASSETS / "gallery" / "icon.svg").read_bytes()
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    body = [
        _head(contents),
        *_headline_bars(contents),
        *_comparisons(contents, thumbnails),
        *_worst(contents, thumbnails),
        *_failures(contents),
        *_all_measures(contents),
        *_missing(contents),
        *_tables(contents),
        *_settings(contents),
        f"<footer><p>{escape(' '.join(wording.method(contents)))}</p></footer>",
    ]
    template = string.Template((ASSETS / "report" / "report.html").read_text("utf-8"))
    return template.substitute(
        style_hash=f"sha256-{style_hash}",
        title=escape(f"{contents['benchmark']} · jaxdiff"),
        icon=f"data:image/svg+xml;base64,{base64.b64encode(icon).decode()}",
        style=style,
        body="\n".join(body),
    )


def _head(contents: dict) -> str:
    """Returns the title and each run's headline number."""
    cards = [_card(contents, number) for number in range(len(contents["runs"]))]
    return (
        f'<header><h1 dir="auto">{escape(contents["benchmark"])}</h1>'
        f'<ul class="results">{"".join(cards)}</ul></header>'
    )


def _card(contents: dict, number: int) -> str:
    run, name = contents["runs"][number], contents["headline"]
    counts = f"{wording.plural(run['prompts'], 'prompt')}, {wording.plural(run['images'], 'image')}"
    said = f'<p class="name" dir="auto">{escape(run["name"])}</p>'
    if name in run["measures"]:
        measure, mean = contents["measures"][name], run["measures"][name][0]
        value = escape(wording.number(mean["value"], measure["is_share"]))
        bounds = wording.interval(mean, measure["is_share"])
        said += f'<p class="number">{value}</p><p>{escape(measure["title"])}'
        said += f"<br><small>95% interval {bounds}</small></p>" if bounds else "</p>"
    said += f'<p class="quiet">{counts}</p>'
    if run["failed"]:
        said += f'<p class="wrong">{wording.plural(run["failed"], "image")} not generated</p>'
    return f'<li class="{drawings.color(number)}">{said}</li>'


def _headline_bars(contents: dict) -> Iterator[str]:
    name = contents["headline"]
    if name and len(contents["categories"]) > 1:
        title = contents["measures"][name]["title"]
        yield _section(f"{wording.capital(title)} by category", _bars(contents, name))


def _bars(contents: dict, name: str) -> str:
    """Returns a table of a measure's means by category and run, with a bar in each row."""
    measure = contents["measures"][name]
    shown = [(n, run) for n, run in enumerate(contents["runs"]) if name in run["measures"]]
    means = [run["measures"][name] for _, run in shown]
    full = 1.0 if measure["is_share"] else _largest(means, ("value", "high"))
    bodies = []
    for of_category in list(zip(*means, strict=True))[:MOST_ROWS]:
        category = _category(of_category[0]["category"])
        overall = " overall" if of_category[0]["category"] is None else ""
        counts = f"{wording.plural(of_category[0]['prompts'], 'prompt')}, "
        counts += wording.plural(of_category[0]["images"], "image")
        head = f"{category}<small>{counts}</small>"
        rows = [
            f"<td>{drawings.bar(mean, full, number)}</td>"
            f'<td class="value">{_value(mean, measure["is_share"])}</td></tr>'
            for (number, _), mean in zip(shown, of_category, strict=True)
        ]
        if len(shown) == 1:
            bodies.append(f'<tr class="{overall.strip()}"><th scope="row">{head}</th>{rows[0]}')
            continue
        names = [f'<tr><th scope="row" dir="auto">{escape(run["name"])}</th>' for _, run in shown]
        rows = "".join(map("".join, zip(names, rows, strict=True)))
        bodies.append(
            f'<tbody class="group{overall}"><tr><th colspan="3" scope="rowgroup">{head}</th></tr>'
            f"{rows}</tbody>"
        )
    bodies = "".join(bodies)
    if len(shown) == 1:
        bodies = f"<tbody>{bodies}</tbody>"
    return _bar_table(measure["title"], bodies) + _rest(len(means[0]))


def _comparisons(contents: dict, thumbnails: Thumbnails) -> Iterator[str]:
    for number, compared in enumerate(contents["comparisons"], 1):
        pairs = wording.plural(compared["pairs"], "pair")
        said = wording.verdict(contents, compared)
        said = f"<b>{escape(said)}.</b> " if said else ""
        parts = [f"<p>{said}Over {pairs} of images with the same prompt and seed.</p>"]
        if contents["headline"] in compared["measures"]:
            parts.append(_changes(contents, compared, number))
        others = [
            [measure["title"], *_change_cells(changes[0], measure["is_share"])]
            for name, measure in contents["measures"].items()
            if (changes := compared["measures"].get(name)) and name != contents["headline"]
        ]
        if others:
            heads = ["measure, overall", "difference", "95% interval", "p"]
            title = "Other measures" if contents["headline"] else "Measures"
            parts.append(f"<h3>{title}</h3>{_table(heads, others, right=range(1, 4))}")
        if shown := examples.differing(contents, compared, number, thumbnails):
            parts.append(f"<h3>Pairs that differ most</h3>{shown}")
        yield _section(f"{compared['name']} compared with {compared['to']}", "".join(parts))


def _changes(contents: dict, compared: dict, number: int) -> str:
    """Returns the differences of the headline measure, as bars from the middle."""
    measure = contents["measures"][contents["headline"]]
    changes = compared["measures"][contents["headline"]]
    if len(changes) == 2:  # the only category equals the overall row
        changes = changes[:1]
    full = _largest([changes], ("value", "low", "high"))
    rows = []
    for change in changes[:MOST_ROWS]:
        difference, bounds, p = _change_cells(change, measure["is_share"])
        overall = ' class="overall"' if change["category"] is None else ""
        rows.append(
            f'<tr{overall}><th scope="row">{_category(change["category"])}'
            f"<small>{wording.plural(change['pairs'], 'pair')}</small></th>"
            f"<td>{drawings.change_bar(change, full, number)}</td>"
            f'<td class="value change"><b>{difference}</b> <small>{bounds}</small>'
            f' <small class="p">p {"" if p[0] == "<" else "= "}{escape(p)}</small></td></tr>'
        )
    bodies = f"<tbody>{''.join(rows)}</tbody>"
    return _bar_table(f"difference in {measure['title']}", bodies) + _rest(len(changes))


def _bar_table(title: str, bodies: str) -> str:
    caption = escape(f"{wording.capital(title)}, with its 95% interval")
    table = f'<table class="bars"><caption>{caption}</caption>{bodies}</table>'
    return f'<div class="scroll">{table}</div>'


def _worst(contents: dict, thumbnails: Thumbnails) -> Iterator[str]:
    if shown := examples.worst(contents, thumbnails):
        yield _section("Worst prompts", shown)


def _failures(contents: dict) -> Iterator[str]:
    heads, rows = wording.failures(contents)
    if rows:
        count = heads.index("wrong images")
        table = _table(heads, rows, right=(count,), long=(count + 1,))
        yield _section("Why images are wrong", table)


def _all_measures(contents: dict) -> Iterator[str]:
    """Yields a table of all measures of all runs, with the categories in collapsed sections."""
    rows, details = [], []
    for name, measure in contents["measures"].items():
        cells, is_share = [], measure["is_share"]
        for run in contents["runs"]:
            if name in run["measures"]:
                mean = run["measures"][name][0]
                bounds = wording.interval(mean, is_share)
                value = wording.number(mean["value"], is_share)
                cells.append(f"{value} ({bounds})" if bounds else value)
            else:
                cells.append(wording.number(run["whole"].get(name), is_share))
        better = f"{measure['better']} is better" if measure["better"] else ""
        rows.append([measure["title"], *cells, better])
        by_category = any(name in run["measures"] for run in contents["runs"])
        if by_category and name != contents["headline"] and len(contents["categories"]) > 1:
            title = f"{wording.capital(measure['title'])} by category"
            details.append(
                f"<details><summary>{escape(title)}</summary>{_bars(contents, name)}</details>"
            )
    if rows:
        heads = ["", *(run["name"] for run in contents["runs"]), ""]
        table = _table(heads, rows, right=range(1, len(heads) - 1))
        yield _section("All measures", table + "".join(details))


def _missing(contents: dict) -> Iterator[str]:
    if rows := wording.missing(contents):
        heads = ["measure", "runs", "why, and how to fix it"]
        yield _section("Missing measures", _table(heads, rows, long=(2,)))


def _tables(contents: dict) -> Iterator[str]:
    for table in contents["tables"]:
        rows = wording.cells(table["rows"])
        right = [
            column
            for column in range(1, len(table["columns"]))
            if all(not isinstance(row[column], str) for row in table["rows"])
        ]
        note = f"<p>{escape(table['note'])}</p>" if table["note"] else ""
        shown = _table(table["columns"], rows, right=right, sources=table["sources"])
        yield _section(table["title"], note + shown)


def _settings(contents: dict) -> Iterator[str]:
    shared, differing = wording.settings(contents)
    terms = "".join(_term(name, value) for name, value in shared.items())
    shown = f'<dl class="settings">{terms}</dl>' if shared else ""
    if differing:
        rows = [
            [run["name"], *(str(run["told"].get(name, "")) for name in differing)]
            for run in contents["runs"]
        ]
        shown += _table(["run", *differing], rows)
    if shown:
        yield _section("How it was made", shown)


def _term(name: str, value: str) -> str:
    return f'<dt>{escape(name)}</dt><dd dir="auto">{escape(str(value))}</dd>'


def _table(
    heads: list[str],
    rows: list[list],
    right: Iterable[int] = (),
    long: Iterable[int] = (),
    sources: list[tuple[str, str]] = (),
) -> str:
    """Returns a table; columns in `right` are right-aligned numbers, those in `long` are wide."""
    classes = {n: ' class="right"' for n in right} | {n: ' class="long"' for n in long}
    shown = [
        f'<th scope="row"{classes.get(0, "")} dir="auto">{escape(str(row[0]))}</th>'
        + "".join(
            f"<td{classes.get(n, '')}>{escape(str(c))}</td>" for n, c in enumerate(row[1:], 1)
        )
        for row in rows[:MOST_ROWS]
    ]
    head = "".join(
        f'<th scope="col"{classes.get(n, "")}>{escape(text)}</th>' for n, text in enumerate(heads)
    )
    if sources:
        head += '<th scope="col">source</th>'
        links = [f"<td>{_link(*source)}</td>" for source in sources]
        shown = [row + link for row, link in zip(shown, links, strict=False)]
    body = "".join(f"<tr>{row}</tr>" for row in shown)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f"</div>{_rest(len(rows))}"
    )


def _link(name: str, address: str) -> str:
    if not address.startswith("https://"):
        return escape(name)
    return f'<a href="{escape(address)}" rel="noopener noreferrer">{escape(name)}</a>'


def _section(title: str, content: str) -> str:
    return f'<section><h2 dir="auto">{escape(title)}</h2>{content}</section>'


def _rest(rows: int) -> str:
    left_out = rows - MOST_ROWS
    return f"<p>report.json has {wording.plural(left_out, 'more row')}.</p>" if left_out > 0 else ""


def _category(name: str | None) -> str:
    return escape(wording.category(name)).replace("_", "_<wbr>")


def _value(mean: dict, is_share: bool) -> str:
    bounds = wording.interval(mean, is_share)
    return f"<b>{wording.number(mean['value'], is_share)}</b> <small>{bounds}</small>"


def _change_cells(change: dict, is_share: bool) -> list[str]:
    return [
        wording.change(change, is_share),
        wording.change_interval(change, is_share),
        wording.probability(change["p"]),
    ]


def _largest(tables: list[list[dict]], names: tuple[str, ...]) -> float:
    """Returns the largest absolute value under these names."""
    values = [abs(row[name] or 0) for rows in tables for row in rows for name in names]
    return max(values, default=0.0)
