"""The training loop: its checkpoints and exports, when it stops, and its messages."""

import fcntl
import os
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from PIL import Image
from small_runs import RECIPE, draw, lines, task, weights

import jaxdiff
from jaxdiff import cli
from jaxdiff.devices import parallel
from jaxdiff.errors import InputError
from jaxdiff.training import loop, train
from jaxdiff.training.recipe import Checkpoints

pytestmark = pytest.mark.usefixtures("compiled_faster")

CAPTIONS = f"""
objective = "text_encoder"
tokenizer = "{Path(jaxdiff.__file__).parent / "assets" / "shapes64" / "tokenizer"}"
steps = 100000
batch_size = 2

[optimizer]
learning_rate = 1e-3
schedule = "constant"

[checkpoints]
every = 2

[text_encoder]
vocab_size = 641
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 24
bos_token_id = 639
eos_token_id = 640
pad_token_id = 640
"""
LORA = """
objective = "text_to_image"
model = "{model}"
method = "lora"
steps = 2
batch_size = 1

[lora]
rank = 2
text_encoder = true

[optimizer]
learning_rate = 1e-3

[data]
path = "{data}"
"""


def steps_kept(output: Path) -> set[int]:
    return {int(path.name) for path in (output / "checkpoints").iterdir() if path.name.isdigit()}


@pytest.fixture(scope="module")
def best_in_the_middle(tmp_path_factory):
    """A run whose batches, from number 30 on, contradict the validation data."""
    output = tmp_path_factory.mktemp("best")

    def batch(number: int) -> dict:
        drawn = draw(1, number)
        return drawn if number < 30 else {**drawn, "wanted": -drawn["wanted"]}

    kept = Checkpoints(every=10, keep=2, keep_best=1)
    recipe = replace(RECIPE, steps=60, checkpoints=kept)
    loop.fit(task(batch), recipe, output)
    return recipe, output


def test_the_newest_and_the_best_checkpoints_are_kept(best_in_the_middle):
    _, output = best_in_the_middle
    validated = [line for line in lines(output) if "validation_loss" in line]
    losses = {line["validation_loss"]: line["step"] for line in validated[:-2]}
    best = losses[min(losses)]
    assert best in (30, 40)
    assert steps_kept(output) == {best, 50, 60}


def test_any_kept_checkpoint_can_be_exported(best_in_the_middle, tmp_path):
    recipe, output = best_in_the_middle
    best = loop.export(task(), recipe, output, "best", tmp_path / "some" / "where")
    last = loop.export(task(), recipe, output, "last", None)
    fifty = loop.export(task(), recipe, output, "50", None)
    assert (last.name, fifty.name) == ("model-000060", "model-000050")
    kernels = [np.load(folder / "weights.npz")["kernel"] for folder in (best, last, fifty)]
    np.testing.assert_array_equal(kernels[1], weights(output)["kernel"])
    assert len({kernel.tobytes() for kernel in kernels}) == 3


@pytest.mark.parametrize("which", ["10", "newest", "-1"])
def test_a_missing_checkpoint_is_named(which, best_in_the_middle):
    recipe, output = best_in_the_middle
    with pytest.raises(InputError, match=f"--export {which}: .* these steps: .*50, 60"):
        loop.export(task(), recipe, output, which, None)


def test_checkpoints_of_another_network_give_a_one_line_error(best_in_the_middle):
    recipe, output = best_in_the_middle
    other = replace(task(), params={"kernel": np.zeros((8, 8), np.float32)})
    with pytest.raises(InputError, match="not a checkpoint of this recipe's networks") as caught:
        loop.fit(other, recipe, output)
    assert "\n" not in str(caught.value)


def test_a_nan_loss_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    def batch(number: int) -> dict:
        drawn = draw(1, number)
        return drawn if number != 13 else {**drawn, "inputs": drawn["inputs"] * np.float32("nan")}

    recipe = replace(
        RECIPE,
        checkpoints=Checkpoints(every=3),
        optimizer=replace(RECIPE.optimizer, accumulate=2),
    )
    for _ in range(2):  # the same command fails in the same way
        with pytest.raises(loop.Interrupted, match=r"step 7, batches 12 to 13: the loss is nan"):
            loop.fit(task(batch), recipe, tmp_path)
    assert steps_kept(tmp_path) == {3, 6}
    assert not (tmp_path / "model").exists()


def test_accumulated_batches_equal_one_larger_batch(tmp_path):
    one = replace(
        RECIPE, steps=4, optimizer=replace(RECIPE.optimizer, name="sgd", learning_rate=0.1)
    )
    three = replace(one, optimizer=replace(one.optimizer, accumulate=3))

    def together(number: int) -> dict:
        parts = [draw(1, 3 * number + part) for part in range(3)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    for name, recipe, batch in (
        ("one", replace(one, batch_size=12), together),
        ("three", three, lambda number: draw(1, number)),
    ):
        (tmp_path / name).mkdir()
        loop.fit(task(batch, noise_scale=0.0), recipe, tmp_path / name)
    for one, three in zip(
        weights(tmp_path / "one").values(), weights(tmp_path / "three").values(), strict=True
    ):
        np.testing.assert_allclose(one, three, atol=1e-6)
        assert (one != 0).any()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from asyncio
def test_the_error_for_a_full_disk_names_the_checkpoints(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, hard)
    )  # a file size limit acts like a full disk
    try:
        with pytest.raises(OSError, match="cannot write a checkpoint") as caught:
            loop.fit(task(), replace(RECIPE, steps=2), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "checkpoints")
    assert caught.value.strerror == "cannot write a checkpoint: File too large"
    assert steps_kept(tmp_path) == set()


