"""Formats a report's numbers and texts for people."""

from collections import Counter

MINUS = "\u2212"  # as wide as a plus
MOST_ROWS = 200  # of a table in report.md and report.html; report.json has all rows


def number(value: float | None, is_share: bool) -> str:
    """Formats a value: shares as percentages, others with four digits, None as a dash."""
    if value is None:
        return "—"
    if is_share:
        return f"{100 * value:.1f}%"
    return f"{value:#.4g}".rstrip(".").replace("-", MINUS)


def interval(of: dict, is_share: bool) -> str:
    """Formats the bounds "low" to "high", without the percent sign; "" if they are unknown."""
    if of["low"] is None:
        return ""
    low, high = (number(of[bound], is_share).removesuffix("%") for bound in ("low", "high"))
    return f"{low} to {high}"


def change(of: dict, is_share: bool) -> str:
    """Formats a difference with its sign, for shares in percentage points."""
    if of["value"] is None:
        return "—"
    return _signed(of["value"], is_share) + (" points" if is_share else "")


def change_interval(of: dict, is_share: bool) -> str:
    """Formats the bounds of a difference with their signs; "" if they are unknown."""
    if of["low"] is None:
        return ""
    return f"{_signed(of['low'], is_share)} to {_signed(of['high'], is_share)}"


def probability(p: float | None) -> str:
    """Formats a p-value, with "< 0.001" for very small ones."""
    if p is None:
        return "—"
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def verdict(contents: dict, compared: dict) -> str:
    """Says in words how a run's headline measure compares with the first run's; "" if unknown."""
    changes = compared["measures"].get(contents["headline"])
    if not changes or changes[0]["value"] is None:
        return ""
    measure, overall = contents["measures"][contents["headline"]], changes[0]
    level = f"{contents['confidence']:.0%}"
    if overall["low"] is None:
        return f"{measure['title']}: no pair differs"
    if overall["low"] <= 0 <= overall["high"]:
        return f"{measure['title']}: no difference shown at {level}"
    is_better = (overall["value"] > 0) == (measure["better"] == "higher")
    by = change(overall, measure["is_share"])
    return f"{measure['title']}: {'better' if is_better else 'worse'} ({by}), shown at {level}"


def higher(contents: dict, compared: dict, name: str, differing: dict) -> str:
    """Says in which run a measure is higher, in how many pairs, and how many of them are shown."""
    title, run = contents["measures"][name]["title"], differing["higher"]
    said = f"only {run} is correct" if name == "correct" else f"{title} is higher in {run}"
    said += f": {differing['pairs']:,} of {plural(compared['pairs'], 'pair')}"
    shown = len(differing["largest"])
    return capital(said) + (f", {shown} shown" if shown < differing["pairs"] else "")


def judged(contents: dict, name: str, image: dict) -> str:
    """Formats an image's value of a measure; what is wrong with it, if a judge said so."""
    if name == "correct":
        return image["reason"] or "correct"
    return number(image["value"], contents["measures"][name]["is_share"])


def summary(contents: dict) -> list[str]:
    """Returns lines for the terminal: each run's headline measure, and how runs compare."""
    lines = []
    for run in contents["runs"] if contents["headline"] else []:
        if means := run["measures"].get(contents["headline"]):
            measure = contents["measures"][contents["headline"]]
            value = number(means[0]["value"], measure["is_share"])
            bounds = interval(means[0], measure["is_share"])
            bounds = bounds and f" ({contents['confidence']:.0%} interval {bounds})"
            lines.append(f"{run['name']}: {value} {measure['title']}{bounds}")
    for compared in contents["comparisons"]:
        if said := verdict(contents, compared):
            lines.append(f"{compared['name']} compared with {compared['to']}: {said}")
    return lines


def counted(kinds: dict[str, int], most: int = 3) -> str:
    """Lists the most frequent kinds with their counts, most frequent first."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(kinds).most_common(most))


def category(name: str | None) -> str:
    """Returns a category's name, with "overall" for None and "no category" for ""."""
    return "overall" if name is None else name or "no category"


