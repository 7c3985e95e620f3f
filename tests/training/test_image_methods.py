"""Training of ControlNets and of models for inpainting."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_denoising import recipe

import jaxdiff
from jaxdiff.checkpoint.controlnet import open_controlnet
from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.training import consistency, inpainting, text_to_image
from jaxdiff.training.recipe import ConsistencyRecipe, Data, Optimizer
from jaxdiff.weights.load import name_of
from jaxdiff.worlds import shapes

pytestmark = pytest.mark.usefixtures("compiled_faster")

SHAPES = Data(scenes=64)
SMALL = {"conditioning_embedding_out_channels": [4, 4, 8]}  # as shapes64 needs it
NET = {"mid_block_type": "UNetMidBlock2D", "conditioning_embedding_out_channels": [4, 4, 8, 8]}


def method(name: str, checkpoint: Path, data: Data = SHAPES, **changes):
    """A recipe that trains the checkpoint's own U-Net by a method."""
    whole = recipe(checkpoint, "", method=name, **changes)
    return dataclasses.replace(whole, data=data, unet="")


def made(recipe, folder: Path):
    """The task of a recipe, in a folder of its own."""
    folder.mkdir()
    return text_to_image.task(recipe, folder)


def gradients(task, batch: dict) -> tuple[float, dict]:
    loss = compilation.jit(jax.value_and_grad(lambda *given: task.loss(*given)[0]))
    found, gradient = loss(task.params, task.frozen, batch, jax.random.key(0))
    return float(found), gradient


def largest(tree: dict) -> dict[str, float]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): float(jnp.abs(leaf).max()) for path, leaf in leaves}


def test_a_controlnet_begins_without_effect_and_only_it_is_trained(tiny_checkpoint, tmp_path):
    net = made(method("controlnet", tiny_checkpoint, controlnet=NET), tmp_path / "a")
    plain = made(method("full", tiny_checkpoint), tmp_path / "b")
    batch = net.batch(0)
    assert batch["control"].shape == (4, 64, 64, 3)
    loss, gradient = gradients(net, batch)
    without, _ = compilation.jit(plain.loss)(
        plain.params, plain.frozen, plain.batch(0), jax.random.key(0)
    )
    assert loss == pytest.approx(float(without), rel=1e-5)
    assert gradient.keys() == net.params.keys() == {"controlnet"}
    sizes = largest(gradient["controlnet"])
    moved = {name for name, size in sizes.items() if size > 0}
    assert moved == {
        name for name in sizes if name.startswith("controlnet_") and "cond" not in name
    }


def test_control_images_of_scenes_are_their_outlines(tiny_checkpoint, tmp_path):
    task = text_to_image.task(method("controlnet", tiny_checkpoint, controlnet=NET), tmp_path)
    for control in task.batch(3)["control"]:
        inside = shapes.read(np.where(control > 64, 220, 16).astype(np.uint8))
        assert len(inside.objects) >= 1
        assert 0.01 < (control > 128).mean() < 0.25


def test_a_trained_controlnet_steers(tiny_checkpoint, tmp_path):
    task = text_to_image.task(method("controlnet", tiny_checkpoint, controlnet=NET), tmp_path)
    moved = jax.tree.map(lambda leaf: leaf + 0.05, task.params)
    assert task.preview(moved, task.frozen).shape[2] == 3
    folder = tmp_path / "net"
    task.export(moved, task.frozen, folder)
    assert open_controlnet(str(folder)).config["mid_block_type"] == "UNetMidBlock2D"
    loaded = jaxdiff.load(tiny_checkpoint, controlnet=folder)
    edges = np.zeros((64, 64, 3), np.uint8)
    requests = [
        jaxdiff.Request(prompt="a star", seed=0, steps=2, control_image=edges + add)
        for add in (0, 200)
    ]
    dark, light = (image.pixels for image in loaded.generate(requests))
    assert not np.array_equal(dark, light)


