"""The denoiser's objective: the loss of a batch, its noise levels, and the trained parameters."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.devices import compilation
from jaxdiff.diffusion import objective
from jaxdiff.diffusion.samplers import FLOW_CLASS
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.errors import InputError
from jaxdiff.training import components, noise_levels, text_to_image
from jaxdiff.training.recipe import Computing, Data, Lora, Loss, Optimizer, TextToImageRecipe
from jaxdiff.training.shapes import scenes
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.scene import CANVAS

pytestmark = pytest.mark.usefixtures("compiled_faster")

EVERY_PAIR = tuple(f"{color} {shape}" for color in shapes.COLORS for shape in shapes.SHAPES)
FLOW = {"_class_name": FLOW_CLASS, "num_train_timesteps": 1000, "shift": 3.0}
EPSILON = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}


UNET = {  # the smallest with all parts, because it is compiled often
    "sample_size": 8,
    "block_out_channels": [32],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


def recipe(model, folder, **changes) -> TextToImageRecipe:
    return TextToImageRecipe(
        objective="text_to_image",
        steps=2,
        batch_size=4,
        optimizer=Optimizer(1e-3),
        model=str(model),
        unet=UNET,
        data=Data(path=str(folder)),
        **changes,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with images of eight scenes."""
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    with (path / "metadata.jsonl").open("w") as file:
        for number in range(8):
            scene, caption = shapes.sample(rng)
            Image.fromarray(shapes.render(scene)).save(path / f"{number}.png")
            file.write(json.dumps({"file_name": f"{number}.png", "text": caption}) + "\n")
    return path


def arguments(task, **beside) -> tuple:
    """What the loss of a batch is a function of."""
    latents = np.random.default_rng(1).standard_normal((4, 8, 8, 4)).astype(np.float32)
    batch = {"latents": latents, "token_ids": task.batch(0)["token_ids"], **beside}
    return task.params, task.frozen, batch, jax.random.key(0)


def gradients(recipe: TextToImageRecipe, output: Path):
    """Returns the loss of a batch, the logged values and the gradient."""
    task = text_to_image.task(recipe, output)
    function = compilation.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, logged), gradient = function(*arguments(task))
    return float(loss), logged, gradient


def loss_of(recipe: TextToImageRecipe, output: Path, **beside) -> float:
    """Returns the loss alone, whose program is small."""
    task = text_to_image.task(recipe, output)
    loss, _ = compilation.jit(task.loss)(*arguments(task, **beside))
    return float(loss)


@pytest.fixture(scope="module")
def plain(tiny_checkpoint, folder, tmp_path_factory):
    return gradients(recipe(tiny_checkpoint, folder), tmp_path_factory.mktemp("plain"))


def test_the_losses_of_the_noise_levels_add_up_to_the_batchs(plain):
    loss, logged, _ = plain
    sums, counts = np.asarray(logged["by_noise_level"])
    assert counts.sum() == 4
    assert sums.sum() / counts.sum() == pytest.approx(loss, rel=1e-5)


def test_only_the_unet_is_trained_by_default(plain, tiny_checkpoint, folder, tmp_path):
    assert set(plain[2]) == {"unet"}
    both = recipe(tiny_checkpoint, folder, train=("unet", "text_encoder"))
    gradient = gradients(both, tmp_path)[2]
    leaves = jax.tree.leaves(gradient["text_encoder"]["encoder"])
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in leaves if leaf.ndim > 1)


def kept_bytes(recipe: TextToImageRecipe, output: Path) -> int:
    """Returns the number of bytes that the forward pass stores for the gradient."""
    task = text_to_image.task(recipe, output)
    batch = {"latents": np.zeros((4, 8, 8, 4), np.float32), **task.batch(0)}

    def pull_back(params):
        return jax.vjp(lambda p: task.loss(p, task.frozen, batch, jax.random.key(0))[0], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull_back, task.params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def test_gradient_checkpointing_keeps_less_for_the_same_gradient(
    plain, tiny_checkpoint, folder, tmp_path
):
    usual = recipe(tiny_checkpoint, folder)
    frugal = dataclasses.replace(usual, computing=Computing(remat=True))
    loss, _, gradient = gradients(frugal, tmp_path)
    assert loss == pytest.approx(plain[0], rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain[2]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    assert kept_bytes(frugal, tmp_path) < 0.5 * kept_bytes(usual, tmp_path)


@pytest.mark.slow  # two more gradients to compile
def test_bfloat16_gives_nearly_the_same_gradients_in_float32(
    plain, tiny_checkpoint, folder, tmp_path
):
    half = recipe(tiny_checkpoint, folder, computing=Computing(dtype="bfloat16"))
    loss, _, gradient = gradients(half, tmp_path)
    assert loss == pytest.approx(plain[0], rel=0.03)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype(np.float32)}
    flat, wanted = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (gradient, plain[2])
    )
    assert np.dot(flat, wanted) / np.linalg.norm(flat) / np.linalg.norm(wanted) > 0.99


