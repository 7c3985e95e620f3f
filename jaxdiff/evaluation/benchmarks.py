"""Prompt benchmarks: their descriptions, and readers for their official files.

Files are not trusted: they are read row by row, and the first invalid row stops the reading with a
one-line error that names it.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.dataset.manifest import columns, manifest
from jaxdiff.dataset.manifest.manifest import Source
from jaxdiff.dataset.manifest.rows import MAX_ID_CHARACTERS
from jaxdiff.errors import InputError
from jaxdiff.evaluation import audits
from jaxdiff.evaluation.records import Prompt
from jaxdiff.worlds import shapes

MAX_BYTES = 2**28  # of all rows as JSON, since they are held in memory
MAX_ROW_CHARACTERS = 2**16  # an escaped row must fit in a line of a manifest
STYLES = ("anime", "concept-art", "paintings", "photo")  # HPSv2's
CATEGORIES = ("category", "tag")  # the columns that may hold a dataset's categories


@dataclass(frozen=True)
class Benchmark:
    """The description of a benchmark.

    Attributes:
      title: its name in reports.
      paper: its source.
      images: the default number of images per prompt.
      layout: the layout of its images, a key of `layouts.LAYOUTS`.
      category: its name for categories; "" if it has none.
      prompts: the file that holds its prompts, and where to get it.
      scorer: the command for its own scorer, with the layout's directory as DIR; "" if it has none.
    """

    title: str
    paper: str
    images: int
    layout: str
    category: str
    prompts: str
    scorer: str = ""


BENCHMARKS = {
    "shapes": Benchmark(
        title="Shapes",
        paper="jaxdiff's shapes world, in GenEval's schema (arXiv:2310.11513)",
        images=4,
        layout="geneval",
        category="tag",
        prompts="optional, since it has its own prompts; a file of rows in GenEval's schema "
        "(.jsonl)",
        scorer="python summary_scores.py DIR/results.jsonl",
    ),
    "geneval": Benchmark(
        title="GenEval",
        paper="arXiv:2310.11513",
        images=4,
        layout="geneval",
        category="tag",
        prompts="prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval",
        scorer="python evaluate_images.py DIR --outfile results.jsonl --model-path DETECTOR",
    ),
    "t2i-compbench": Benchmark(
        title="T2I-CompBench",
        paper="arXiv:2307.06350",
        images=10,
        layout="t2i-compbench",
        category="category",
        prompts="examples/dataset/color_val.txt, or the folder with all *_val.txt files, of "
        "github.com/Karine-Huang/T2I-CompBench",
        scorer="python BLIP_vqa.py --out_dir=DIR/color (each category has its own scorer)",
    ),
    "dpg": Benchmark(
        title="DPG-Bench",
        paper="arXiv:2403.05135",
        images=4,
        layout="dpg",
        category="",
        prompts="the folder dpg_bench/prompts, or dpg_bench/dpg_bench.csv, of "
        "github.com/TencentQQGYLab/ELLA",
        scorer="bash dpg_bench/dist_eval.sh DIR WIDTH",
    ),
    "partiprompts": Benchmark(
        title="PartiPrompts",
        paper="arXiv:2206.10789",
        images=1,
        layout="partiprompts",
        category="category",
        prompts="PartiPrompts.tsv of github.com/google-research/parti",
    ),
    "drawbench": Benchmark(
        title="DrawBench",
        paper="arXiv:2205.11487",
        images=1,
        layout="drawbench",
        category="category",
        prompts="its table saved as CSV with the columns Prompts,Category, for example from "
        "huggingface.co/datasets/sayakpaul/drawbench",
    ),
    "hpsv2": Benchmark(
        title="HPSv2",
        paper="arXiv:2306.09341",
        images=1,
        layout="hpsv2",
        category="style",
        prompts="the folder with anime.json, concept-art.json, paintings.json and photo.json, or "
        "one of these files, from huggingface.co/datasets/zhwang/HPDv2 (benchmark)",
        scorer='hpsv2.evaluate("DIR", hps_version="v2.1")',
    ),
    "audit": Benchmark(
        title="Audit",
        paper="",
        images=8,
        layout="prompts",
        category="attributes",
        prompts='a template file (.toml): template = "a photo of a {adjective} {noun}" and, under '
        '[words], adjective = ["happy", "sad"] and noun = ["doctor", "nurse"]',
    ),
    "prompts": Benchmark(
        title="Your own prompts",
        paper="",
        images=4,
        layout="prompts",
        category="category",
        prompts="any manifest of jaxdiff generate; the report groups by its column `category`",
    ),
}


def read(name: str, path: Path | None, per_tag: int = 50, seed: int = 6) -> list[Prompt]:
    """Returns the prompts of a benchmark of `BENCHMARKS`, in its order.

    Args:
      path: its official file or folder, in the official format; None for shapes' own prompts.
      per_tag, seed: for shapes' own prompts: the maximum number per tag, and the seed that draws
        them.

    Raises:
      InputError: if the file is missing or too large, or naming the line of the first invalid row.
    """
    if path is None and name != "shapes":
        raise InputError(f"--benchmark {name} needs --prompts: {BENCHMARKS[name].prompts}")
    if path is None:
        return _own_shapes(per_tag, seed)
    if name == "audit":
        return audits.read(path)
    prompts, size = {}, 0
    for where, prompt in _parsed(name, path):
        there = prompts.get(prompt.id)
        if there and name == "dpg" and there.text == prompt.text:
            continue  # its table has a row for each question about an image
        if there:
            raise InputError(f"{where}: the id {checks.shown(prompt.id)} is used before; rename it")
        prompts[prompt.id] = prompt
        size += len(json.dumps(prompt.row))
        if size > MAX_BYTES:
            raise InputError(f"{path} has more than {MAX_BYTES // 2**20} MiB; split it")
    if not prompts:
        raise InputError(f"{path} has no prompts; add at least one")
    return list(prompts.values())


def manifest_rows(prompts: Iterable[Prompt], images: int) -> Iterator[dict]:
    """Yields the prompts as manifest rows that ask for `images` images each."""
    for prompt in prompts:
        yield {
            "id": prompt.id,
            "prompt": prompt.text,
            "num_images": images,
            "category": prompt.category,
            "benchmark_row": json.dumps(prompt.row, ensure_ascii=False),
        }


def prompt_of(metadata: dict, prompt_id: str, text: str) -> Prompt:
    """Restores the prompt of a dataset's record, from `manifest_rows` or from a user's manifest.

    Args:
      metadata: the row's columns that `jaxdiff generate` does not use.

    Raises:
      InputError: if the columns from `manifest_rows` are damaged.
    """
    if "benchmark_row" not in metadata:
        named = {name.casefold(): value for name, value in reversed(metadata.items())}
        category = next((named[name] for name in CATEGORIES if name in named), "")
        category = category if isinstance(category, str) else ""
        return Prompt(prompt_id, text, category, {**metadata, "prompt": text})
    row = metadata["benchmark_row"]
    try:
        row = json.loads(row) if isinstance(row, str) else None
    except (RecursionError, ValueError):
        row = None
    category = metadata.get("category")
    if not isinstance(row, dict) or not isinstance(category, str):
        raise InputError(
            f"row {checks.shown(prompt_id)}: its benchmark_row or category is not in the format of "
            "jaxdiff evaluate; rename these columns"
        )
    return Prompt(prompt_id, text, category, row)


def _own_shapes(per_tag: int, seed: int) -> list[Prompt]:
    prompts = []
    for tag in shapes.TAGS:
        rows = {row["prompt"]: row for row in shapes.benchmark_rows(tag, per_tag, seed)}
        for number, (text, row) in enumerate(rows.items()):  # single_object has at most 24
            prompts.append(Prompt(f"{tag}-{number:04d}", text, tag, row))
    return prompts


def _parsed(name: str, path: Path) -> Iterator[tuple[str, Prompt]]:
    """Yields each prompt of the benchmark's files with its location, for error messages."""
    parse = PARSERS[name]
    for source in _sources(name, path):
        stem = Path(source.name).name.removesuffix(".gz").rpartition(".")[0]
        unit = "row" if manifest.kind(source) in ("json", "parquet") else "line"
        number = 0
        for entry in manifest.read(source):
            where = source.name if source.is_item else f"{source.name}, {unit} {entry.line}"
            if entry.error:
                raise InputError(f"{where}: {entry.error}")
            if entry.values is None:
                continue
            try:
                prompt = parse(entry.values, stem, number)
                _check(prompt)
            except (InputError, RecursionError, TypeError, ValueError) as problem:
                title = BENCHMARKS[name].title
                raise InputError(f"{where} is not a valid row of {title}: {problem}") from None
            number += 1
            yield where, prompt


