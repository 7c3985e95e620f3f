"""Writes a report's contents as GitHub Markdown, for report.md."""

import re
from collections.abc import Iterator

from jaxdiff.evaluation.report import wording
from jaxdiff.evaluation.report.wording import MINUS, MOST_ROWS

SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")
ADDRESS = re.compile(r"https://[^\s<>|\\]+")


def document(contents: dict) -> str:
    """Returns the Markdown of a report's contents, from `report.contents_of`."""
    parts = [
        *_beginning(contents),
        *_categories(contents),
        *_comparisons(contents),
        *_all_measures(contents),
        *_failures(contents),
        *_worst(contents),
        *_missing(contents),
        *_tables(contents),
        *_method(contents),
    ]
    return "\n\n".join(parts) + "\n"


def _beginning(contents: dict) -> Iterator[str]:
    yield f"# {_text(contents['benchmark'])}"
    for run in contents["runs"] if contents["headline"] else []:
        measure = contents["measures"][contents["headline"]]
        means = run["measures"].get(contents["headline"])
        if means:
            value = wording.number(means[0]["value"], measure["is_share"])
            bounds = wording.interval(means[0], measure["is_share"])
            name = f"{_text(run['name'])}: " if len(contents["runs"]) > 1 else ""
            yield f"{name}**{value} {measure['title']}**" + (
                f" (95% interval {bounds})" if bounds else ""
            )
    shared, differing = wording.settings(contents)
    if shared:
        yield _lines(["", ""], [[name, value] for name, value in shared.items()])
    yield _lines(
        ["run", "prompts", "images", "not generated", *differing],
        [
            [run["name"], run["prompts"], run["images"], run["failed"]]
            + [run["told"].get(name, "") for name in differing]
            for run in contents["runs"]
        ],
    )


def _categories(contents: dict) -> Iterator[str]:
    """Yields tables of the measures with a better direction, if there are several categories."""
    if len(contents["categories"]) < 2:
        return
    for name, measure in contents["measures"].items():
        runs = [run for run in contents["runs"] if name in run["measures"]]
        if not runs or not measure["better"]:
            continue
        yield f"## {_text(measure['title'])} by category"
        rows = []
        for means in zip(*(run["measures"][name] for run in runs), strict=True):
            counts = [means[0]["prompts"], means[0]["images"]]
            cells = [_with_interval(mean, measure["is_share"]) for mean in means]
            rows.append([wording.category(means[0]["category"]), *counts, *cells])
        yield _lines(["category", "prompts", "images", *(run["name"] for run in runs)], rows)


def _comparisons(contents: dict) -> Iterator[str]:
    for compared in contents["comparisons"]:
        yield f"## {_text(compared['name'])} compared with {_text(compared['to'])}"
        pairs = wording.plural(compared["pairs"], "pair")
        said = wording.verdict(contents, compared)
        said = f"**{_text(said)}.** " if said else ""
        yield f"{said}Over {pairs} of images with the same prompt and seed."
        rows = []
        for name, changes in compared["measures"].items():
            measure = contents["measures"][name]
            for change in changes if name == contents["headline"] else changes[:1]:
                rows.append(
                    [
                        measure["title"],
                        wording.category(change["category"]),
                        change["pairs"],
                        wording.change(change, measure["is_share"]),
                        wording.change_interval(change, measure["is_share"]),
                        wording.probability(change["p"]),
                    ]
                )
        if rows:
            heads = ["measure", "category", "pairs", "difference", "95% interval", "p"]
            yield _lines(heads, rows)
        yield from _differing(contents, compared)


def _differing(contents: dict, compared: dict) -> Iterator[str]:
    """Yields the pairs that differ by the headline measure: by others, images say more."""
    name = contents["headline"]
    for group in compared["differing"].get(name, []):
        rows = []
        for pair in group["largest"]:
            a, b = pair["images"]
            values = [wording.judged(contents, name, image) for image in (a, b)]
            keys = ", ".join(dict.fromkeys((a["key"], b["key"])))
            rows.append([pair["prompt"], a["seed"], *values, keys])
        if rows:
            yield f"### {_text(wording.higher(contents, compared, name, group))}"
            yield _lines(["prompt", "seed", compared["to"], compared["name"], "images"], rows)