@pytest.mark.slow
def test_inpainting_begins_as_the_model_that_is_widened(tiny_checkpoint, tmp_path):
    task = made(method("inpaint", tiny_checkpoint), tmp_path / "a")
    kernel = task.params["unet"]["conv_in"]["kernel"]
    assert kernel.shape[2] == 9
    batch = task.batch(0)
    assert batch["pixels"].dtype == np.uint8
    assert batch["masks"].dtype == bool
    loss, gradient = gradients(task, batch)
    assert gradients(task, {**batch, "masks": ~batch["masks"]})[0] == pytest.approx(loss, rel=1e-6)
    assert np.abs(gradient["unet"]["conv_in"]["kernel"][:, :, 4:]).max() > 0
    assert gradient.keys() == {"unet"}


@pytest.mark.slow
def test_a_model_for_inpainting_is_exported_used_and_trained_further(tiny_checkpoint, tmp_path):
    task = made(method("inpaint", tiny_checkpoint), tmp_path / "a")
    moved = jax.tree.map(lambda leaf: leaf + 0.01, task.params)
    assert task.preview(moved, task.frozen).shape[2] == 3
    model = tmp_path / "model"
    task.export(moved, task.frozen, model)
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    image = shapes.render(shapes.sample(np.random.default_rng(0))[0])
    mask = np.zeros((64, 64), bool)
    mask[:, 32:] = True
    request = jaxdiff.Request(prompt="a star", steps=2, image=image, mask_image=mask)
    (painted,) = jaxdiff.load(model).generate([request])
    np.testing.assert_array_equal(painted.pixels[:, :32], image[:, :32])
    assert not np.array_equal(painted.pixels[:, 40:], image[:, 40:])

    further = made(method("full", model), tmp_path / "b")
    assert further.params["unet"]["conv_in"]["kernel"].shape[2] == 9
    loss, _ = gradients(further, further.batch(0))
    assert np.isfinite(loss)


def test_masks_hide_parts_or_everything():
    masks = inpainting.masks(np.random.default_rng(0), 400, 24, 40)
    shares = masks.mean(axis=(1, 2))
    assert 0.2 < (shares == 1).mean() < 0.3
    assert shares.min() > 0
    np.testing.assert_array_equal(masks, inpainting.masks(np.random.default_rng(0), 400, 24, 40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controlnet": {"freq_shift": 1}}, 'controlnet has no effect with method = "full"'),
        (
            {"data": Data("photos", control="edges")},
            'data.control has no effect with method = "full"',
        ),
        (
            {"method": "controlnet", "data": Data(control="edges")},
            'data.control has no effect with data.path = "shapes"',
        ),
        (
            {"method": "controlnet", "controlnet": SMALL, "train": ("text_encoder",)},
            'train .* method = "contr',
        ),
        ({"method": "controlnet"}, "the ControlNet takes 8 pixels per latent, the model 4"),
        ({"method": "controlnet", "controlnet": {"colour": 1}}, "the key colour = 1 is not supp"),
        ({"method": "controlnet", "controlnet": {"layers_per_block": 3}}, "layers_per_block = 3"),
        ({"method": "controlnet", "model": "shapes64-flow"}, "Stable Diffusion 1, 2 and XL only"),
        ({"method": "inpaint", "model": "shapes64-flow"}, "does not work with a StableDiffusion3"),
    ],
)
def test_recipes_that_do_not_fit_give_one_line(changes, message, tmp_path):
    of_shapes64 = method("full", "shapes64", Data(scenes=64))
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        text_to_image.task(dataclasses.replace(of_shapes64, **changes), tmp_path)


def test_models_that_edit_images_are_not_trained(editing_checkpoint, tmp_path):
    with pytest.raises(InputError, match="training such models is not built; train one that"):
        text_to_image.task(method("full", editing_checkpoint), tmp_path)
    given = {"steps": 1, "batch_size": 1, "optimizer": Optimizer(1e-3)}
    student = ConsistencyRecipe(objective="consistency", model=str(editing_checkpoint), **given)
    with pytest.raises(InputError, match="edits images; use another teacher"):
        consistency.task(student)