def _check(prompt: Prompt) -> None:
    """Rejects a prompt that does not fit in a manifest."""
    if not checks.text("the prompt", prompt.text).strip():
        raise BadValueError("the prompt is empty")
    if not 1 <= len(checks.text("the id", prompt.id)) <= MAX_ID_CHARACTERS:
        raise BadValueError(f"the id must have 1 to {MAX_ID_CHARACTERS} characters")
    row = json.dumps(prompt.row, ensure_ascii=False)
    checks.unicode("the row", row)
    if len(row) > MAX_ROW_CHARACTERS:
        raise BadValueError(f"the row has more than {MAX_ROW_CHARACTERS} characters")


def _sources(name: str, path: Path) -> tuple[Source, ...]:
    """Returns the benchmark's files at a path."""
    wanted = {"t2i-compbench": "*_val.txt", "hpsv2": "*.json"}.get(name)
    if not wanted or not path.is_dir():
        return manifest.find(path).sources
    files = sorted(path.glob(wanted))
    if name == "hpsv2":  # its folder also has DrawBench
        files = [file for file in files if file.stem in STYLES]
    if not files:
        raise InputError(f"{path} has no {wanted}; --prompts takes {BENCHMARKS[name].prompts}")
    return manifest.of_names(str(path), {str(file): file for file in files}).sources


