"""Jobs of two passes: `--upscale latent`."""

import json

import numpy as np
import pytest
from making import files
from PIL import Image
from test_upscale_jobs import made

import jaxdiff
from jaxdiff import cli
from jaxdiff.families import operations
from jaxdiff.families.opening import open_ensemble
from jaxdiff.families.second_pass import SecondPass
from jaxdiff.request import Options, Request

pytestmark = pytest.mark.usefixtures("compiled_fast")

UPSCALE = "latent:1.5,strength=0.5"


@pytest.fixture
def command(tiny_checkpoint, tmp_path):
    """Returns a function that makes a command for a manifest with these rows."""

    def command(output: str, rows: list[dict], *more: str) -> list[str]:
        manifest = tmp_path / "rows.jsonl"
        manifest.write_text("\n".join(map(json.dumps, rows)))
        model = ["--model", str(tiny_checkpoint), "--steps=4", "--upscale", UPSCALE]
        start = ["generate", "--manifest", str(manifest), "--output", str(tmp_path / output)]
        return [*start, *model, *more]

    return command


def test_a_job_makes_what_the_model_makes(command, tiny_checkpoint, tmp_path, capsys):
    rows = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate("abcde")]
    assert cli.main(command("out", rows)) == 0
    images = made(tmp_path / "out")
    model = jaxdiff.load(tiny_checkpoint, upscale=UPSCALE)
    alone = [model.generate([Request(**row, steps=4)])[0].pixels for row in rows]
    plain = jaxdiff.load(tiny_checkpoint).generate([Request(**rows[0], steps=4)])[0].pixels
    for (record, pixels), wanted in zip(images.values(), alone, strict=True):
        np.testing.assert_array_equal(pixels, wanted)
        sides = record["width"], record["upscaled_width"], record["upscaled_height"]
        assert sides == (64, 96, 96)
        assert "upscale=latent:1.5 with strength 0.5" in record["options"]
    small = np.asarray(Image.fromarray(alone[0]).resize((64, 64), Image.Resampling.BOX), int)
    unlike = np.abs(np.asarray(alone[1][::2, ::2], int)[:48, :48] - small[:48, :48]).mean()
    assert np.abs(small - plain).mean() < unlike
    capsys.readouterr()
    assert cli.main([*command("out", rows)[:-1], "latent:1.5,strength=0.6"]) == 2
    assert "holds another run (model" in capsys.readouterr().err


def test_operations_of_both_passes_are_counted(tiny_checkpoint):
    once, twice = (open_ensemble(tiny_checkpoint, upscale=each) for each in (None, UPSCALE))
    request = Request(prompt="", width=64, height=64, steps=4, guidance_scale=1.0, sampler="ddim")
    bucket = twice.with_images(request).bucket
    first, second = twice.passes(Options(), bucket)
    assert (first.begin, second.begin, second.windows.count) == (0, 2, 4)
    assert (second.bucket.width, second.bucket.height) == (64, 64)
    base, factor = once.base, once.base.defaults.factor
    evaluation, _ = base.family.operations(base, 64 // factor, 64 // factor, base.defaults.tokens)
    small, large = (
        base.family.decoder_operations(base, *[side // factor] * 2) for side in (64, 96)
    )
    counts = [operations.of_image(each, Options(), bucket) for each in (once, twice)]
    assert counts[1] - counts[0] == 4 * 2 * evaluation + large - small


@pytest.mark.usefixtures("noisy")
def test_rows_that_cannot_be_made_in_two_passes_are_rejected_alone(command, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    image = {"image": "a.png", "mask_image": "a.png"}
    rows = [
        {"prompt": "a", "seed": 1},
        {"prompt": "b", "width": 72},
        {"prompt": "c", "steps": 1},
        {"prompt": "d", **image},
        {"prompt": "e", "width": 8000},
        {"prompt": "f", "image": "a.png", "seed": 2},
    ]
    assert cli.main(command("out", rows)) == 0
    assert len(made(tmp_path / "out")) == 2
    text = (tmp_path / "out" / "rejected.jsonl").read_text()
    reasons = [json.loads(line)["reason"] for line in text.splitlines()]
    assert reasons == [
        "width = 72 becomes 108 with --upscale latent:1.5; it must become a multiple of 8 up to "
        "8192",
        f"--upscale {UPSCALE} takes none of 1 steps again; raise one of them",
        "--upscale latent changes all of an image; use no mask or outpaint",
        "width = 8000 becomes 12000 with --upscale latent:1.5; it must become a multiple of 8 up "
        "to 8192",
    ]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("latent", "--upscale latent: write it as latent:1.5 or latent:1.5,strength=0.4"),
        ("latent:2,stength=0.4", "write it as latent:1.5 or latent:1.5,strength=0.4"),
        ("latent:nine", "the factor must be a number from 1 to 8, not 'nine'"),
        ("latent:2,strength=7", "strength must be a number from 0 to 1, not '7'"),
    ],
)
def test_a_second_pass_is_written_in_one_way(said, reason, command, tmp_path, capsys):
    assert cli.main([*command("out", [{"prompt": "a"}])[:-1], said]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert files(tmp_path / "out") == {}


def test_models_that_enlarge_images_have_no_second_pass(tmp_path, capsys):
    arguments = ["generate", "--model=shapes64-x4", "--output", str(tmp_path / "out")]
    manifest = tmp_path / "a.txt"
    manifest.write_text("a\n")
    arguments += ["--manifest", str(manifest), "--upscale", UPSCALE]
    assert cli.main(arguments) == 2
    assert "--upscale latent needs a model that makes images of text alone" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_deep_features_are_reused_in_their_own_windows(tiny_checkpoint):
    """Those of another window would be far off; the images are the same beside others."""
    requests = [Request(prompt=prompt, seed=5, steps=8) for prompt in "ab"]
    made = {}
    for every in (1, 2):
        model = jaxdiff.load(tiny_checkpoint, upscale="latent:2,strength=1", deep_cache=every)
        made[every] = model.generate(requests)
        (alone,) = model.generate(requests[1:])
        np.testing.assert_array_equal(made[every][1].pixels, alone.pixels)
    whole, reused = (np.stack([i.pixels for i in made[every]]).astype(int) for every in (1, 2))
    assert whole.shape == (2, 128, 128, 3)
    assert 0 < np.abs(whole - reused).mean() < np.abs(whole[0] - whole[1]).mean() / 2


def test_the_default_strength():
    ensemble = open_ensemble("shapes64", upscale="latent:2")
    assert ensemble.second_pass == SecondPass(2, 0.4)
    assert ensemble.fingerprint != open_ensemble("shapes64").fingerprint