def cells(rows: list[list[str | float | None]]) -> list[list[str]]:
    """Formats a table's cells, with the same number of decimals in each column."""

    def column(values: tuple) -> list[str]:
        shortest = [f"{value:.4g}" for value in values if isinstance(value, float)]
        decimals = max((len(text.partition(".")[2]) for text in shortest), default=0)
        return [cell(value, decimals) for value in values]

    def cell(value: str | float | None, decimals: int) -> str:
        if isinstance(value, float):
            return f"{value:.{decimals}f}".replace("-", MINUS)
        return "—" if value is None else str(value)

    return list(map(list, zip(*map(column, zip(*rows, strict=True)), strict=True)))


def capital(text: str) -> str:
    """Returns text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def plural(count: int, noun: str) -> str:
    """Returns a count with its noun, for example "2 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def settings(contents: dict) -> tuple[dict[str, str], list[str]]:
    """Returns the settings shared by all runs, and the names of the settings that differ."""
    runs = [run["told"] for run in contents["runs"]]
    names = dict.fromkeys(name for said in runs for name in said)
    alike = [name for name in names if all(said.get(name) == runs[0].get(name) for said in runs)]
    shared = contents["told"] | {name: runs[0][name] for name in alike}
    shared = {name: value for name, value in shared.items() if value}
    return shared, [name for name in names if name not in alike]


def failures(contents: dict) -> tuple[list[str], list[list]]:
    """Returns the heads and rows of a table of wrong images by run and category, with reasons."""
    heads = ["run", "category", "wrong images", "most frequent reasons"]
    rows = [
        [run["name"], category(name), sum(kinds.values()), counted(kinds)]
        for run in contents["runs"]
        for name, kinds in run["failures"].items()
    ]
    return without_run(contents, heads, rows)


def without_run(contents: dict, heads: list[str], rows: list[list]) -> tuple[list, list]:
    """Leaves out the first column, the run's name, if there is only one run."""
    begin = len(contents["runs"]) == 1
    return heads[begin:], [row[begin:] for row in rows]


def missing(contents: dict) -> list[list[str]]:
    """Returns rows of missing measures: the measure, the runs without it, and the reason."""
    runs_of: dict[tuple[str, str], list[str]] = {}
    for run in contents["runs"]:
        for name, why in run["missing"].items():
            runs_of.setdefault((contents["measures"][name]["title"], why), []).append(run["name"])
    return [[title, ", ".join(names), why] for (title, why), names in runs_of.items()]


def method(contents: dict) -> list[str]:
    """Explains in sentences how the numbers of a report were computed."""
    sentences = [
        f"Intervals are {contents['confidence']:.0%} confidence intervals"
        f" from {contents['resamples']:,} bootstrap draws of prompts within each category;"
        " each prompt is drawn with all its images."
    ]
    if len(contents["categories"]) > 1:
        sentences.append(
            "The overall value is the mean of the category means, so all categories weigh the same."
        )
    if any(measure["is_share"] for measure in contents["measures"].values()):
        sentences.append(
            "A share that is equal in all draws, for example 100%, has a Wilson interval, with each"
            " prompt as one trial."
        )
    if "correct" in contents["measures"]:
        sentences.append("An image that could not be generated counts as wrong.")
    if contents["comparisons"]:
        sentences.append(
            "Runs are compared over pairs of images with the same prompt and seed. The p-values"
            " are from sign-flip tests and not corrected for multiple comparisons. Where no pair"
            " differs, there is no interval."
        )
    return sentences


def _signed(value: float, is_share: bool) -> str:
    value = round(100 * value, 1) + 0.0 if is_share else value  # + 0.0 turns -0.0 into 0.0
    text = f"{value:+.1f}" if is_share else f"{value:+#.4g}".rstrip(".")
    text = text if value else text.removeprefix("+")
    return text.replace("-", MINUS)
