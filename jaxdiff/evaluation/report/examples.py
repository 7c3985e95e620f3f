"""The images that a report's page shows: of the worst prompts, and of pairs that differ."""

from collections.abc import Callable, Collection, Iterable, Iterator
from html import escape

from jaxdiff.evaluation.report import drawings, wording

MOST_IMAGES = 4  # of a worst prompt
Pictures = Callable[[str, Collection[str]], Iterable[tuple[str, bytes | None]]]
Thumbnails = dict[tuple[str, str], str]  # the HTML by the run's name and the image's key


def thumbnails(contents: dict, pictures: Pictures) -> Thumbnails:
    """Returns a thumbnail of every image that the page shows.

    Args:
      contents: from `report.contents_of`.
      pictures: as in `report.write`; no more than one file is kept in memory.
    """
    shown: dict[str, dict[str, dict]] = {}
    for name, image in _shown(contents):
        shown.setdefault(name, {})[image["key"]] = image
    return {
        (name, key): drawings.thumbnail(file, _description(images[key]))
        for name, images in shown.items()
        for key, file in pictures(name, images)
    }


def _shown(contents: dict) -> Iterator[tuple[str, dict]]:
    """Yields the run's name and the image, of all images that the page shows."""
    for run in contents["runs"]:
        for prompt in run["worst"]:
            yield from ((run["name"], image) for image in prompt["images"][:MOST_IMAGES])
    for compared in contents["comparisons"]:
        names = (compared["to"], compared["name"])
        for groups in compared["differing"].values():
            for pair in (pair for group in groups for pair in group["largest"]):
                yield from zip(names, pair["images"], strict=True)


def _description(image: dict) -> str:
    return f"Image {image['key']}" + (f", seed {image['seed']}" if image["seed"] >= 0 else "")


def worst(contents: dict, thumbnails: Thumbnails) -> str:
    """Returns each run's worst prompts with their images; "" if there are none."""
    parts = []
    for run in contents["runs"]:
        if run["worst"]:
            items = "".join(_prompt(contents, run, prompt, thumbnails) for prompt in run["worst"])
            name = f'<h3 dir="auto">{escape(run["name"])}</h3>'
            parts.append(name if len(contents["runs"]) > 1 else "")
            parts.append(f'<ul class="prompts">{items}</ul>')
    return "".join(parts)


def _prompt(contents: dict, run: dict, prompt: dict, thumbnails: Thumbnails) -> str:
    name = contents["headline"]
    measure, shown = contents["measures"][name], prompt["images"][:MOST_IMAGES]
    said = [f"{measure['title']} {wording.number(prompt['value'], measure['is_share'])}"]
    said += [prompt["category"]] if prompt["category"] else []
    if len(prompt["images"]) > len(shown):
        said.append(f"{len(shown)} of {len(prompt['images'])} images")
    figures = [
        f"<figure>{thumbnails[run['name'], image['key']]}"
        f"<figcaption>{escape(wording.judged(contents, name, image))}</figcaption></figure>"
        for image in shown
    ]
    return _item(prompt, said, figures)


def differing(contents: dict, compared: dict, number: int, thumbnails: Thumbnails) -> str:
    """Returns the pairs that differ most, side by side, by measure; "" if no pair differs.

    Args:
      compared: one of the comparisons in `contents`.
      number: the index of its run.
    """
    parts = []
    for name, groups in compared["differing"].items():
        items = ""
        for group in (group for group in groups if group["largest"]):
            pairs = [
                _pair(contents, compared, number, name, pair, thumbnails)
                for pair in group["largest"]
            ]
            said = wording.higher(contents, compared, name, group)
            items += (
                f'<p dir="auto">{escape(said)}</p><ul class="prompts pairs">{"".join(pairs)}</ul>'
            )
        if items:
            title = escape(wording.capital(contents["measures"][name]["title"]))
            first = "" if parts else " open"
            parts.append(f"<details{first}><summary>{title}</summary>{items}</details>")
    return "".join(parts)


def _pair(
    contents: dict, compared: dict, number: int, name: str, pair: dict, thumbnails: Thumbnails
) -> str:
    seed = pair["images"][0]["seed"]
    said = [*filter(None, [pair["category"]]), f"seed {seed}"]
    runs = ((0, compared["to"]), (number, compared["name"]))
    figures = [
        f'<figure class="{drawings.color(n)}">{thumbnails[run, image["key"]]}'
        f'<figcaption><b dir="auto">{escape(run)}</b>'
        f"{escape(wording.judged(contents, name, image))}</figcaption></figure>"
        for (n, run), image in zip(runs, pair["images"], strict=True)
    ]
    return _item(pair, said, figures)


def _item(prompt: dict, said: list[str], figures: list[str]) -> str:
    return (
        f'<li><h4 dir="auto">{escape(prompt["prompt"])}</h4>'
        f'<p class="quiet">{escape(" · ".join(said))}</p>'
        f'<div class="images">{"".join(figures)}</div></li>'
    )
