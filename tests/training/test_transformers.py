"""Training the transformer families: from tables and from checkpoints, in full and as LoRA."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import further
from PIL import Image
from safetensors.numpy import load_file

import jaxdiff
from jaxdiff import cli
from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.families.stable_diffusion_3 import PIPELINE
from jaxdiff.training import components, low_rank, text_encoder, text_to_image
from jaxdiff.training import recipe as recipes
from jaxdiff.training.recipe import (
    Checkpoints,
    Computing,
    Data,
    Lora,
    Loss,
    Optimizer,
    TextToImageRecipe,
)
from jaxdiff.training.shapes import places
from jaxdiff.training.train import train

pytestmark = pytest.mark.usefixtures("compiled_faster")

TOKENIZER = Path(jaxdiff.__file__).parent / "assets" / "shapes64" / "tokenizer"
PARITY = Path(__file__).parents[1] / "parity"
CLIP = {
    "vocab_size": 641,
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "bos_token_id": 639,
    "eos_token_id": 640,
    "pad_token_id": 640,
}
TRANSFORMER = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 6,
}
BUFFER = "pos_embed.pos_embed"
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.fixture(scope="module")
def tiny_sd3(tiny_checkpoint, tmp_path_factory) -> Path:
    """A Stable Diffusion 3 without T5, of 64x64 pixels and 8x8 latents."""
    new = TextToImageRecipe(
        objective="text_to_image",
        steps=1,
        batch_size=1,
        optimizer=Optimizer(1e-3),
        pipeline=PIPELINE,
        vae=str(tiny_checkpoint / "vae"),
        tokenizer=str(TOKENIZER),
        text_encoder=CLIP,
        text_encoder_2=CLIP,
        transformer=TRANSFORMER,
        scheduler=SCHEDULER,
    )
    directory = tmp_path_factory.mktemp("sd3") / "tiny"
    parts, random = components.from_recipe(new), np.random.default_rng(0)
    trained = jax.tree.map(  # as after training: nothing is zero
        lambda leaf: leaf + 0.1 * random.standard_normal(leaf.shape), parts.params["transformer"]
    )
    parts.save(directory, {"transformer": trained}, np.float32)
    return directory


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as file:
        for number in range(4):
            coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(coarse).resize((64, 64)).save(folder / f"{number}.png")
            line = {"file_name": f"{number}.png", "text": ["a red star", "two rings"][number % 2]}
            file.write(json.dumps(line) + "\n")
    return folder


def recipe(model: Path | str, images: Path, **changes) -> TextToImageRecipe:
    usual = TextToImageRecipe(
        objective="text_to_image",
        steps=4,
        batch_size=2,
        optimizer=Optimizer(1e-2, warmup_steps=0, schedule="constant"),
        model=str(model),
        data=Data(path=str(images), size=64),
        loss=Loss(timesteps="logit_normal"),
        checkpoints=Checkpoints(every=2),
    )
    return dataclasses.replace(usual, **changes)


def loss_and_gradient(recipe: TextToImageRecipe, output: Path, **beside):
    """Returns the loss of the first batch and its gradient."""
    task = text_to_image.task(recipe, output)
    function = compilation.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, _), gradient = function(
        task.params, task.frozen, {**task.batch(0), **beside}, jax.random.key(0)
    )
    return float(loss), gradient


def written(path: Path, model: Path, images: Path, steps: int) -> Path:
    """Writes a recipe's file."""
    path.write_text(
        f'objective = "text_to_image"\nmodel = "{model}"\nsteps = {steps}\nbatch_size = 2\n'
        f'[data]\npath = "{images}"\n[loss]\ntimesteps = "logit_normal"\n'
        '[optimizer]\nlearning_rate = 1e-3\nschedule = "constant"\nwarmup_steps = 0\n'
        "weight_decay = 0.1\n"
        "[checkpoints]\nevery = 2\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(tiny_sd3, images, tmp_path_factory) -> Path:
    """A run of four steps without interruption."""
    folder = tmp_path_factory.mktemp("trained")
    train(written(folder / "recipe.toml", tiny_sd3, images, steps=4), folder / "run")
    return folder / "run"


@pytest.mark.slow  # test_resume.py has the quick ones
def test_a_stopped_run_continues_bit_for_bit(trained, tiny_sd3, images, tmp_path):
    for steps in (2, 4):
        train(written(tmp_path / "recipe.toml", tiny_sd3, images, steps), tmp_path / "run")
    weights, samples = "model/transformer/diffusion_pytorch_model.safetensors", "samples/000004.png"
    for file in (weights, samples):
        assert (tmp_path / "run" / file).read_bytes() == (trained / file).read_bytes()

    def losses(run: Path) -> list:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]

    assert losses(tmp_path / "run") == losses(trained)