def test_the_error_of_a_batch_is_reported_unchanged(tmp_path):
    def batch(number: int) -> dict:
        if number == 5:
            raise InputError("data/7.png: does not decode")
        return draw(1, number)

    message = r"^step 6: data/7\.png: does not decode; .* run the same command again$"
    with pytest.raises(loop.Interrupted, match=message):
        loop.fit(task(batch), RECIPE, tmp_path)


def test_a_nan_validation_loss_names_no_batch(tmp_path):
    wrong = {name: array * np.float32("nan") for name, array in draw(2, 0).items()}
    with pytest.raises(loop.Interrupted, match=r"^step 20: the validation loss is nan") as caught:
        loop.fit(replace(task(), validation=[wrong]), RECIPE, tmp_path)
    assert "batch" not in str(caught.value)


def test_fully_sharded_arrays_are_split_along_their_largest_divisible_axis():
    mesh = AbstractMesh((4, 1), ("data", "model"))
    shapes = {"kernel": (3, 3, 8, 64), "odd": (3, 5), "wide": (8, 5), "count": ()}
    arrays = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    specs = {name: found.spec for name, found in parallel.fully_sharded(mesh, arrays).items()}
    assert specs == {
        "kernel": PartitionSpec(None, None, None, "data"),
        "odd": PartitionSpec(),
        "wide": PartitionSpec("data"),
        "count": PartitionSpec(),
    }


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder and the exit code of a run that SIGTERM has stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "recipe.toml").write_text(CAPTIONS)

    def stop() -> None:
        while not (folder / "run" / "samples" / "000004.png").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    return folder, command(folder)


def command(folder: Path, *options: str) -> int:
    arguments = [str(folder / "recipe.toml"), "--output", str(folder / "run"), *options]
    return cli.main(["train", *arguments])


def test_sigterm_saves_and_exits_with_75(stopped):
    folder, code = stopped
    assert code == 75
    assert max(steps_kept(folder / "run")) >= 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_command_exports_a_checkpoint_of_an_unfinished_run(stopped, capsys):
    folder, _ = stopped
    assert command(folder, "--export", "best", "--to", str(folder / "best")) == 0
    assert capsys.readouterr().out.strip() == str(folder / "best")
    assert any((folder / "best").rglob("*.safetensors"))
    assert command(folder, "--export", "7000") == 2
    assert "7000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate = 1e-3", "learning_rate = 2e-3", "optimizer.learning_rate was 0.001, is"),
        ("hidden_size = 16", "hidden_size = 32", "text_encoder.hidden_size was 16, is 32"),
        ("steps = 100000", "steps = 9", "steps was 100000, is 9"),
        ("batch_size = 2", "batch_size = 2\nseed = 1", "seed was 0, is 1"),
    ],
)
def test_another_recipe_is_rejected_and_the_difference_named(old, new, message, stopped, tmp_path):
    folder, _ = stopped
    (tmp_path / "recipe.toml").write_text(CAPTIONS.replace(old, new, 1))
    with pytest.raises(InputError, match="contains a run of another recipe") as caught:
        train.train(tmp_path / "recipe.toml", folder / "run")
    assert message in str(caught.value)


def test_a_run_with_a_constant_learning_rate_can_be_prolonged(tmp_path):
    for steps, kept in ((2, 2), (4, 1)):
        text = CAPTIONS.replace("steps = 100000", f"steps = {steps}")
        text = text.replace("every = 2", f"every = 2\nkeep = {kept}\nkeep_best = 0")
        (tmp_path / "recipe.toml").write_text(text)
        assert command(tmp_path) == 0
    assert steps_kept(tmp_path / "run") == {4}
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 4]


def test_a_diverged_run_exits_with_1_and_one_line(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(CAPTIONS.replace("1e-3", "1e37"))
    assert command(tmp_path) == 1
    *_, line = [row for row in capsys.readouterr().err.splitlines() if row.startswith("jaxdiff: ")]
    assert "step 2: the validation loss is nan" in line
    assert "learning_rate" in line


def test_an_undecodable_image_makes_a_run_exit_with_1(tiny_checkpoint, tmp_path, capsys):
    """Once the image is repaired, the same command continues."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(picture).save(folder / "0.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a star"}\n')
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[:2000])
    (tmp_path / "recipe.toml").write_text(LORA.format(model=tiny_checkpoint, data=folder))
    assert command(tmp_path) == 1
    (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("jaxdiff: ")]
    assert "0.png" in line
    assert "step 1" in line
    (folder / "0.png").write_bytes(whole)
    assert command(tmp_path) == 0
    lora = tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors"
    model = jaxdiff.load(tiny_checkpoint, lora=[str(lora)])
    (image,) = model.generate([jaxdiff.Request(prompt="a star", steps=2)])
    assert image.finite


def test_two_processes_cannot_train_into_one_directory(stopped):
    folder, _ = stopped
    with (folder / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is training here"):
            train.train(folder / "recipe.toml", folder / "run")


def test_exporting_without_a_run_gives_a_one_line_error(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(CAPTIONS)
    assert command(tmp_path, "--export", "last") == 2
    assert "contains no run" in capsys.readouterr().err
    assert command(tmp_path, "--to", "there") == 2
    assert not (tmp_path / "run").exists()
