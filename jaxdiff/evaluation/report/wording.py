"""Numbers as a report's readers see them."""

from collections import Counter

MINUS = "\u2212"  # as wide as a plus
MOST_ROWS = 200  # of a table that people read; report.json has them all


def number(value: float | None, is_share: bool) -> str:
    """A value: shares as percentages, others with four digits; a dash if it is not known."""
    if value is None:
        return "—"
    if is_share:
        return f"{100 * value:.1f} %"
    return f"{value:#.4g}".rstrip(".").replace("-", MINUS)


def interval(of: dict, is_share: bool) -> str:
    """The bounds "low" to "high", without the percent sign; "" if they are not known."""
    if of["low"] is None:
        return ""
    low, high = (number(of[bound], is_share).removesuffix(" %") for bound in ("low", "high"))
    return f"{low} to {high}"


def change(of: dict, is_share: bool) -> str:
    """A difference with its sign: of shares in percentage points."""
    if of["value"] is None:
        return "—"
    return _signed(of["value"], is_share) + (" points" if is_share else "")


def change_interval(of: dict, is_share: bool) -> str:
    """The bounds of a difference with their signs; "" if they are not known."""
    if of["low"] is None:
        return ""
    return f"{_signed(of['low'], is_share)} to {_signed(of['high'], is_share)}"


def probability(p: float | None) -> str:
    """A p-value, or that it is very small."""
    if p is None:
        return "—"
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def counted(kinds: dict[str, int], most: int = 3) -> str:
    """The most frequent kinds with their counts, most frequent first."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(kinds).most_common(most))


def category(name: str | None) -> str:
    """A category's name, or what stands for all of them."""
    return "overall" if name is None else name or "without a category"


def cells(rows: list[list[str | float | None]]) -> list[list[str]]:
    """The texts of a table's cells; the numbers of a column have as many decimals."""

    def column(values: tuple) -> list[str]:
        shortest = [f"{value:.4g}" for value in values if isinstance(value, float)]
        decimals = max((len(text.partition(".")[2]) for text in shortest), default=0)
        return [cell(value, decimals) for value in values]

    def cell(value: str | float | None, decimals: int) -> str:
        if isinstance(value, float):
            return f"{value:.{decimals}f}".replace("-", MINUS)
        return "—" if value is None else str(value)

    return list(map(list, zip(*map(column, zip(*rows, strict=True)), strict=True)))


def plural(count: int, noun: str) -> str:
    """A count and what is counted."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def told(contents: dict) -> tuple[dict[str, str], list[str]]:
    """What is said of the evaluation and alike of all runs, and the names of what differs."""
    runs = [run["told"] for run in contents["runs"]]
    names = dict.fromkeys(name for said in runs for name in said)
    alike = [name for name in names if all(said.get(name) == runs[0].get(name) for said in runs)]
    shared = contents["told"] | {name: runs[0][name] for name in alike}
    shared = {name: value for name, value in shared.items() if value}
    return shared, [name for name in names if name not in alike]


def failures(contents: dict) -> tuple[list[str], list[list]]:
    """The heads and rows of how many images of each run and category are wrong, and why."""
    heads = ["run", "category", "wrong images", "most frequent reasons"]
    rows = [
        [run["name"], category(name), sum(kinds.values()), counted(kinds)]
        for run in contents["runs"]
        for name, kinds in run["failures"].items()
    ]
    return without_run(contents, heads, rows)


def without_run(contents: dict, heads: list[str], rows: list[list]) -> tuple[list, list]:
    """Leaves out the first column, which names the run, where there is only one."""
    begin = len(contents["runs"]) == 1
    return heads[begin:], [row[begin:] for row in rows]


def missing(contents: dict) -> list[list[str]]:
    """Rows of a measure, the runs that have none, and why."""
    runs_of: dict[tuple[str, str], list[str]] = {}
    for run in contents["runs"]:
        for name, why in run["missing"].items():
            runs_of.setdefault((contents["measures"][name]["title"], why), []).append(run["name"])
    return [[title, ", ".join(names), why] for (title, why), names in runs_of.items()]


def method(contents: dict) -> list[str]:
    """How the numbers of a report came about, in sentences."""
    sentences = [
        f"Intervals are of {contents['confidence']:.0%} confidence".replace("%", " %")
        + f", by {contents['resamples']:,} bootstrap draws of prompts within their category;"
        " all images of a drawn prompt come along."
    ]
    if len(contents["categories"]) > 1:
        sentences.append(
            "Overall is the mean of the categories' means, so every category weighs the same."
        )
    if any(measure["is_share"] for measure in contents["measures"].values()):
        sentences.append(
            "A share of which no draw differs, such as 100 %, has Wilson's interval, with a prompt"
            " for one trial."
        )
    if "correct" in contents["measures"]:
        sentences.append("An image that could not be made counts as wrong.")
    if contents["comparisons"]:
        sentences.append(
            "Runs are compared pair by pair, at equal prompt and seed; p is the sign-flip test's,"
            " not corrected for the number of comparisons. Where no pair differs, there is no"
            " interval."
        )
    return sentences


def _signed(value: float, is_share: bool) -> str:
    value = round(100 * value, 1) + 0.0 if is_share else value  # and so no minus before a zero
    text = f"{value:+.1f}" if is_share else f"{value:+#.4g}".rstrip(".")
    text = text if value else text.removeprefix("+")
    return text.replace("-", MINUS)
