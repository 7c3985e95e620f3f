"""Folders in the benchmarks' layouts: written, read back, and rejected."""

import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.evaluation.benchmarks import BENCHMARKS
from jaxdiff.evaluation.layouts import folders as layouts
from jaxdiff.evaluation.records import Picture, Prompt
from jaxdiff.images.image_files import decode

ROW = {"tag": "colors", "include": [{"count": 1, "class": "cup", "color": "red"}]}


def image_file(color, extension="png", size=(8, 8)) -> bytes:
    file = io.BytesIO()
    formats = {"png": "png", "jpg": "jpeg", "webp": "webp"}
    arguments = {"lossless": True} if extension == "webp" else {}
    Image.new("RGB", size, color).save(file, formats[extension], **arguments)
    return file.getvalue()


def prompts_of(count=3, category="colors") -> list[Prompt]:
    texts = [f"a red cup number {number}" for number in range(count)]
    return [Prompt(f"p{i}", t, category, ROW | {"prompt": t}) for i, t in enumerate(texts)]


def pictures_of(prompts, images, extension="png", size=(8, 8)) -> list[Picture]:
    return [
        Picture(
            f"{position * images + index:09d}",
            prompt,
            index,
            index,
            image_file((40 * position, 60 * index, 200), extension, size),
            extension,
        )
        for position, prompt in enumerate(prompts)
        for index in range(images)
    ]


