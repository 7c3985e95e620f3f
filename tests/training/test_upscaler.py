"""Training of GAN upscalers: batches, damage, both networks in one loop, the resulting file."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

import jaxdiff
from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.models.discriminator import Discriminator, largest_singular_value
from jaxdiff.training import checkpoints, recipe, upscaler
from jaxdiff.training.data.degradation import degraded
from jaxdiff.training.recipe import Checkpoints, Degradation
from jaxdiff.training.train import train

pytestmark = pytest.mark.usefixtures("compiled_faster")

RECIPE = """
objective = "upscaler"
steps = 4
batch_size = 5
crop = 8
adversarial_weight = 0.1
discriminator_features = 4

[srvgg]
features = 6
convs = 1
scale = 2

[optimizer]
learning_rate = 1e-3
schedule = "constant"
warmup_steps = 0

[checkpoints]
every = 2

[degradation]
rounds = 0
"""
TABLE = RECIPE[RECIPE.index("[srvgg]") : RECIPE.index("[optimizer]")]
WHOLE = Degradation(rounds=2, blur=2.0, resize=0.5, noise=30.0, jpeg=30)


def written(folder: Path, *changes: tuple[str, str]) -> Path:
    text = RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


def made(folder: Path, *changes: tuple[str, str]):
    """The task of the recipe with changes."""
    return upscaler.task(recipe.read(written(folder, *changes)))


def gradients(task) -> dict:
    gradient = compilation.jit(
        jax.grad(lambda params, batch: task.loss(params, {}, batch, None)[0])
    )
    return gradient(task.params, task.batch(0))


def assert_close(tree: dict, other: dict, **bounds) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **bounds), tree, other)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("upscaler")
    train(written(folder), folder / "run")
    return folder / "run"


def state(run: Path, step: int) -> dict:
    """All that a checkpoint holds: both networks, their averages, the optimizer's moments."""
    with checkpoints.opened(run / "checkpoints", Checkpoints(), read_only=True) as manager:
        return manager.restore(step)["state"]


@pytest.mark.slow  # test_resume.py has the same loop
def test_a_continued_run_ends_with_the_same_weights_of_both_networks(run, tmp_path):
    train(written(tmp_path, ("steps = 4", "steps = 2")), tmp_path / "run")
    train(written(tmp_path), tmp_path / "run")
    whole, continued = state(run, 4), state(tmp_path / "run", 4)
    assert whole["params"].keys() == {"generator", "discriminator"}
    jax.tree.map(np.testing.assert_array_equal, whole, continued)
    for network in whole["params"].values():  # neither stands still
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(network))
    lines = [
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (run, tmp_path / "run")
    ]
    assert [line["discriminator_loss"] for line in lines[0]] == [
        line["discriminator_loss"] for line in lines[1]
    ]


def test_the_result_is_one_file_that_enlarges_images(run):
    file = run / "model" / "upscaler.safetensors"
    weights = load_file(file)
    assert {name: weight.shape for name, weight in weights.items()} == {
        "body.0.weight": (6, 3, 3, 3),
        "body.0.bias": (6,),
        "body.1.weight": (6,),
        "body.2.weight": (6, 6, 3, 3),
        "body.2.bias": (6,),
        "body.3.weight": (6,),
        "body.4.weight": (12, 6, 3, 3),
        "body.4.bias": (12,),
    }
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8)
    (image,) = jaxdiff.load(file).generate([jaxdiff.Request(prompt="", image=pixels)])
    assert image.pixels.shape == (20, 28, 3)
    nearest = pixels.repeat(2, axis=0).repeat(2, axis=1).astype(int)
    assert np.abs(image.pixels - nearest).mean() < 10  # after four small steps