def test_training_changes_the_transformer_but_not_its_positions(trained, tiny_sd3):
    """Although the weights decay."""
    file = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(tiny_sd3 / file), load_file(trained / "model" / file)
    assert before.keys() == after.keys()
    np.testing.assert_array_equal(before[BUFFER].astype(np.float16), after[BUFFER])
    for name in (name for name in before if name.endswith(".weight")):
        assert (before[name].astype(np.float16) != after[name]).any(), name


def test_a_trained_model_generates_and_names_what_it_lacks(trained):
    index = json.loads((trained / "model" / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert index["tokenizer_2"] == ["transformers", "CLIPTokenizer"]
    request = jaxdiff.Request(prompt="a star", steps=2)
    (image,) = jaxdiff.load(trained / "model").generate([request])
    assert image.finite


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_no_optimizer_moves_the_positions(name):
    from jaxdiff.training.optimizers import optimizer

    params = {"pos_embed": {"pos_embed": jnp.ones((1, 4, 8)), "proj": {"kernel": jnp.ones((8, 8))}}}
    gradients = jax.tree.map(jnp.ones_like, params)
    gradients["pos_embed"]["pos_embed"] *= 0
    transform, _ = optimizer(Optimizer(0.1, name=name, warmup_steps=0, weight_decay=0.5), 10)
    updates, _ = transform.update(gradients, transform.init(params), params)
    assert float(jnp.abs(updates["pos_embed"]["pos_embed"]).max()) == 0
    assert float(jnp.abs(updates["pos_embed"]["proj"]["kernel"]).min()) > 0


def test_the_loss_is_that_of_the_flow(tiny_sd3, images, tmp_path):
    """A network whose last layer is zero predicts no velocity: the loss is that of noise - x_0."""
    plain = recipe(tiny_sd3, images)
    task = text_to_image.task(plain, tmp_path)
    silent = task.params["transformer"] | {
        "proj_out": jax.tree.map(jnp.zeros_like, task.params["transformer"]["proj_out"])
    }
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    batch = {"latents": latents, "token_ids": task.batch(0)["token_ids"]}
    loss, _ = compilation.jit(task.loss)(
        {"transformer": silent}, task.frozen, batch, jax.random.key(0)
    )
    noise = jax.random.normal(jax.random.split(jax.random.key(0), 4)[1], latents.shape)
    assert float(loss) == pytest.approx(float(jnp.mean((noise - latents) ** 2)), rel=1e-5)


def test_the_places_of_shapes_are_learned_and_not_exported(tiny_sd3, tmp_path):
    plain = recipe(tiny_sd3, tmp_path, data=Data(scenes=64))
    with_places = dataclasses.replace(plain, loss=dataclasses.replace(plain.loss, places=0.5))
    task, usual = (text_to_image.task(each, tmp_path) for each in (with_places, plain))
    batch = task.batch(0)
    loss, _ = compilation.jit(task.loss)(task.params, task.frozen, batch, jax.random.key(0))
    given = usual.params, usual.frozen, usual.batch(0), jax.random.key(0)
    without, _ = compilation.jit(usual.loss)(*given)
    of_zeros = np.mean((places.SCALE * batch["places"]) ** 2)
    assert float(loss) == pytest.approx(float(without) + 0.5 * of_zeros, rel=1e-4)
    task.export(task.params, task.frozen, tmp_path / "model")
    file = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(tiny_sd3 / file), load_file(tmp_path / "model" / file)
    for name in before:
        np.testing.assert_array_equal(before[name].astype(np.float16), after[name])


def test_lora_learns_with_and_without_recomputed_activations(tiny_sd3, images, tmp_path):
    adapted = recipe(tiny_sd3, images, method="lora", lora=Lora(rank=2))
    frugal = dataclasses.replace(adapted, computing=Computing(remat=True))
    (loss, gradient), (again, same) = (
        loss_and_gradient(each, tmp_path) for each in (adapted, frugal)
    )
    assert loss == pytest.approx(again, rel=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    assert all(
        float(jnp.abs(leaf).max()) > 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if path[-2].key in ("to_q", "to_k", "to_v") and path[-1].key == "lora_B"
    )


def test_loras_have_the_names_that_diffusers_reads(tiny_sd3, images, tmp_path):
    adapted = recipe(tiny_sd3, images, method="lora", lora=Lora(rank=2, text_encoder=True))
    task = text_to_image.task(adapted, tmp_path)
    task.export(task.params, task.frozen, tmp_path / "model")
    stored = load_file(tmp_path / "model" / low_rank.FILE)
    of_both = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    layers = {
        *(f"transformer.transformer_blocks.{i}.attn.{name}" for i in (0, 1) for name in of_both),
        "transformer.transformer_blocks.0.attn.to_add_out",  # the last block has no use for it
        *(
            f"{encoder}.text_model.encoder.layers.{i}.self_attn.{name}_proj"
            for encoder in ("text_encoder", "text_encoder_2")
            for i in (0, 1)
            for name in ("q", "k", "v", "out")
        ),
    }
    assert stored.keys() == {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    assert stored["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (2, 16)


def test_embedded_captions_give_the_same_batches_and_losses(tiny_sd3, images, tmp_path):
    encoded = tmp_path / "encoded"
    command = ["encode", f"--data={images}", f"--model={tiny_sd3}", f"--output={encoded}"]
    assert cli.main([*command, "--embed"]) == 0
    plain = recipe(tiny_sd3, images, caption_dropout=0.0)
    cached = dataclasses.replace(plain, data=Data(path=str(encoded)))
    batch = text_to_image.task(cached, tmp_path).batch(0)
    assert batch["context"].shape == (2, 24 + 1, 32)  # one for all of T5's, which are zeros
    assert batch["pooled"].shape == (2, 32)
    latents = {"latents": batch["latents"]}
    wanted, found = (loss_and_gradient(each, tmp_path, **latents)[0] for each in (plain, cached))
    assert found == pytest.approx(wanted, rel=2e-3)  # stored in half precision


TABLES = f"""
objective = "text_to_image"
pipeline = "{PIPELINE}"
vae = "{{vae}}"
tokenizer = "{TOKENIZER}"
steps = 2
batch_size = 2

[data]
scenes = 64

[optimizer]
learning_rate = 1e-3

[text_encoder]
{{clip}}

[text_encoder_2]
{{clip}}

[transformer]
{{transformer}}

[scheduler]
_class_name = "FlowMatchEulerDiscreteScheduler"
shift = 3.0
"""


def tables(checkpoint: Path) -> str:
    clip, transformer = (
        "\n".join(f"{key} = {value}" for key, value in table.items())
        for table in (CLIP, TRANSFORMER)
    )
    return TABLES.format(vae=checkpoint / "vae", clip=clip, transformer=transformer)


def test_a_new_model_is_made_of_tables(tiny_sd3, tmp_path):
    (tmp_path / "recipe.toml").write_text(tables(tiny_sd3))
    train(tmp_path / "recipe.toml", tmp_path / "run")
    *_, line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["loss"] < 10
    # Two updates are too few for the blocks, whose modulations were zero, to be far from that.
    stored = load_file(tmp_path / "run/model/transformer/diffusion_pytorch_model.safetensors")
    modulation = stored["transformer_blocks.0.norm1.linear.weight"]
    assert np.abs(modulation).max() < 0.01 < np.abs(stored["context_embedder.weight"]).max()
    request = jaxdiff.Request(prompt="a red circle", steps=2)
    (image,) = jaxdiff.load(tmp_path / "run" / "model").generate([request])
    assert image.finite


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (PIPELINE, "StableDifusion3Pipeline", "did you mean StableDiffusion3Pipeline"),
        ("[transformer]", "[unet]", f"sets unet, but a {PIPELINE} consists of text_encoder, "),
        ("[text_encoder_2]", "[text_encoder_4]", "text_encoder_4: unknown key"),
        ("[transformer]", "[optimizer2]", "optimizer2: unknown key"),
        ("[text_encoder_2]", "[text_encoder_3]", "sets neither text_encoder_2 nor model"),
        (f'tokenizer = "{TOKENIZER}"', "", "sets neither tokenizer nor model"),
        ("pooled_projection_dim = 32", "pooled_projection_dim = 16", "pooled_projection_dim = 16"),
        (f'pipeline = "{PIPELINE}"', "", "sets text_encoder_2, but a StableDiffusionPipeline"),
        (
            "vocab_size",
            'architectures = ["CLIPTextModel"]\nvocab_size',
            "text_encoder is a CLIPTextModel, but the pipeline needs a CLIPTextModelWithProjection",
        ),
        ("steps = 2", 'steps = 2\nmodel = "shapes64"', "pipeline has no effect with model"),
    ],
)
def test_tables_that_do_not_fit_give_one_line_errors(old, new, message, tiny_sd3, tmp_path):
    (tmp_path / "recipe.toml").write_text(tables(tiny_sd3).replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        train(tmp_path / "recipe.toml", tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_text_encoder_with_a_projection_learns_in_all_its_weights(tmp_path):
    table = "".join(f"{key} = {value}\n" for key, value in CLIP.items())
    (tmp_path / "recipe.toml").write_text(
        f'objective = "text_encoder"\ntokenizer = "{TOKENIZER}"\nsteps = 2\nbatch_size = 2\n'
        "[optimizer]\nlearning_rate = 1e-2\n[text_encoder]\n"
        f'architectures = ["CLIPTextModelWithProjection"]\n{table}'
    )
    task = text_encoder.task(recipes.read(tmp_path / "recipe.toml"))
    gradient, logged = compilation.jit(jax.grad(task.loss, has_aux=True))(
        task.params, {}, task.batch(0), jax.random.key(0)
    )
    assert logged.keys() == {"understood", "pooled_understood"}
    kernels = [leaf for leaf in jax.tree.leaves(gradient) if leaf.ndim > 1]
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in kernels)
    task.export(task.params, {}, tmp_path / "model")
    assert "text_projection.weight" in load_file(tmp_path / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Returns a function that writes a small checkpoint of a family of `transformer_families`."""
    pytest.importorskip("diffusers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PARITY)
        import transformer_families

        yield lambda name: transformer_families.save(name, tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize(
    "name",
    [
        "PixArt-Alpha",
        *map(further, ("FLUX.1 dev", "FLUX.2 klein base", "Qwen-Image", "Sana", "Z-Image")),
    ],
)
def test_other_families_learn_and_draw_samples(name, family, images, tmp_path):
    checkpoint = family(name)
    encoded = tmp_path / "encoded"
    command = ["encode", f"--data={images}", f"--model={checkpoint}", f"--output={encoded}"]
    assert cli.main([*command, "--embed", "--size=64"]) == 0
    plain = recipe(checkpoint, images, caption_dropout=1.0)
    cached = dataclasses.replace(plain, data=Data(path=str(encoded), size=64))
    latents = {"latents": text_to_image.task(cached, tmp_path).batch(0)["latents"]}
    wanted, gradient = loss_and_gradient(plain, tmp_path, **latents)
    task = text_to_image.task(cached, tmp_path)
    batch = {**task.batch(0), **latents}
    found, _ = compilation.jit(task.loss)(task.params, task.frozen, batch, jax.random.key(0))
    assert found == pytest.approx(wanted, rel=5e-3)
    assert set(gradient) == {"transformer"}
    task = text_to_image.task(dataclasses.replace(cached, method="lora"), tmp_path)
    side, lines = 160 + 2 * 8, 3 * 15  # of a picture with its margins, and of its caption
    assert task.preview(task.params, task.frozen).shape == (side + lines, 4 * side, 3)
    if name == "PixArt-Alpha":
        assert task.batch(0)["mask"].dtype == bool
        assert task.batch(0)["mask"].sum() == 2  # the end of the empty caption
    if name == "FLUX.1 dev":  # without classifier-free guidance, no caption is dropped
        captions = text_to_image.task(plain, tmp_path).batch(0)["token_ids"]["text_encoder"]
        assert (captions[..., 2] != captions[..., -1]).all()
