"""Jobs that enlarge images: as a stage of generate, and on their own."""

import json
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cases import further
from making import files
from PIL import Image
from small_upscalers import write_rrdb, write_srvgg

import jaxdiff
from jaxdiff import cli
from jaxdiff.dataset import formats, names
from jaxdiff.images import fitting, image_files
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
    for file in sorted((directory / "data").iterdir()):
        for sample in (formats.read_tar if file.suffix == ".tar" else formats.read_parquet)(file):
            found[sample.record["id"]] = sample.record, image_files.decode(sample.image)
    return found


def enlarged(model: Path, pixels: np.ndarray) -> np.ndarray:
    (image,) = loaded(model).generate([Request(prompt="", image=pixels)])
    return image.pixels


loaded = cache(jaxdiff.load)


def job(source: Path | str, model: Path, output: Path, *more: str) -> list[str]:
    return ["upscale", str(source), "--model", str(model), "--output", str(output), *more]


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
        further("list.csv", "image,prompt\na.png,\nmore/c.png,a cat\n"),
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
        full = enlarged(upscaler, small[name][1])
        np.testing.assert_array_equal(pixels, fitting.fitted(full, 96, 96))
        assert (record["width"], record["upscaled_width"], record["upscaled_height"]) == (
            64,
            96,
            96,
        )
        assert "upscale=x2:1.5" in record["options"]
        assert record["seed"] == small[name][0]["seed"]
    capsys.readouterr()
    assert cli.main([*arguments, "--upscale", f"{upscaler}:1.5", "--dry-run"]) == 0
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
        (["--guidance-scale=3"], "--guidance-scale has no effect on SRVGGNetCompact upscaler"),
        (["--strength=0.5"], "--strength has no effect on SRVGGNetCompact upscaler"),
        (["--lora=x.safetensors"], "--lora has no effect on SRVGGNetCompact upscaler"),
        (["--refiner=shapes64"], "--refiner cannot continue what SRVGGNetCompact upscaler begins"),
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


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the input is missing, which comes first"),
        (["--model=shapes64-x4"], "the input is missing, which comes first"),
        (["a.png", "b.png", "--model=shapes64-x4"], "unexpected 'b.png': the input is one name"),
        (["nowhere", "--model=shapes64-x4"], "nowhere does not exist or is not a file"),
        (["{folder}", "--model=shapes64-x4"], "is a folder without .txt files or images"),
        (["{folder}"], "--model is missing"),
        (["{folder}", "--modle", "x"], "unknown option --modle; did you mean --model?"),
        (["{folder}", "--model=shapes64"], "--model shapes64 enlarges no images; use an upscaler"),
    ],
)
def test_a_command_without_images_is_refused(arguments, reason, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    said = [word.format(folder=tmp_path / "empty") for word in arguments]
    assert cli.main(["upscale", *said, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folders_that_say_no_images_are_refused(pictures, upscaler, tmp_path, capsys):
    (pictures / "a.txt").write_text("a caption")
    assert cli.main(job(pictures, upscaler, tmp_path / "out")) == 2
    said = f"{pictures} has .txt files, which are read as prompts; name its images, in quotes: "
    assert said + f"'{pictures}/*.png'" in capsys.readouterr().err
    (tmp_path / "made" / names.WORK).mkdir(parents=True)
    assert cli.main(job(tmp_path / "made", upscaler, tmp_path / "out")) == 2
    assert "made is a dataset without WebDataset or Parquet shards" in capsys.readouterr().err


def test_prompts_are_no_images(upscaler, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    arguments = ["generate", "--manifest", str(tmp_path / "prompts.txt"), "--model", str(upscaler)]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "line 1: this model enlarges images: give it image" in capsys.readouterr().err


def test_rows_that_cannot_be_used_are_rejected_alone(upscaler, tmp_path):
    frames = [Image.fromarray(picture(8, 8, seed)) for seed in range(2)]
    frames[0].save(tmp_path / "moves.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.png")
    Image.new("RGB", (4, 4097)).save(tmp_path / "tall.png")
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:90])
    Image.fromarray(picture(1, 1, 3)).save(tmp_path / "one.png")
    bad = {
        "image moves.png is animated (2 frames); save one frame": {"image": "moves.png"},
        "image is 4x4097: enlarged by 2, its height would be 8194 px": {"image": "tall.png"},
        "image deep.png has I;16 pixels; save it with 8 bits": {"image": "deep.png"},
        "image cut.png is not a readable image": {"image": "cut.png"},
        "image none.png does not exist in": {"image": "none.png"},
        "is not a path inside": {"image": "../one.png"},
        "this model enlarges whole images; leave mask_image out": {
            "image": "a.png",
            "mask_image": "a.png",
        },
        "this model enlarges whole images; leave outpaint out": {
            "image": "a.png",
            "outpaint": "1,1,1,1",
        },
        "an upscaler takes no steps; leave steps out": {"image": "a.png", "steps": 3},
        "this model enlarges images in all steps; leave strength out": {
            "image": "a.png",
            "strength": 0.5,
        },
        "sampler must be one of none, not 'ddim'": {"image": "a.png", "sampler": "ddim"},
        "control_image needs --controlnet": {"image": "a.png", "control_image": "a.png"},
        "this model enlarges images: give it image": {"prompt": "a cat"},
        "image must be text, not 7": {"image": 7},
    }
    rows = [*bad.values(), {"image": "one.png", "id": "tiny"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(job(tmp_path / "rows.jsonl", upscaler, tmp_path / "out")) == 0
    said = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    for reason, line in zip(bad, said, strict=True):
        assert reason in json.loads(line)["reason"]
    ((name, (_, pixels)),) = made(tmp_path / "out").items()
    assert (name, pixels.shape) == ("tiny", (2, 2, 3))


@pytest.mark.slow
def test_a_parquet_dataset_is_enlarged(upscaler, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na star\n")
    small, large = tmp_path / "small", tmp_path / "large"
    arguments = ["generate", "--manifest", str(tmp_path / "prompts.txt"), "--format=parquet"]
    assert cli.main([*arguments, "--model=shapes64-4step", "--output", str(small)]) == 0
    model = write_rrdb(tmp_path / "x4.safetensors")
    assert cli.main(job(small, model, large, "--format=parquet", "--image-format=webp")) == 0
    sources = {record["key"]: (record, pixels) for record, pixels in made(small).values()}
    found = made(large)
    assert found.keys() == sources.keys()
    for key, (record, pixels) in found.items():
        assert record["prompt"] == sources[key][0]["prompt"]
        np.testing.assert_array_equal(pixels, enlarged(model, sources[key][1]))


@pytest.mark.slow  # test_continuing.py has the same job
def test_a_job_that_is_stopped_or_extended_makes_the_same(upscaler, tmp_path, environment):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.fromarray(picture(8, 12, ord(name))).save(tmp_path / "in" / f"{name}.png")
    more = ("--num-images=25", "--images-per-shard=1", "--batch-size=1")
    whole, stopped, extended = (tmp_path / name for name in ("whole", "stopped", "extended"))
    assert cli.main(job(tmp_path / "in", upscaler, whole, *more)) == 0
    command = [sys.executable, "-m", "jaxdiff", *job(tmp_path / "in", upscaler, stopped, *more)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while not (stopped / names.DONE / "00001.json").exists():
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
    assert not (stopped / "_SUCCESS").exists()
    assert cli.main(job(tmp_path / "in", upscaler, stopped, *more)) == 0
    assert files(stopped) == files(whole)
    assert cli.main(job(tmp_path / "in", upscaler, extended, *more[1:], "--limit=1")) == 0
    assert made(extended).keys() == {"a.png"}
    assert cli.main(job(tmp_path / "in", upscaler, extended, *more[1:])) == 0
    both, first = made(extended), made(whole)
    assert both.keys() == first.keys() == {"a.png", "b.png"}
    for name, (record, _) in both.items():
        assert record["pixel_sha256"] == first[name][0]["pixel_sha256"]


@pytest.fixture
def transparent(tmp_path) -> Path:
    """Returns a folder of images of one size with all kinds of transparency, and opaque ones."""
    folder = tmp_path / "transparent"
    folder.mkdir()
    pixels = np.dstack([picture(12, 20, 0), np.full((12, 20), 255, np.uint8)])
    Image.fromarray(pixels).save(folder / "opaque.png")
    pixels[4:8, 2:9, 3] = 0
    pixels[9:, :, 3] = 100
    Image.fromarray(pixels).save(folder / "rgba.png")
    Image.fromarray(pixels).save(folder / "rgba.webp", lossless=True, exact=True)
    Image.fromarray(pixels).convert("LA").save(folder / "grey.png")
    color = tuple(map(int, pixels[5, 5, :3]))
    Image.fromarray(pixels[..., :3]).save(folder / "color.png", transparency=color)
    Image.fromarray(pixels[..., :3]).save(folder / "rgb.png")
    return folder


@pytest.mark.parametrize("image_format", ["png", "jpeg", further("webp")])
def test_transparency_is_enlarged(image_format, transparent, upscaler, tmp_path):
    option = f"--image-format={image_format}"
    assert cli.main(job(transparent, upscaler, tmp_path / "out", option)) == 0
    found = made(tmp_path / "out")
    assert len(found) == 6
    for name, (record, pixels) in found.items():
        stored = np.asarray(Image.open(transparent / name).convert("RGBA"))
        colors = enlarged(upscaler, stored[..., :3].copy())
        alpha = fitting.fitted(stored[..., 3].copy(), 24, 40)
        is_opaque = name in ("opaque.png", "rgb.png")
        whole = colors if is_opaque else np.dstack([colors, alpha])
        (ours,) = loaded(upscaler).generate([Request(prompt="", image=transparent / name)])
        np.testing.assert_array_equal(ours.pixels, whole)
        if image_format == "jpeg" and not is_opaque:
            shown = colors * (alpha[..., None] / 255) + 255 - alpha[..., None].astype(float)
            assert pixels.shape == colors.shape
            assert np.abs(shown - pixels).mean() < 4
        else:
            assert pixels.shape == whole.shape
        if image_format != "jpeg":
            np.testing.assert_array_equal(pixels, whole)
            assert record["pixel_sha256"] == image_files.pixel_sha256(whole)
    assert cli.main(["view", str(tmp_path / "out")]) == 0


def test_other_models_see_transparent_images_on_white(transparent, tiny_checkpoint):
    white = Image.new("RGBA", (20, 12), "white")
    shown = Image.alpha_composite(white, Image.open(transparent / "rgba.png")).convert("RGB")
    one, other = loaded(tiny_checkpoint).generate(
        [
            Request(prompt="", seed=1, steps=2, strength=0.5, image=image)
            for image in (transparent / "rgba.png", shown)
        ]
    )
    np.testing.assert_array_equal(one.pixels, other.pixels)