def test_a_second_recipe_begins_with_the_model_of_a_first(run, tmp_path):
    file = run / "model" / "upscaler.safetensors"
    task = made(tmp_path, (TABLE, ""), ("steps = 4", f'steps = 4\nmodel = "{file}"'))
    body = task.params["generator"]["body"]
    stored = load_file(file)
    np.testing.assert_array_equal(body[1]["weight"], stored["body.1.weight"])
    kernel = stored["body.2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(body[2]["kernel"], kernel)


def test_each_network_learns_from_its_own_part_of_the_loss(tmp_path):
    weight = "adversarial_weight = 0.1"
    alone = gradients(made(tmp_path, (weight, ""), ("discriminator_features = 4", "")))
    some, more = (
        gradients(made(tmp_path, (weight, f"adversarial_weight = {value}"))) for value in (0.1, 0.2)
    )
    assert_close(some["discriminator"], more["discriminator"], rtol=1e-5, atol=1e-7)

    def added(found: dict) -> dict:
        return jax.tree.map(jnp.subtract, found["generator"], alone["generator"])

    twice = jax.tree.map(lambda leaf: 2 * leaf, added(some))
    assert_close(added(more), twice, rtol=1e-2, atol=1e-6)
    assert any(float(jnp.abs(leaf).max()) > 1e-5 for leaf in jax.tree.leaves(twice))


def test_an_upscaler_learns_its_world(tmp_path):
    changes = (
        ("adversarial_weight = 0.1\ndiscriminator_features = 4", ""),
        ("learning_rate = 1e-3", 'learning_rate = 3e-3\nname = "muon"'),
        ("steps = 4", "steps = 120"),
        ("every = 2", "every = 60"),
        ("features = 6", "features = 16"),
        ("batch_size = 5", "batch_size = 16"),
    )
    train(written(tmp_path, *changes), tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line["validation_loss"] for line in lines if "validation_loss" in line)
    begun = made(tmp_path, *changes)
    nearest = np.mean([begun.loss(begun.params, {}, b, None)[0] for b in begun.validation])
    assert last < 0.9 * nearest
    assert last < first


def test_batches_depend_on_their_number_alone(tmp_path):
    one, again = (made(tmp_path, ("rounds = 0", "rounds = 2")) for _ in range(2))
    for name in ("small", "large"):
        np.testing.assert_array_equal(one.batch(3)[name], again.batch(3)[name])
        assert (one.batch(3)[name] != one.batch(4)[name]).any()
    assert one.batch(0)["small"].shape == (5, 8, 8, 3)
    assert one.batch(0)["large"].shape == (5, 16, 16, 3)


def test_small_images_show_what_the_large_ones_show(tmp_path):
    batch = made(tmp_path, ("crop = 8", "crop = 32")).batch(0)
    means = batch["large"].reshape(5, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(batch["small"] - means).mean() < 1  # both are drawn, at different sizes
    assert np.abs(batch["small"][:, :, ::-1] - means).mean() > 10


def test_a_folder_of_images_is_cut_and_shrunk(tmp_path):
    y, x = np.mgrid[:40, :50] * 4
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.stack([x, y, x + y], axis=-1).astype(np.uint8)).save(folder / "a.png")
    batch = made(tmp_path, ("steps = 4", f'steps = 4\nimages = "{folder}"')).batch(0)
    means = batch["large"].reshape(5, 8, 2, 8, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(batch["small"], means, atol=0.51)
    assert len({image.tobytes() for image in batch["large"]}) > 1
    Image.new("RGB", (15, 40)).save(folder / "a.png")
    with pytest.raises(InputError, match=r"a\.png is smaller than .* 16 px"):
        made(tmp_path, ("steps = 4", f'steps = 4\nimages = "{folder}"'))


def test_damage_grows_with_its_settings(tmp_path):
    image = upscaler._batch(
        upscaler._large_images(recipe.read(written(tmp_path)), 4),
        dataclasses.replace(recipe.read(written(tmp_path)), batch_size=1, crop=32),
        4,
        np.random.default_rng(1),
    )["large"][0]
    clean = degraded(image, 32, 32, Degradation(rounds=0), np.random.default_rng(0))

    def error(how: Degradation) -> float:
        found = [degraded(image, 32, 32, how, np.random.default_rng(seed)) for seed in range(20)]
        assert all(each.shape == (32, 32, 3) and each.dtype == np.uint8 for each in found)
        return np.mean([np.abs(each - clean.astype(float)).mean() for each in found])

    slight = Degradation(rounds=1, blur=0.2, resize=0.9, noise=1.0, jpeg=90)
    assert error(Degradation(rounds=0)) == 0
    assert 0 < error(slight) < error(WHOLE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("features = 6", "feature = 6", r"srvgg\.feature: unknown key; did you mean features"),
        ("features = 6", 'features = "6"', r"srvgg\.features must be a whole number"),
        ("features = 6", "features = 0", r"srvgg\.features must be at least 1, not 0"),
        (
            "[srvgg]\nfeatures = 6\nconvs = 1\nscale = 2",
            "",
            r"names none of model, \[srvgg\] and \[rrdb\]; name one",
        ),
        (TABLE, "[rrdb]\nscale = 3\n\n", r"rrdb\.scale must be 1, 2 or 4, not 3"),
        ("crop = 8", "crop = 7", "crop = 7 must be a multiple of 4"),
        ("steps = 4", 'steps = 4\nimages = "/nowhere"', "/nowhere.* is no folder of images"),
        ("steps = 4", 'steps = 4\nmodel = "shapes64"', "names model and srvgg of model"),
    ],
)
def test_bad_recipes_give_one_line_errors(old, new, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        train(written(tmp_path, (old, new)), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_no_upscaler_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"shapes64.* no upscaler"):
        made(tmp_path, (TABLE, ""), ("steps = 4", 'steps = 4\nmodel = "shapes64"'))


def test_the_discriminator_judges_each_pixel():
    judge = Discriminator(4, rngs=nnx.Rngs(0))
    images = jax.random.uniform(jax.random.key(0), (2, 24, 16, 3))
    logits = judge(images)
    assert logits.shape == (2, 24, 16, 1)
    changed = judge(images.at[0, 2, 3].add(0.5))
    np.testing.assert_array_equal(changed[1], logits[1])
    assert abs(float(changed[0, 2, 3, 0] - logits[0, 2, 3, 0])) > 1e-6


def test_kernels_are_divided_by_their_largest_singular_value():
    matrix = jax.random.normal(jax.random.key(0), (16, 1)) * jnp.linspace(1, 3, 8)
    matrix += 0.3 * jax.random.normal(jax.random.key(1), (16, 8))
    assert float(largest_singular_value(matrix)) == pytest.approx(
        float(jnp.linalg.norm(matrix, ord=2)), rel=1e-2
    )


def test_validation_measures_the_generator_alone(run):
    """On the average weights; the discriminator's loss alone is about 1.4."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "validation_loss" in line):
        assert 0 < line["validation_loss"] < 0.6 < line["discriminator_loss"] < line["loss"]
    assert "validation_loss" in lines[-1]
