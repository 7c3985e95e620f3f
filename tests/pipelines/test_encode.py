"""Encoding once equals encoding at every step, and can be killed at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff import cli
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint
from jaxdiff.families.model import networks_of
from jaxdiff.images import fitting
from jaxdiff.training.data import batches, buckets, check_encoders, encoded, open_examples
from jaxdiff.training.data.encoded import EncodedExamples
from jaxdiff.training.recipe import Data
from jaxdiff.weights.load import load_params, places
from pipelines import jobs

SIZES = [(80, 64), (64, 64), (64, 96), (70, 70)] * 5  # height, width
ASPECT_RATIOS = 2.0


@pytest.fixture(scope="module", autouse=True)
def _fast(compiled_fast):
    """Compiles fast: no test here depends on the exact bits that users get."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for number, (height, width) in enumerate(SIZES):
        random = np.random.default_rng(number)
        coarse = random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": f"photo {number}", "tags": "red"}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


@pytest.fixture
def environment(environment) -> dict[str, str]:
    """Returns the environment for processes that compile like this one."""
    return environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def command(photos: Path, checkpoint: Path, output: Path, *more: str) -> list[str]:
    said = {"data": photos, "model": checkpoint, "output": output, "images-per-shard": 5}
    said |= {"aspect-ratios": ASPECT_RATIOS}
    return ["encode", *(f"--{name}={value}" for name, value in said.items()), *more]


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(photos, tiny_checkpoint, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("encoded") / "out"
    assert cli.main(command(photos, tiny_checkpoint, output, "--embed")) == 0
    return output


def text_params(checkpoint) -> dict:
    shapes = networks_of(checkpoint).networks["text_encoder"].shapes
    return {
        "text_encoder": load_params(places(shapes, np.float32), checkpoint.weights("text_encoder"))
    }


def test_latents_match_the_images(finished, photos, tiny_checkpoint):
    images = open_examples(Data(path=str(photos)))
    latents = open_examples(Data(path=str(finished)))
    assert isinstance(latents, EncodedExamples)
    assert len(latents) == len(images)
    checkpoint = open_checkpoint(tiny_checkpoint)
    model = networks_of(checkpoint)
    config, network = model.configs["vae"], model.networks["vae"]
    params = load_params(places(network.shapes, np.float32), checkpoint.weights("vae"))
    check_encoders(latents, config, {"vae": params} | text_params(checkpoint))
    params["encoder"]["conv_in"]["bias"] += 1
    with pytest.raises(InputError, match="not encoded by the autoencoder of this model"):
        check_encoders(latents, config, {"vae": params} | text_params(checkpoint))
    params["encoder"]["conv_in"]["bias"] -= 1
    encode = jax.jit(lambda pixels: network(params).encode(pixels / 127.5 - 1.0))
    for index in (0, 7, 19):
        number = int(latents.caption(index).split()[1])
        height, width = latents.sizes[index]
        pixels = fitting.fitted(images.pixels(number), height, width)
        mean, log_variance = encode(jnp.asarray(pixels[None], jnp.float32))
        expected = config.scaling_factor * np.stack([mean[0], jnp.exp(0.5 * log_variance[0])])
        found = np.stack(latents.posterior(index))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)  # float16


def test_every_image_occurs_once_in_its_bucket(finished):
    latents = open_examples(Data(path=str(finished)))
    captions = sorted(latents.caption(index) for index in range(len(latents)))
    assert captions == sorted(f"photo {number}" for number in range(len(SIZES)))
    assert set(map(tuple, latents.sizes.tolist())) <= set(buckets(64, ASPECT_RATIOS, 16))
    assert len(set(map(tuple, latents.sizes.tolist()))) > 1


def test_embeddings_match_the_captions(finished, tiny_checkpoint):
    from jaxdiff.training.data.encoder import Encoder

    latents = open_examples(Data(path=str(finished)))
    encoder = Encoder(open_checkpoint(tiny_checkpoint), embed=True)
    (context,) = encoder.embeddings([latents.caption(11)]).values()
    np.testing.assert_allclose(latents.embedding(11)["context"], context[0], rtol=1e-3, atol=1e-3)
    (context,) = encoder.embeddings([""]).values()
    np.testing.assert_allclose(latents.empty["context"], context[0], rtol=1e-3, atol=1e-3)
    assert latents.made_with == encoder.made_with