@pytest.mark.parametrize("scheduler", [EPSILON, FLOW])
def test_losses_of_other_prediction_types_have_about_their_variance(
    scheduler, plain, tiny_checkpoint, folder, tmp_path
):
    loss = loss_of(recipe(tiny_checkpoint, folder, scheduler=scheduler), tmp_path)
    assert 0.3 < loss < 30
    assert loss != pytest.approx(plain[0], rel=1e-3)


def test_a_batchs_weights_scale_the_loss(plain, tiny_checkpoint, folder, tmp_path):
    doubled = {"weights": np.full(4, 2.0, np.float32)}
    loss = loss_of(recipe(tiny_checkpoint, folder), tmp_path, **doubled)
    assert loss == pytest.approx(2 * plain[0], rel=1e-5)


def test_offset_noise_is_constant_within_a_channel(tiny_checkpoint, folder, tmp_path):
    """If nearly all noise is offset, the target is nearly constant within a channel, and large."""
    much = recipe(tiny_checkpoint, folder, loss=Loss(offset_noise=100.0))
    assert loss_of(much, tmp_path) > 1000


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_match_the_paper(gamma):
    schedule = noise_schedule(DDIM, "ddim")
    bars = schedule.alpha_bars()
    snr = bars / (1 - bars)
    alpha, sigma = np.sqrt(bars).astype(np.float32), np.sqrt(1 - bars).astype(np.float32)
    wanted = {
        "epsilon": np.minimum(snr, gamma) / snr,
        "v_prediction": np.minimum(snr, gamma) / (snr + 1),
        "sample": np.minimum(snr, gamma),
    }
    for prediction_type, weights in wanted.items():
        found = objective.min_snr_weight(alpha, sigma, prediction_type, gamma)
        np.testing.assert_allclose(found, weights, rtol=1e-3)


def test_at_pure_noise_min_snr_weights_are_finite():
    for prediction_type, wanted in (("epsilon", 1.0), ("v_prediction", 0.0), ("flow", 0.0)):
        weight = objective.min_snr_weight(jnp.zeros(1), jnp.ones(1), prediction_type, 5.0)
        assert float(weight[0]) == wanted


def levels(scheduler: dict, count: int = 4096, **loss) -> noise_levels.NoiseLevels:
    schedule = noise_schedule(scheduler, "euler")
    return noise_levels.draw(schedule, Loss(**loss), jax.random.key(1), count)


def test_noise_levels_are_those_of_the_schedule():
    drawn = levels(DDIM | {"_class_name": "EulerDiscreteScheduler"})
    np.testing.assert_allclose(drawn.alpha**2 + drawn.sigma**2, 1.0, rtol=1e-5)
    assert set(np.unique(drawn.timesteps)) == set(range(1000))
    flow = levels(FLOW)
    np.testing.assert_allclose(flow.alpha + flow.sigma, 1.0, rtol=1e-5)
    np.testing.assert_allclose(flow.timesteps, 1000 * flow.sigma[:, 0, 0, 0], rtol=1e-5)
    # Esser et al., equation 23: a shift of 3 moves 1/2 to 3/4.
    assert float(jnp.median(flow.sigma)) == pytest.approx(0.75, abs=0.01)


def test_logit_normal_timesteps_have_its_quantiles():
    drawn = levels(FLOW, timesteps="logit_normal", logit_mean=0.5, logit_std=1.0)
    logits = np.log(drawn.shares / (1 - drawn.shares))
    np.testing.assert_allclose(np.quantile(logits, [0.1, 0.5, 0.9]), [-0.78, 0.5, 1.78], atol=0.02)


def test_captions_are_dropped_as_often_as_the_recipe_sets(tiny_checkpoint, folder, tmp_path):
    often = recipe(tiny_checkpoint, folder, caption_dropout=0.5)
    task = text_to_image.task(dataclasses.replace(often, batch_size=8), tmp_path)
    ids = np.concatenate([task.batch(step)["token_ids"]["text_encoder"] for step in range(50)])
    assert 0.4 < (ids[:, 0, 1] == 640).mean() < 0.6  # the end token right after the start token