def names(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_every_benchmark_has_a_layout():
    assert {benchmark.layout for benchmark in BENCHMARKS.values()} == layouts.LAYOUTS.keys()


def test_geneval_has_a_folder_per_prompt_with_the_original_row(tmp_path):
    prompts = prompts_of()
    pictures = pictures_of(prompts, 4)
    assert layouts.export("geneval", pictures, prompts, 4, tmp_path / "out") == 12
    own = ["grid.png", "metadata.jsonl", *(f"samples/{i:04d}.png" for i in range(4))]
    assert names(tmp_path / "out") == [f"{p:05d}/{name}" for p in range(3) for name in own]
    text = (tmp_path / "out/00001/metadata.jsonl").read_text()
    assert text == json.dumps(prompts[1].row)
    assert "\n" not in text
    assert list(json.loads(text)["include"][0]) == ["count", "class", "color"]
    # A PNG keeps its bytes, including the settings in its metadata.
    assert (tmp_path / "out/00002/samples/0003.png").read_bytes() == pictures[11].image
    grid = decode((tmp_path / "out/00000/grid.png").read_bytes())
    assert grid.shape == (16, 16, 3)
    assert grid[0, 8].tolist() == [0, 60, 200]


def test_geneval_may_share_a_folder_and_replaces_an_earlier_export(tmp_path):
    (tmp_path / "00007" / "samples").mkdir(parents=True)
    (tmp_path / "report.md").write_text("kept")
    prompts = prompts_of(2)
    with pytest.raises(InputError, match="not empty"):
        layouts.export("geneval", pictures_of(prompts, 1), prompts, 1, tmp_path)
    layouts.export("geneval", pictures_of(prompts, 1), prompts, 1, tmp_path, beside_others=True)
    layouts.export("geneval", pictures_of(prompts, 1), prompts, 1, tmp_path, beside_others=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000", "00001", "report.md"]


def test_t2i_compbench_numbers_images_consecutively_within_a_category(tmp_path):
    prompts = [
        Prompt(f"{category}-{number}", f"{number} cups, blue", category)
        for category in ("color", "shape")
        for number in range(2)
    ]
    layouts.export("t2i-compbench", pictures_of(prompts, 3), prompts, 3, tmp_path / "out")
    expected = [
        f"{category}/samples/{i // 3} cups, blue_{i:06d}.png"
        for category in ("color", "shape")
        for i in range(6)
    ]
    assert names(tmp_path / "out") == expected
    # Its scorers allow nothing else in the folder and read the number from the last six digits.
    files = [path.name for path in (tmp_path / "out/color/samples").iterdir()]
    assert sorted(int(name[-10:-4]) for name in files) == list(range(6))
    assert {name.split("_")[0] for name in files} == {"0 cups, blue", "1 cups, blue"}


def test_t2i_compbench_without_categories_has_no_category_folder(tmp_path):
    prompts = prompts_of(1, category="")
    layouts.export("t2i-compbench", pictures_of(prompts, 1), prompts, 1, tmp_path / "out")
    assert names(tmp_path / "out") == ["samples/a red cup number 0_000000.png"]


def test_dpg_has_a_grid_of_four_images_per_prompt(tmp_path):
    prompts = prompts_of()
    pictures = pictures_of(prompts, 4)
    backwards = reversed(pictures)  # the order has no effect
    assert layouts.export("dpg", backwards, prompts, 4, tmp_path / "out") == 12
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["p0.png", "p1.png", "p2.png"]
    grid = Image.open(tmp_path / "out/p1.png")
    for index, corner in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        tile = grid.crop((*corner, corner[0] + 8, corner[1] + 8))
        assert np.array_equal(np.asarray(tile), decode(pictures[4 + index].image))


def test_hpsv2_has_a_folder_of_jpegs_per_style(tmp_path):
    prompts = [Prompt(f"{s}/{i}", "a cup", s) for s in ("anime", "photo") for i in range(2)]
    layouts.export("hpsv2", pictures_of(prompts, 1), prompts, 1, tmp_path / "out")
    assert names(tmp_path / "out") == [
        f"{s}/{i:05d}.jpg" for s in ("anime", "photo") for i in (0, 1)
    ]
    with Image.open(tmp_path / "out/photo/00000.jpg") as image:
        assert image.format == "JPEG"
        assert b"quality 95" in image.info["comment"]


def test_categories_are_folders_and_a_table_lists_the_files(tmp_path):
    rows = [("bond", "Abstract"), ("a pear, cut", "Food & Beverage"), ("x", "../../etc/")]
    prompts = [
        Prompt(f"{i:05d}", text, category, {"Prompt": text, "Category": category, "Note": "n"})
        for i, (text, category) in enumerate(rows)
    ]
    layouts.export("partiprompts", pictures_of(prompts, 2), prompts, 2, tmp_path / "out")
    expected = ["-etc-", "Abstract", "Food & Beverage"]
    folders = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert [re.sub("-+", "-", name) for name in folders] == expected
    with (tmp_path / "out/results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [*sorted(row["file"] for row in table), "results.csv"] == names(tmp_path / "out")
    assert table[2] == {
        "file": "Food & Beverage/00001.png",
        "id": "00001",
        "prompt": "a pear, cut",
        "category": "Food & Beverage",
        "index": "0",
        "Note": "n",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("layout", ["partiprompts", "drawbench", "prompts"])
def test_the_table_has_no_formula(tmp_path, layout):
    formulas = [
        *('=HYPERLINK("https://x.invalid", "a cup")', "+1", "-2", "@SUM(1)"),
        *("\t=1", "\r=1", "\n=1", "\uff1d1", "\uff0b1", "\uff0d1", "\uff201"),
    ]
    harmless = ["a cup = 1", "'=1", " =1", '"', "a\r=1\n=1", ""]
    texts = [*formulas, *harmless]
    prompts = [
        Prompt(text or "empty", text, text, {"Note": text, "=Count": -3, "share": -0.5})
        for text in texts
    ]
    layouts.export(layout, pictures_of(prompts, 1), prompts, 1, tmp_path / "out")
    with (tmp_path / "out/results.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    expected = [f"'{text}" for text in formulas] + harmless
    for column in ("prompt", "category", "Note"):
        assert [row[column] for row in table] == expected
    assert [row["id"] for row in table] == [*expected[:-1], "empty"]
    numbers = [(row["index"], row["'=Count"], row["share"]) for row in table]
    assert numbers == [("0", "-3", "-0.5")] * len(texts)
    # Paths are exact: their characters allow no harmful formula, whatever they begin with.
    files = [row["file"] for row in table]
    assert sorted([*files, "results.csv"]) == names(tmp_path / "out")
    assert all(re.fullmatch(r"[\w &',+()/.-]+", file) for file in files)


@pytest.mark.parametrize("extension", ["jpg", "webp"])
def test_other_files_are_converted_to_png(tmp_path, extension):
    prompts = prompts_of(1)
    (picture,) = pictures_of(prompts, 1, extension)
    layouts.export("geneval", [picture], prompts, 1, tmp_path / "out")
    with Image.open(tmp_path / "out/00000/samples/0000.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), decode(picture.image))


def without(pictures, place, **changes):
    changed = Picture(**{**vars(pictures[place]), **changes})
    return [*pictures[:place], changed, *pictures[place + 1 :]]


STRANGER = Prompt("other", "a cup", "colors")
BAD_PICTURES = {
    "missing": (lambda p: p[:5] + p[6:], "image 1 of prompt 'p1' is missing"),
    "failed": (lambda p: without(p, 5, image=None), "image 1 of prompt 'p1' could not be"),
    "cut": (
        lambda p: without(p, 5, image=p[5].image[:45]),
        "image 1 of prompt 'p1': not a readable",
    ),
    "extra": (lambda p: without(p, 5, index=4), "image 4 of prompt 'p1' is one too many"),
    "twice": (lambda p: [*p, p[5]], "image 1 of prompt 'p1' exists twice"),
    "stranger": (lambda p: without(p, 5, prompt=STRANGER), "'other': the benchmark does not have"),
}


@pytest.mark.parametrize("layout", ["geneval", "dpg", "prompts"])
@pytest.mark.parametrize("fault", BAD_PICTURES)
def test_an_incomplete_set_writes_nothing(tmp_path, layout, fault):
    change, message = BAD_PICTURES[fault]
    prompts = prompts_of()
    pictures = change(pictures_of(prompts, 4))
    with pytest.raises(InputError, match=re.escape(message)):
        layouts.export(layout, pictures, prompts, 4, tmp_path / "out")
    assert not list(tmp_path.iterdir())


BAD_PROMPTS = {
    "t2i slash": ("t2i-compbench", {"text": "a cup/mug"}, "cannot be a file name"),
    "t2i underscore": ("t2i-compbench", {"text": "a_cup"}, 'cut the prompt at the first "_"'),
    "t2i long": ("t2i-compbench", {"text": "é" * 125}, "too long for a file name"),
    "t2i category": ("t2i-compbench", {"category": ".."}, "cannot be a file name"),
    "dpg dot": ("dpg", {"id": "a.b"}, 'cut the id at the first "."'),
    "dpg path": ("dpg", {"id": "/etc/cup"}, "cannot be a file name"),
    "hpsv2 style": ("hpsv2", {"category": "../photo"}, "its style must be one of anime"),
    "geneval row": ("geneval", {"row": {"prompt": "a cup"}}, "lacks tag, include"),
}


@pytest.mark.parametrize("fault", BAD_PROMPTS)
def test_a_prompt_that_the_layout_cannot_hold_is_named_before_anything_is_written(tmp_path, fault):
    layout, change, message = BAD_PROMPTS[fault]
    prompt = Prompt(**{"id": "p", "text": "a cup", "category": "photo", "row": ROW} | change)
    images = layouts.LAYOUTS[layout].images or 1
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        layouts.export(layout, iter([]), [prompt], images, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_dpg_requires_four_squares_of_one_size(tmp_path):
    prompts = prompts_of(1)
    with pytest.raises(InputError, match="takes 4 images of each prompt, not 3"):
        layouts.export("dpg", pictures_of(prompts, 3), prompts, 3, tmp_path / "out")
    wide = pictures_of(prompts, 4, size=(16, 8))
    with pytest.raises(InputError, match="squares of one size"):
        layouts.export("dpg", wide, prompts, 4, tmp_path / "out")
    mixed = without(pictures_of(prompts, 4), 3, image=image_file("red", size=(16, 16)))
    with pytest.raises(InputError, match="squares of one size"):
        layouts.export("dpg", mixed, prompts, 4, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_empty_is_left_unchanged(tmp_path):
    (tmp_path / "file").write_text("kept")
    prompts = prompts_of(1)
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="give a new directory"):
            layouts.export("prompts", pictures_of(prompts, 1), prompts, 1, taken)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_exported_folders_are_read_back(tmp_path, layout):
    prompts = prompts_of(category="photo")
    images = layouts.LAYOUTS[layout].images or 3
    pictures = pictures_of(prompts, images)
    layouts.export(layout, pictures, prompts, images, tmp_path / "out")
    back = list(layouts.read_layout(layout, tmp_path / "out", prompts))
    assert [(p.prompt, p.index, p.seed) for p in back] == [
        (p.prompt, p.index, -1) for p in pictures
    ]
    assert len({p.key for p in back}) == len(back)
    for one, other in zip(back, pictures, strict=True):
        allowed = 3 if one.extension == "jpg" else 0
        difference = decode(one.image).astype(int) - decode(other.image)
        assert abs(difference).max() <= allowed


def test_geneval_from_its_own_generator_is_read(tmp_path):
    """GenEval's generator numbers samples with five digits; the JSON may end with a newline."""
    prompts = prompts_of(2)
    for position, prompt in enumerate(prompts):
        samples = tmp_path / f"{position:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt.row) + "\n")
        for index in range(2):
            (samples / f"{index:05d}.png").write_bytes(image_file((index, position, 0)))
    back = layouts.read_layout("geneval", tmp_path, prompts)
    assert [decode(p.image)[0, 0].tolist() for p in back] == [
        [0, 0, 0],
        [1, 0, 0],
        [0, 1, 0],
        [1, 1, 0],
    ]


IMPORT_FAULTS = {
    "missing": (lambda out: (out / "00001/samples/0001.png").unlink(), "0001.png is missing"),
    "cut": (
        lambda out: (out / "00001/samples/0001.png").write_bytes(b"x"),
        "0001.png: not a readable image",
    ),
    "extra": (
        lambda out: (out / "00001/samples/0003.png").write_bytes(image_file("red")),
        "0003.png is one too many: the first prompt has 3 images",
    ),
    "another": (
        lambda out: (out / "00001/metadata.jsonl").write_text('{"prompt": "a dog"}'),
        "does not have the benchmark's prompt, 'a red cup number 1'",
    ),
    "no row": (lambda out: (out / "00001/metadata.jsonl").unlink(), "metadata.jsonl is missing"),
    "no JSON": (
        lambda out: (out / "00001/metadata.jsonl").write_text("[]"),
        "is not a JSON object with a prompt",
    ),
}


@pytest.mark.parametrize("fault", IMPORT_FAULTS)
def test_the_error_for_an_incomplete_folder_names_a_file(tmp_path, fault):
    change, message = IMPORT_FAULTS[fault]
    prompts = prompts_of()
    layouts.export("geneval", pictures_of(prompts, 3), prompts, 3, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        list(layouts.read_layout("geneval", tmp_path / "out", prompts))
    assert f"{tmp_path}/out/00001/" in str(raised.value)


def test_a_file_that_is_not_a_grid_is_reported(tmp_path):
    (tmp_path / "p0.png").write_bytes(image_file("red", size=(9, 8)))
    with pytest.raises(InputError, match=r"p0.png is 9x8 pixels, not a 2x2 grid of squares"):
        list(layouts.read_layout("dpg", tmp_path, prompts_of(1)))
