"""An image depends only on its row, the model and the settings."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import jaxdiff
from jaxdiff import cli

# Two sizes, two samplers that draw noise at every step, guidance, images to begin with and masks,
# and several batches of each.
ROWS = [
    {"id": "from", "prompt": "a ring", "image": "a.png", "strength": 0.5, "num_images": 5},
    {"id": "from-b", "prompt": "a star", "image": "b.png", "strength": 0.5, "num_images": 2},
    {"id": "in", "prompt": "a ring", "image": "b.png", "mask_image": "mask.png", "num_images": 3},
    {"id": "ring", "prompt": "a ring", "num_images": 9, "guidance_scale": 3},
    {"id": "wide", "prompt": "a star", "num_images": 7, "width": 96, "sampler": "ddpm"},
    {"id": "not", "prompt": "a blue square", "negative_prompt": "a ring", "seeds": [5, 9, 5]},
    {
        "id": "wide-not",
        "prompt": "a cross",
        "negative_prompt": "star",
        "width": 96,
        "sampler": "ddpm",
    },
]
SHUFFLED = random.Random(0).sample(ROWS, len(ROWS))


@pytest.fixture(scope="module")
def generate(tmp_path_factory, tiny_checkpoint):
    """Returns a function that runs a job and returns the hash of each image's pixels."""
    folder = tmp_path_factory.mktemp("promises")
    random_pixels = np.random.default_rng(0)
    for name in ("a", "b"):
        picture = random_pixels.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{name}.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (20, 30, 50, 64))
    mask.save(folder / "mask.png")

    def generate(*arguments: str, rows: list = ROWS, directory: str | None = None) -> dict:
        manifest = folder / "rows.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        output = folder / (directory or f"out-{len(list(folder.iterdir()))}")
        said = {"manifest": manifest, "output": output, "model": tiny_checkpoint}
        said |= {"steps": 2, "sampler": "euler_ancestral"}
        options = [f"--{name}={value}" for name, value in said.items()]
        assert cli.main(["generate", *options, *arguments]) == 0
        assert cli.main(["verify", str(output)]) == 0
        return pixels(output)

    return generate


@pytest.fixture(scope="module")
def plain(generate) -> dict:
    return generate("--batch-size=1")


def pixels(directory: Path) -> dict[tuple[str, int], str]:
    rows = pq.read_table(directory / "metadata").to_pylist()
    return {(row["id"], row["image_index"]): row["pixel_sha256"] for row in rows}


def test_the_images_differ_from_each_other(plain):
    assert len(plain) == 30
    assert len({*plain.values()}) == 29  # one seed occurs twice
    assert plain["not", 0] == plain["not", 2]


@pytest.mark.parametrize(
    "more",
    [
        ["--batch-size=4", "--images-per-shard=4"],
        ["--batch-size=8", "--images-per-shard=8", "--workers=2"],
    ],
)
def test_batches_shards_and_workers_change_no_pixel(generate, plain, more):
    assert generate(*more) == plain


def test_the_order_of_the_rows_changes_no_pixel(generate, plain):
    assert generate("--batch-size=4", "--images-per-shard=3", rows=SHUFFLED) == plain


def test_extending_a_limited_job_changes_no_pixel(generate, plain):
    part = generate("--batch-size=4", "--limit=12", directory="limited")
    assert len(part) == 12
    assert generate("--batch-size=4", directory="limited") == plain


@pytest.mark.slow  # tests/devices/test_parallel.py has the quick one
def test_four_devices_make_the_pixels_of_one(generate, monkeypatch, capsys):
    # XLA uses at least as many threads as devices, so both runs get four threads.
    monkeypatch.setenv("NPROC", "4")
    plain = generate("--batch-size=3", directory="one")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert generate("--batch-size=3") == plain
    assert "on 4 x cpu" in capsys.readouterr().out


def test_the_bundled_model_makes_the_same_pixels_at_any_batch_size():
    model = jaxdiff.load("shapes64")
    requests = [
        jaxdiff.Request(prompt=prompt, seed=seed, steps=3, sampler="ddpm", negative_prompt="blue")
        for seed, prompt in enumerate(["a red circle", "two green rings", "a star"] * 4)
    ]
    alone = [model.generate([request], batch_size=1)[0].pixels for request in requests[:4]]
    made = [model.generate(requests, batch_size=size) for size in (1, 3, 8)]
    for images in made:
        for image, first in zip(images, made[0], strict=True):
            np.testing.assert_array_equal(image.pixels, first.pixels)
    np.testing.assert_array_equal([image.pixels for image in made[0][:4]], alone)