def test_a_trained_checkpoint_generates_and_keeps_frozen_networks(
    tiny_checkpoint, folder, tmp_path
):
    task = text_to_image.task(recipe(tiny_checkpoint, folder), tmp_path)
    moved = jax.tree.map(lambda leaf: leaf + 0.01, task.params)
    task.export(moved, task.frozen, tmp_path / "model")
    side, lines = 160 + 2 * 8, 3 * 15  # of a picture with its margins, and of its caption
    assert task.preview(moved, task.frozen).shape == (side + lines, 8 * side, 3)
    (image,) = jaxdiff.load(tmp_path / "model").generate(
        [jaxdiff.Request(prompt="a star", steps=2)]
    )
    assert image.finite
    before, after = (components.load_model(str(m)) for m in (tiny_checkpoint, tmp_path / "model"))
    for name in ("text_encoder", "vae"):
        for old, new in zip(
            jax.tree.leaves(before.params[name]), jax.tree.leaves(after.params[name]), strict=True
        ):
            np.testing.assert_allclose(old, new, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ("vae",)}, "train: 'vae' must be one of unet, text_encoder"),
        ({"model": "/nowhere"}, "'/nowhere' is neither"),
        ({"model": ""}, "sets neither text_encoder nor model"),
        ({"data": Data(held_out=("red dog",))}, "held_out: unknown value 'red dog'; known: red"),
        ({"data": Data(templates=("a dog",))}, "templates: unknown value 'a dog'; known: "),
        ({"train": ()}, "train is empty; list at least one"),
        ({"method": "lora", "train": ("unet", "text_encoder")}, 'train .* with method = "lora"'),
        ({"lora": Lora(rank=4)}, 'lora has no effect with method = "full"'),
        ({"data": Data(flip=True)}, 'data.flip has no effect with data.path = "shapes"'),
        ({"data": Data(path="photos", composed=True)}, "data.composed has no effect with"),
        ({"data": Data(held_out=EVERY_PAIR)}, "held_out excludes every pair of color and shape"),
        (
            {"unet": {**UNET, "time_cond_proj_dim": 256}},
            "is distilled: it takes the guidance scale",
        ),
        ({"scheduler": {"_class_name": "EDMScheduler"}}, "'EDMScheduler' must be one of"),
    ],
)
def test_invalid_recipes_give_one_line_errors(changes, message, tiny_checkpoint, folder, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        text_to_image.task(
            dataclasses.replace(recipe(tiny_checkpoint, folder), **changes), tmp_path
        )
    assert "\n" not in str(caught.value)


def test_scenes_have_no_held_out_pairs_and_only_the_requested_templates():
    data = Data(templates=("a {color} {shape}", "{number} {shapes}"), held_out=("red circle",))
    drawn = [scenes.draw(data, 0, number) for number in range(300)]
    for scene, caption in drawn:
        assert all((thing.color, thing.shape) != ("red", "circle") for thing in scene.objects)
        assert " and " not in caption
    assert {len(scene.objects) for scene, _ in drawn} == {1, 2, 3, 4, 5}


def test_composed_scenes_are_drawn_on_request():
    data = Data(templates=("a {shape} {relation} a {shape}",), composed=True)
    for number in range(100):
        scene, _ = scenes.draw(data, 0, number)
        first, second = scene.objects
        assert max(abs(first.x - second.x), abs(first.y - second.y)) >= CANVAS / 3


def test_a_random_fiftieth_of_the_images_is_held_out(tiny_checkpoint, tmp_path):
    """Encoded images are sorted by size, so the last ones are not representative."""
    captions = [
        f"{pair} on a {background} background"
        for pair in EVERY_PAIR
        for background in shapes.BACKGROUNDS
    ][:100]
    (tmp_path / "images").mkdir()
    with (tmp_path / "images" / "metadata.jsonl").open("w") as file:
        for number, caption in enumerate(captions):
            Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{number:03d}.png")
            file.write(json.dumps({"file_name": f"{number:03d}.png", "text": caption}) + "\n")
    plain = recipe(tiny_checkpoint, tmp_path / "images", caption_dropout=0.0)
    task = text_to_image.task(dataclasses.replace(plain, batch_size=1), tmp_path)

    def token_ids(batch: dict) -> bytes:
        return batch["token_ids"]["text_encoder"].tobytes()

    trained = {token_ids(task.batch(step)) for step in range(98)}
    held_out = {token_ids(batch) for batch in task.validation}
    assert len(trained) == 98
    assert len(held_out) == 2
    assert not trained & held_out
    tokenize = components.load_model(str(tiny_checkpoint)).tokenizers["text_encoder"]
    assert held_out != {tokenize([caption]).tobytes() for caption in captions[-2:]}
