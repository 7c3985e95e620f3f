"""Jobs that enlarge images: as a stage of generate, and on their own."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_upscalers import write_rrdb, write_srvgg

import jaxdiff
from jaxdiff import cli
from jaxdiff.dataset import formats, image_files
from jaxdiff.request import Request

pytestmark = pytest.mark.usefixtures("compiled_fast")


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory) -> Path:
    return write_srvgg(tmp_path_factory.mktemp("upscaler") / "x2.safetensors")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Returns a folder of two images of one size, one of another, and two that cannot be used."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, size in {"a": (64, 32), "b": (64, 32), "more/c": (20, 40)}.items():
        Image.fromarray(picture(*size, seed=len(name) + ord(name[-1]))).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"no image")
    deep = np.zeros((8, 8), np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    return folder


def made(directory: Path) -> dict[str, tuple[dict, np.ndarray]]:
    """Returns the records and pixels of a dataset by the rows' ids."""
    assert cli.main(["verify", str(directory)]) == 0
    found = {}
    for file in sorted((directory / "data").glob("*.tar")):
        for sample in formats.read_tar(file):
            found[sample.record["id"]] = sample.record, image_files.decode(sample.image)
    return found


def enlarged(model: Path, pixels: np.ndarray) -> np.ndarray:
    (image,) = jaxdiff.load(model).generate([Request(prompt="", image=pixels)])
    return image.pixels


def test_a_folder_is_enlarged(pictures, upscaler, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["upscale", str(pictures), "--model", str(upscaler), "--output", str(out)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().err
    assert "2 of 4 rows" in said
    found = made(out)
    assert found.keys() == {"a.png", "b.png"}
    for name, (record, pixels) in found.items():
        source = np.asarray(Image.open(pictures / name))
        np.testing.assert_array_equal(pixels, enlarged(upscaler, source))
        assert (record["width"], record["height"], record["steps"]) == (64, 128, 1)
        assert (record["sampler"], record["prompt"], record["init_image"]) == ("none", "", name)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [Path(row["file"]).name for row in rejected] == ["broken.png", "deep.png"]
    assert cli.main(arguments) == 0
    assert "already finished" in capsys.readouterr().out
    assert cli.main(["view", str(out)]) == 0


def test_a_glob_reaches_into_folders(pictures, upscaler, tmp_path):
    arguments = ["upscale", f"{pictures}/**/[abc].png", "--model", str(upscaler)]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert made(tmp_path / "out").keys() == {"a.png", "b.png", "more/c.png"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.jsonl", '{"image": "a.png"}\n{"image": "more/c.png", "prompt": "a cat"}\n'),
        ("list.csv", "image,prompt\na.png,\nmore/c.png,a cat\n"),
        ("bare.csv", "image\na.png\nmore/c.png\n"),
    ],
)
def test_a_manifest_may_lack_prompts(name, text, pictures, upscaler, tmp_path):
    (pictures / name).write_text(text)
    arguments = ["upscale", str(pictures / name), "--model", str(upscaler)]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    prompts = [record["prompt"] for record, _ in made(tmp_path / "out").values()]
    assert prompts == ["", "" if name == "bare.csv" else "a cat"]


@pytest.fixture(scope="module")
def plain(tiny_checkpoint, tmp_path_factory) -> Path:
    """Returns a dataset of three images."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "prompts.txt").write_text("a\nb\nc\n")
    model = ["--model", str(tiny_checkpoint), "--steps=2"]
    arguments = ["generate", "--manifest", str(folder / "prompts.txt"), *model]
    assert cli.main([*arguments, "--output", str(folder / "out")]) == 0
    return folder


def test_a_stage_makes_what_a_job_makes(plain, tiny_checkpoint, upscaler, tmp_path, capsys):
    arguments = ["generate", "--manifest", str(plain / "prompts.txt"), "--steps=2"]
    arguments += ["--model", str(tiny_checkpoint), "--output", str(tmp_path / "stage")]
    assert cli.main([*arguments, "--upscale", f"{upscaler}:1.5"]) == 0
    small, stage = made(plain / "out"), made(tmp_path / "stage")
    for name, (record, pixels) in stage.items():
        assert pixels.shape == (96, 96, 3)
        assert (record["width"], record["upscaled_width"], record["upscaled_height"]) == (
            64,
            96,
            96,
        )
        assert "upscale=x2:1.5" in record["options"]
        assert record["seed"] == small[name][0]["seed"]
    capsys.readouterr()
    assert cli.main([*arguments, "--upscale", str(upscaler)]) == 2
    assert "holds another run (model" in capsys.readouterr().err
    job = ["upscale", str(plain / "out"), "--model", str(upscaler)]
    assert cli.main([*job, "--output", str(tmp_path / "job")]) == 0
    enlarged_ones = sorted(made(tmp_path / "job").items())
    for (_, (record, pixels)), (first, source) in zip(enlarged_ones, small.values(), strict=True):
        assert record["prompt"] == first["prompt"]
        np.testing.assert_array_equal(pixels, enlarged(upscaler, source))
    assert cli.main([*job, "--output", str(tmp_path / "dry"), "--dry-run"]) == 0


def cut(path: Path, change) -> Path:
    from safetensors.numpy import load_file, save_file

    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: (folder / "x.pth").write_bytes(b"x") and folder / "x.pth", "OUT.safetens"),
        (
            lambda folder: cut(
                write_rrdb(folder / "x.safetensors"), lambda w: w.pop("body.1.rdb2.conv3.bias")
            ),
            "1 missing (body.1.rdb2.conv3.bias)",
        ),
        (
            lambda folder: cut(
                write_srvgg(folder / "x.safetensors"),
                lambda w: [w.pop(key) for key in [*w] if key in ("body.1.weight", "body.3.weight")],
            ),
            "lacks some of its layers",
        ),
        (lambda folder: "shapes64", "enlarges no images; use an upscaler"),
        (lambda folder: "nowhere.safetensors", "'nowhere.safetensors'"),
    ],
)
def test_what_is_no_upscaler_is_refused(make, reason, pictures, tmp_path, capsys):
    model = str(make(tmp_path))
    arguments = ["upscale", str(pictures), "--model", model, "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--width=64"], "--width has no effect on SRVGGNetCompact upscaler"),
        (["--steps=3"], "--steps has no effect on SRVGGNetCompact upscaler"),
        (["--sampler=ddim"], "--sampler must be one of none"),
        (["--controlnet=x"], "--controlnet works with"),
        (["--upscale=shapes64-x4"], "the model is itself an upscaler"),
    ],
)
def test_options_without_effect_are_refused(options, reason, pictures, upscaler, tmp_path, capsys):
    arguments = ["upscale", str(pictures), "--model", str(upscaler)]
    assert cli.main([*arguments, "--output", str(tmp_path / "out"), *options]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("{upscaler}:3", "the factor must be a number from 1 to 2"),
        ("shapes64", "--upscale shapes64 is Stable Diffusion 1; use a GAN upscaler"),
    ],
)
def test_a_stage_needs_an_upscaler(said, reason, plain, upscaler, tmp_path, capsys):
    arguments = ["generate", "--manifest", str(plain / "prompts.txt")]
    arguments += ["--output", str(tmp_path / "out"), "--upscale", said.format(upscaler=upscaler)]
    assert cli.main(arguments) == 2
    assert reason in capsys.readouterr().err