def test_batches_draw_from_the_posterior_by_seed_and_step(finished):
    latents = open_examples(Data(path=str(finished)))
    sizes = buckets(64, ASPECT_RATIOS, 16)
    batch = batches(latents, batch_size=4, seed=1, sizes=sizes)
    one, again, other = batch(3), batch(3), batch(4)
    assert one["latents"].dtype == np.float32
    np.testing.assert_array_equal(one["latents"], again["latents"])
    assert one["captions"] == again["captions"] != other["captions"]
    assert one["context"].shape == (4, *latents.empty["context"].shape)
    where = {latents.caption(index): index for index in range(len(latents))}
    for drawn, caption in zip(one["latents"], one["captions"], strict=True):
        mean, std = latents.posterior(where[caption])
        assert 0.7 < np.std((drawn - mean) / std) < 1.3
    with pytest.raises(InputError, match="which is not a size of this recipe"):
        batches(latents, batch_size=4, seed=1, sizes=[(32, 32)])
    with pytest.raises(InputError, match="cannot be mirrored"):
        batches(latents, batch_size=4, seed=1, sizes=sizes, flip=True)


def test_a_killed_job_continues_to_the_same_bytes(
    tmp_path, finished, photos, tiny_checkpoint, environment
):
    arguments = command(photos, tiny_checkpoint, tmp_path / "out", "--embed")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.encode", *arguments[1:]],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(tmp_path.glob("out/data/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    made = files(tmp_path / "out")
    assert encoded.INDEX not in made
    with pytest.raises(InputError, match="not fully encoded"):
        open_examples(Data(path=str(tmp_path / "out")))
    assert cli.main(arguments) == 0
    assert files(tmp_path / "out") == files(finished)


def test_a_stopped_job_continues_to_the_same_bytes(
    tmp_path, capsys, monkeypatch, finished, photos, tiny_checkpoint
):
    arguments = command(photos, tiny_checkpoint, tmp_path / "out", "--embed")
    rename = os.replace

    def rename_and_stop(*paths) -> None:
        rename(*paths)
        os.kill(os.getpid(), signal.SIGTERM)
        assert jobs.stopping.wait(timeout=60)
        monkeypatch.undo()

    monkeypatch.setattr(os, "replace", rename_and_stop)
    assert cli.main(arguments) == 75
    assert "run the same command to continue" in capsys.readouterr().err
    assert len(list((tmp_path / "out/data").iterdir())) == 1
    assert cli.main(arguments) == 0
    assert files(tmp_path / "out") == files(finished)


def test_a_finished_job_does_nothing_but_remake_missing_shards(
    tmp_path, capsys, finished, photos, tiny_checkpoint
):
    before = files(finished)
    arguments = command(photos, tiny_checkpoint, finished, "--embed")
    assert cli.main(arguments) == 0
    assert "already encoded" in capsys.readouterr().out
    (finished / "data/00001.safetensors").unlink()
    assert cli.main(arguments) == 0
    assert files(finished) == before


def test_another_encoding_is_rejected(capsys, finished, photos, tiny_checkpoint):
    before = files(finished)
    arguments = command(photos, tiny_checkpoint, finished, "--embed", "--captions=tags")
    assert cli.main(arguments) == 2
    assert "captions '' -> 'tags'" in capsys.readouterr().err
    assert files(finished) == before


def test_invalid_input_is_one_line_and_leaves_no_files(tmp_path, capsys, photos, tiny_checkpoint):
    output = tmp_path / "out"
    for more, said in {
        ("--size=50",): "a size of 50 must be a multiple of 16",
        ("--size=512",): "choose a smaller size",
        ("--data=/nowhere",): "/nowhere: image folder not found",
        ("--captions=title",): "no text in title",
        ("--aspect-ratios=0.5",): "must be 1 or more",
        ("--images-per-shard=0",): "at least 1",
        ("--sizes=64",): "unknown option --sizes",
    }.items():
        assert cli.main(command(photos, tiny_checkpoint, output, *more)) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not output.exists()
    output.mkdir()
    (output / "mine.txt").touch()
    assert cli.main(command(photos, tiny_checkpoint, output)) == 2
    assert "holds other files" in capsys.readouterr().err


def test_an_unreadable_image_stops_the_job_and_is_named(tmp_path, capsys, photos, tiny_checkpoint):
    broken = tmp_path / "photos"
    broken.mkdir()
    for path in photos.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    whole = (broken / "3.png").read_bytes()
    (broken / "3.png").write_bytes(whole[:-100])
    arguments = command(broken, tiny_checkpoint, tmp_path / "out", "--embed")
    code = cli.main(arguments)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert "3.png is not a readable image" in error
    (broken / "3.png").write_bytes(whole)
    assert cli.main(arguments) == 0