def _all_measures(contents: dict) -> Iterator[str]:
    rows = []
    for name, measure in contents["measures"].items():
        cells = []
        for run in contents["runs"]:
            if name in run["measures"]:
                cells.append(_with_interval(run["measures"][name][0], measure["is_share"]))
            else:
                cells.append(wording.number(run["whole"].get(name), measure["is_share"]))
        better = f"{measure['better']} is better" if measure["better"] else ""
        rows.append([measure["title"], *cells, better])
    if rows:
        yield "## All measures"
        yield _lines(["measure", *(run["name"] for run in contents["runs"]), ""], rows)


def _failures(contents: dict) -> Iterator[str]:
    heads, rows = wording.failures(contents)
    if rows:
        yield "## Why images are wrong"
        yield _lines(heads, rows)


def _worst(contents: dict) -> Iterator[str]:
    if not any(run["worst"] for run in contents["runs"]):
        return
    yield "## Worst prompts"
    measure = contents["measures"][contents["headline"]]
    rows = []
    for run in contents["runs"]:
        for prompt in run["worst"]:
            reasons = dict.fromkeys(i["reason"] for i in prompt["images"] if i["reason"])
            value = wording.number(prompt["value"], measure["is_share"])
            keys = ", ".join(image["key"] for image in prompt["images"][:4])
            rows.append([run["name"], prompt["prompt"], value, "; ".join([*reasons][:4]), keys])
    heads = ["run", "prompt", measure["title"], "reasons", "images"]
    yield _lines(*wording.without_run(contents, heads, rows))


def _missing(contents: dict) -> Iterator[str]:
    if rows := wording.missing(contents):
        yield "## Missing measures"
        yield _lines(["measure", "runs", "why, and how to fix it"], rows)


def _tables(contents: dict) -> Iterator[str]:
    for table in contents["tables"]:
        yield f"## {_text(table['title'])}"
        if table["note"]:
            yield _text(table["note"])
        rows = wording.cells(table["rows"])
        yield _lines(table["columns"], rows, table["sources"])


def _method(contents: dict) -> Iterator[str]:
    yield "## How to read this report"
    yield " ".join(wording.method(contents))


def _with_interval(mean: dict, is_share: bool) -> str:
    bounds = wording.interval(mean, is_share)
    return wording.number(mean["value"], is_share) + (f" ({bounds})" if bounds else "")


def _lines(heads: list[str], rows: list[list], sources: list[tuple[str, str]] = ()) -> str:
    """Returns a table; right-aligns columns in which every cell is a number or starts with one."""
    texts = [[_text(str(cell)) for cell in row] for row in rows[:MOST_ROWS]]
    columns = zip(*texts, strict=True) if texts else [[] for _ in heads]
    numeric = [
        all(re.match(rf"([{MINUS}+]?[\d.,]+(%| points)?( \(.*\))?|—|)$", cell) for cell in column)
        for column in columns
    ]
    heads = [_text(head) for head in heads]
    if sources:
        heads.append("source")
        numeric.append(False)
        texts = [[*row, _link(*source)] for row, source in zip(texts, sources, strict=False)]
    lines = [
        _row(heads),
        "|" + "|".join("---:" if right else "---" for right in numeric) + "|",
        *map(_row, texts),
    ]
    left_out = len(rows) - len(texts)
    more = f"\n\nreport.json has {wording.plural(left_out, 'more row')}." if left_out else ""
    return "\n".join(lines) + more


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _link(name: str, address: str) -> str:
    return f"[{_text(name)}](<{address}>)" if ADDRESS.fullmatch(address) else _text(name)


def _text(text: str) -> str:
    """Returns text as literal Markdown: on one line, with special characters escaped."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))
