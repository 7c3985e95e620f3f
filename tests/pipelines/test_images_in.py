"""Rows that begin with other images: what they name is pinned, read and kept apart."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import jaxdiff
from jaxdiff import cli
from jaxdiff.dataset import run as runs
from jaxdiff.errors import InputError
from jaxdiff.images import image_files

pytestmark = pytest.mark.usefixtures("compiled_fast")


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth random picture of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def folder(tmp_path) -> Path:
    """The manifest's folder with two pictures and a mask of their lower half."""
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 32, 64, 64))
    mask.save(tmp_path / "mask.png")
    return tmp_path


def records(output: Path) -> list[dict]:
    return pq.read_table(output / "metadata").to_pylist()


def pixels(output: Path) -> dict[str, np.ndarray]:
    """The pixels of every image, by its key."""
    found = {}
    for path in sorted((output / "data").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "png":
                    found[key] = image_files.decode(tar.extractfile(member).read())
    return found


def reasons(output: Path) -> list[str]:
    lines = (output / "rejected.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines]


@pytest.mark.usefixtures("noisy")
def test_records_name_what_an_image_began_with(generate, folder):
    assert generate([{"image": "a.png", "mask_image": "mask.png"}, {"image": "./b.png"}, {}]) == 0
    masked, varied, plain = records(folder / "out")
    assert (masked["init_image"], masked["strength"], masked["mask_image"]) == (
        "a.png",
        1.0,
        "mask.png",
    )
    assert (varied["init_image"], varied["strength"], varied["mask_image"]) == ("b.png", 0.8, None)
    assert plain["init_image"] is plain["strength"] is plain["init_image_sha256"] is None
    assert len(masked["mask_image_sha256"]) == 64
    assert masked["init_image_sha256"] != varied["init_image_sha256"]
    assert cli.main(["verify", str(folder / "out")]) == 0
    with tarfile.open(folder / "out" / "data" / "train-00000.tar") as tar:
        (name,) = [each for each in tar.getnames() if each.endswith("png")]
        with Image.open(tar.extractfile(name)) as image:
            assert "Denoising strength: 1" in image.text["parameters"]


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize("format_", ["webdataset", "parquet", "imagefolder"])
def test_every_format_holds_them_and_loads(generate, folder, format_, tmp_path_factory):
    rows = [{"image": "a.png", "mask_image": "mask.png"}, {"image": "b.png"}, {}]
    assert generate(rows, f"--format={format_}") == 0
    assert cli.main(["verify", str(folder / "out")]) == 0
    cache = str(tmp_path_factory.mktemp("cache"))
    loaded = datasets.load_dataset(str(folder / "out"), split="train", cache_dir=cache)
    found = {}
    for row in loaded:
        record = row.get("json", row)
        image = row["png"] if "png" in row else row["image"]
        assert image.size == (64, 64)
        found[record["key"]] = (record["init_image"], record["mask_image"])
    assert found == {
        "000000000": ("a.png", "mask.png"),
        "000000001": ("b.png", None),
        "000000002": (None, None),
    }


@pytest.mark.usefixtures("noisy")
def test_datasets_without_images_have_no_columns_for_them(generate, folder):
    assert generate([{}]) == 0
    assert "init_image" not in records(folder / "out")[0]


def test_what_a_mask_leaves_out_comes_back_as_it_was(generate, folder):
    assert generate([{"image": "a.png", "mask_image": "mask.png"}]) == 0
    (made,) = pixels(folder / "out").values()
    given = np.asarray(Image.open(folder / "a.png"))
    np.testing.assert_array_equal(made[:32], given[:32])
    assert (made[40:] != given[40:]).any(axis=(1, 2)).all()


@pytest.mark.slow
def test_without_pasting_the_autoencoder_changes_it_slightly(generate, folder):
    row = {"image": "a.png", "mask_image": "mask.png"}
    assert generate([row], "--keep-unmasked=off") == 0
    (made,) = pixels(folder / "out").values()
    assert (made[:32] != np.asarray(Image.open(folder / "a.png"))[:32]).any()


def test_outpainting_keeps_the_image_inside_its_borders(generate, folder):
    picture(3, (32, 48)).save(folder / "small.png")
    row = {"image": "small.png", "outpaint": {"left": 32, "bottom": 16}}
    assert generate([row]) == 0
    (made,) = pixels(folder / "out").values()
    assert made.shape == (64, 64, 3)
    np.testing.assert_array_equal(made[:48, 32:], np.asarray(Image.open(folder / "small.png")))
    assert records(folder / "out")[0]["outpaint"] == "32,0,0,16"


@pytest.mark.slow
def test_larger_images_are_cropped_in_the_middle_and_resized(generate, folder):
    wide = Image.new("RGB", (256, 128), "white")
    wide.paste(picture(3, (128, 128)), (64, 0))
    wide.save(folder / "wide.png")
    picture(3, (128, 128)).save(folder / "square.png")
    assert generate([{"image": "wide.png", "seed": 1}, {"image": "square.png", "seed": 1}]) == 0
    one, other = (image.astype(int) for image in pixels(folder / "out").values())
    assert np.abs(one - other).max() <= 3  # resizing rounds


BAD = [
    ({"image": "none.png"}, "image none.png does not exist in"),
    ({"image": "../a.png"}, "is not a path inside"),
    ({"image": "notes.png"}, "is not a readable image"),
    ({"image": 7}, "image must be text, not 7"),
    ({"mask_image": "mask.png"}, "mask_image needs an image"),
    ({"outpaint": "8,0,0,0"}, "outpaint needs an image"),
    ({"strength": 0.5}, "strength needs an image"),
    ({"image": "a.png", "strength": 2}, "strength must be a number from 0 to 1, not 2"),
    ({"image": "a.png", "strength": 0.2}, "strength = 0.2 takes none of 4 steps"),
    ({"image": "a.png", "mask_image": "small.png"}, "mask_image is 8x8, but image is 64x64"),
    ({"image": "a.png", "mask_image": "black.png"}, "mask_image is black"),
    ({"image": "a.png", "outpaint": "0,0,0,0"}, "outpaint adds nothing"),
    ({"image": "a.png", "outpaint": {"up": 8}}, "outpaint has 'up'"),
    ({"image": "a.png", "outpaint": "32,0,32,0"}, "outpaint leaves no room for the image"),
]


@pytest.mark.usefixtures("noisy")
def test_bad_rows_are_rejected_alone(generate, folder):
    (folder / "notes.png").write_text("no image")
    Image.new("L", (64, 64)).save(folder / "black.png")
    Image.new("L", (8, 8), 255).save(folder / "small.png")
    assert generate([*(row for row, _ in BAD), {"image": "b.png"}]) == 0
    for said, (_, reason) in zip(reasons(folder / "out"), BAD, strict=True):
        assert reason in said
    assert len(records(folder / "out")) == 1


def test_a_source_that_changes_after_planning_fails_its_rows_alone(generate, folder, monkeypatch):
    rows = [{"image": "a.png", "num_images": 3}, {"image": "b.png", "num_images": 7}]
    assert generate(rows, "--batch-size=4") == 0
    before = pixels(folder / "out")
    again = folder / "again"
    begin = runs.begin

    def planned(*said):
        run = begin(*said)
        picture(9).save(folder / "a.png")
        return run

    monkeypatch.setattr(runs, "begin", planned)
    assert generate(rows, "--batch-size=4", output="again") == 3
    failed = [json.loads(line) for line in (again / "failed.jsonl").read_text().splitlines()]
    assert len(failed) == 3
    assert all("a.png has changed since" in row["reason"] for row in failed)
    made = pixels(again)
    assert len(made) == 7
    for key, image in made.items():
        np.testing.assert_array_equal(image, before[key])
    assert cli.main(["verify", str(again)]) == 0


@pytest.mark.usefixtures("noisy")
def test_images_are_relative_to_the_image_root(generate, folder):
    (folder / "elsewhere").mkdir()
    picture(5).save(folder / "elsewhere" / "c.png")
    assert generate([{"image": "c.png"}], f"--image-root={folder / 'elsewhere'}") == 0
    assert generate([{"image": "c.png"}], f"--image-root={folder / 'none'}") == 2


@pytest.mark.usefixtures("noisy")
def test_a_dataset_can_be_the_manifest_of_another(generate, folder, tiny_checkpoint):
    assert generate([{"id": "one", "num_images": 3}, {"prompt": "a star"}]) == 0
    arguments = [f"--model={tiny_checkpoint}", "--steps=4", "--strength=0.5"]
    made = folder / "varied"
    source = f"--manifest={folder / 'out'}"
    assert cli.main(["generate", source, f"--output={made}", *arguments]) == 0
    rows = records(made)
    assert [row["prompt"] for row in rows] == ["a ring"] * 3 + ["a star"]
    assert [row["id"] for row in rows] == [f"{key:09d}" for key in range(4)]
    assert rows[1]["init_image"] == "train-00000.tar#000000001.png"
    assert json.loads(rows[1]["metadata"])["record"]["id"] == "one"
    first = {row["key"]: row["sha256"] for row in records(folder / "out")}
    assert {row["id"]: row["init_image_sha256"] for row in rows} == first
    assert cli.main(["verify", str(made)]) == 0


@pytest.mark.usefixtures("noisy")
def test_foreign_archives_and_imagefolders_are_manifests(folder, tiny_checkpoint):
    shards = folder / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key, text in (("x/1", "a ring"), ("x/2", "a star")):
            picture(int(key[-1])).save(shards / "picture.jpg")
            tar.add(shards / "picture.jpg", f"{key}.jpg")
            for ending, content in (("txt", text.encode()), ("json", b'{"url": "u"}')):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    pictures = folder / "pictures"
    pictures.mkdir()
    picture(1).save(pictures / "1.png")
    (pictures / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a ring"}')
    arguments = [f"--model={tiny_checkpoint}", "--steps=2"]
    for name, more in (("shards", []), ("pictures", ["--prompt-column=text"])):
        said = [f"--manifest={folder / name}", f"--output={folder / f'of-{name}'}"]
        assert cli.main(["generate", *said, *arguments, *more]) == 0
    found = records(folder / "of-shards")
    assert [row["init_image"] for row in found] == ["0.tar#x/1.jpg", "0.tar#x/2.jpg"]
    assert [row["prompt"] for row in found] == ["a ring", "a star"]
    assert json.loads(found[0]["metadata"]) == {"record": {"url": "u"}}
    (row,) = records(folder / "of-pictures")
    assert (row["init_image"], row["prompt"]) == ("1.png", "a ring")


def test_a_dry_run_says_what_images_begin_with(generate, folder, capsys):
    rows = [{"image": "a.png", "mask_image": "mask.png"}, {"image": "a.png", "strength": 0.5}, {}]
    assert generate(rows, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "image and mask, 1" in said
    assert "image, 0.5" in said


@pytest.mark.usefixtures("noisy")
def test_a_dataset_without_images_is_not_extended_by_them(generate, folder, capsys):
    assert generate([{"id": "a"}]) == 0
    assert generate([{"id": "a"}, {"id": "b", "image": "a.png"}]) == 2
    assert "has rows without images only" in capsys.readouterr().err


def test_a_model_for_inpainting_needs_an_image_and_a_mask(generate, folder, inpainting_checkpoint):
    rows = [{"image": "a.png", "mask_image": "mask.png"}, {"image": "a.png"}, {}]
    assert generate(rows, model=inpainting_checkpoint) == 0
    assert reasons(folder / "out") == [
        "this model needs a mask: give it mask_image or outpaint",
        "this model only paints in images: give it image and mask_image",
    ]
    (made,) = pixels(folder / "out").values()
    given = np.asarray(Image.open(folder / "a.png"))
    np.testing.assert_array_equal(made[:32], given[:32])
    assert cli.main(["verify", str(folder / "out")]) == 0


def test_python_takes_paths_pictures_and_arrays(tiny_checkpoint, folder):
    model = jaxdiff.load(tiny_checkpoint)
    pixels = np.asarray(Image.open(folder / "a.png"))
    mask = np.asarray(Image.open(folder / "mask.png"))
    ways = [
        (folder / "a.png", folder / "mask.png"),
        (str(folder / "a.png"), Image.fromarray(mask)),
        (Image.fromarray(pixels), mask),
        (Image.fromarray(pixels).convert("RGBA"), Image.fromarray(mask).convert("LA")),
        (pixels, mask > 127),
    ]
    made = model.generate(
        [
            jaxdiff.Request(prompt="a ring", seed=3, steps=4, image=image, mask_image=of_image)
            for image, of_image in ways
        ]
    )
    for image in made[1:]:
        np.testing.assert_array_equal(image.pixels, made[0].pixels)
    with pytest.raises(InputError, match=r"image must be uint8 \[h, w, 3\], not float64"):
        model.generate([jaxdiff.Request(prompt="", image=pixels / 255.0)])
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # on white, as files are
    white = Image.new("RGB", (64, 64), "white")
    one, other = model.generate(
        [jaxdiff.Request(prompt="", seed=0, steps=4, image=image) for image in (clear, white)]
    )
    np.testing.assert_array_equal(one.pixels, other.pixels)
    with pytest.raises(InputError, match="image has I pixels; save it with 8 bits"):
        model.generate([jaxdiff.Request(prompt="", image=Image.new("I", (64, 64)))])
    with pytest.raises(InputError, match="mask_image needs an image"):
        model.generate([jaxdiff.Request(prompt="", mask_image=mask)])


@pytest.mark.slow  # the only one here with the bundled model
def test_the_model_decodes_what_it_encoded():
    """At a low strength, the bundled model gives the image back."""
    model = jaxdiff.load("shapes64")
    (first,) = model.generate([jaxdiff.Request(prompt="a red circle", seed=3)], batch_size=1)
    request = jaxdiff.Request(prompt="a red circle", seed=4, image=first.pixels, strength=0.2)
    (again,) = model.generate([request], batch_size=1)
    difference = np.abs(again.pixels.astype(int) - first.pixels)
    assert difference.mean() < 4
    (other,) = model.generate([jaxdiff.Request(prompt="a red circle", seed=4)], batch_size=1)
    assert np.abs(other.pixels.astype(int) - first.pixels).mean() > 4 * difference.mean()