def _geneval(values: dict, _stem: str, number: int) -> Prompt:
    for name in ("include", "exclude"):
        if name == "include" and name not in values:
            raise BadValueError(f"it has no include, only {_shown(values)}")
        objects = values.get(name, [])
        if not isinstance(objects, list) or not all(map(_is_object, objects)):
            raise BadValueError(
                f'{name} must be a list of objects like {{"class": "cat", "count": 1}}, not '
                f"{checks.shown(objects)}"
            )
    return Prompt(f"{number:05d}", _text(values, "prompt"), _text(values, "tag"), values)


def _is_object(entry) -> bool:
    """Returns whether it is a GenEval object, which may have a color or a relative position."""
    if not isinstance(entry, dict) or type(entry.get("count")) is not int:
        return False
    place = entry.get("position", ["", 0])
    return (
        isinstance(entry.get("class"), str)
        and isinstance(entry.get("color", ""), str)
        and isinstance(place, list)
        and [type(part) for part in place] == [str, int]
    )


def _shapes(values: dict, stem: str, number: int) -> Prompt:
    prompt = _geneval(values, stem, number)
    checks.choice("tag", prompt.category, shapes.TAGS)
    shapes.caption_for(values)
    return prompt


def _t2i_compbench(values: dict, stem: str, number: int) -> Prompt:
    text = _text(values, "prompt").partition("\t")[0]  # the benchmark's loaders split at tabs
    category = stem.removesuffix("_val")
    return Prompt(f"{category}-{number:05d}", text, category, {"prompt": text})


def _dpg(values: dict, _stem: str, _number: int) -> Prompt:
    """Parses a file of the folder or a row of the table, which hold the same data."""
    of_file = "item_id" not in values and "text" not in values
    item, text = ("id", "prompt") if of_file else ("item_id", "text")
    row = {"item_id": _text(values, item), "text": _text(values, text)}
    return Prompt(row["item_id"], row["text"], "", row)


def _partiprompts(values: dict, _stem: str, number: int) -> Prompt:
    _text(values, "Challenge")
    return Prompt(f"{number:05d}", _text(values, "Prompt"), _text(values, "Category"), values)


def _drawbench(values: dict, _stem: str, number: int) -> Prompt:
    named = {name.casefold(): value for name, value in values.items()}  # copies differ in case
    text, category = _text(named, "prompts"), _text(named, "category")
    return Prompt(f"{number:05d}", text, category, values)


def _hpsv2(values: dict, stem: str, number: int) -> Prompt:
    if stem not in STYLES:
        raise BadValueError(f"the file's name must be one of {', '.join(STYLES)}, plus .json")
    return Prompt(f"{stem}/{number:05d}", _text(values, "prompt"), stem, values)


def _own(values: dict, _stem: str, number: int) -> Prompt:
    """Parses a row of any manifest; ignores its image settings, which belong to the run."""
    means = {m: column for column, m in columns.meaning(tuple(values)).items() if m}
    if "prompt" not in means:
        raise BadValueError(f"it {columns.no_prompt(values, None)}")
    said = values.get(means.get("id"))
    category = next((v for name, v in values.items() if name.casefold() == "category"), None)
    return Prompt(
        str(number + 1) if said is None else checks.text("id", str(said)),
        _text(values, means["prompt"]),
        "" if category is None else checks.text("category", category),
        values,
    )


def _text(values: dict, name: str) -> str:
    if values.get(name) is None:
        raise BadValueError(f"it has no {name}, only {_shown(values)}")
    return checks.text(name, values[name])


def _shown(values: dict) -> str:
    return checks.shown(", ".join(map(str, values)))


# Arguments: a row of a file, the file's name without its ending, and the row's number from 0.
PARSERS: dict[str, Callable[[dict, str, int], Prompt]] = {
    "shapes": _shapes,
    "geneval": _geneval,
    "t2i-compbench": _t2i_compbench,
    "dpg": _dpg,
    "partiprompts": _partiprompts,
    "drawbench": _drawbench,
    "hpsv2": _hpsv2,
    "prompts": _own,
}
