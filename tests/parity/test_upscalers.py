"""Stable Diffusion's upscalers enlarge images as the diffusers pipelines do."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.devices import compilation
from jaxdiff.diffusion import noise as random_noise
from jaxdiff.families import inspect, open_checkpoint, upscaling
from jaxdiff.families.model import Text, networks_of
from jaxdiff.families.opening import open_ensemble
from jaxdiff.models.k_unet import KUNet, KUNetConfig
from jaxdiff.models.unet_upscaler import UNetUpscaler, UNetUpscalerConfig
from jaxdiff.weights.load import file_shapes, load_params, places
from jaxdiff.weights.network import abstract_network

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import networks  # noqa: E402
import upscalers  # noqa: E402  (beside this file)
from cases import further  # noqa: E402
from PIL import Image  # noqa: E402
from test_pipeline import SCHEDULERS  # noqa: E402
from upscalers import LATENT, X4  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compiled_faster"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PROMPTS = ("a red circle", "two blue stars", "a ring")
ENLARGES = {X4: 4, LATENT: 2}
SIZES = {X4: (32, 24), LATENT: (96, 64)}  # width and height of the images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a function that makes an upscaler's small checkpoint, written by diffusers."""
    return cache(lambda name: upscalers.save(name, tmp_path_factory.mktemp("upscaler")))


@pytest.fixture(scope="module")
def load_model(checkpoint):
    """Returns a function that loads an upscaler with torch's noise."""
    return cache(lambda name: jaxdiff.load(checkpoint(name), noise="torch"))


@pytest.fixture(scope="module")
def load_reference(checkpoint):
    """Returns a function that opens an upscaler in diffusers."""

    @cache
    def load_reference(name):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            checkpoint(name), dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        # Where diffusers 0.42 looks for the final norm; transformers 5.6 moved it.
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
        return pipeline, pipeline.scheduler

    return load_reference


@pytest.fixture
def assert_same(load_model, load_reference, record_property):
    """Returns a function that enlarges a batch in both libraries and compares the images."""

    def assert_same(name, *, sampler=None, negative_prompt="", **changes):
        pipeline, pipeline.scheduler = load_reference(name)
        if sampler:
            scheduler_class, named = SCHEDULERS[sampler]
            pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **named)
        changes = {"steps": 4, "guidance_scale": 3.0, **changes}
        words = {"num_inference_steps": changes["steps"]}
        if changes["guidance_scale"] > 1:
            words["negative_prompt"] = [negative_prompt] * len(PROMPTS)
        theirs = pipeline(
            prompt=list(PROMPTS),
            image=[Image.fromarray(picture(name, seed)) for seed in range(len(PROMPTS))],
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(len(PROMPTS))],
            guidance_scale=changes["guidance_scale"],
            **words,
        ).images
        changes |= {"sampler": sampler, "negative_prompt": negative_prompt}
        asked = [request(name, seed, **changes) for seed in range(len(PROMPTS))]
        ours = np.stack([image.pixels for image in load_model(name).generate(asked)])
        differences = np.abs(ours.astype(int) - np.stack([*map(np.asarray, theirs)]))
        record_property("difference", f"{differences.max()} {differences.mean():.4f}")
        assert differences.max() <= 2
        assert differences.mean() <= 0.2

    return assert_same


def picture(name: str, seed: int) -> np.ndarray:
    """A small picture with an edge."""
    width, height = SIZES[name]
    y, x = np.mgrid[:height, :width] / (height / 3)
    waves = [np.sin(x * (1 + seed) + c) * np.cos(y + c * seed) for c in range(3)]
    pixels = np.stack(waves, axis=-1) * 100 + 128
    pixels[height // 3 :, : width // 2] = (220, 38, 38 * seed)
    return pixels.astype(np.uint8)


def request(name: str, seed: int, **changes) -> jaxdiff.Request:
    """Asks for one of the pictures, enlarged."""
    width, height = (ENLARGES[name] * side for side in SIZES[name])
    usual = {"prompt": PROMPTS[seed], "image": picture(name, seed), "steps": 4}
    return jaxdiff.Request(seed=seed, width=width, height=height, **{**usual, **changes})


@pytest.mark.parametrize("sampler", [None, "euler_ancestral", further("dpmpp_2m")])
def test_x4(assert_same, sampler):
    """With each image's own noise in it, in the latents and, of the last sampler, in each step."""
    assert_same(X4, sampler=sampler, negative_prompt="a blue square")


def test_x4_without_guidance(assert_same):
    assert_same(X4, guidance_scale=1.0)


@pytest.mark.parametrize("guidance_scale", [3.0, 0.0, further(1.0)])
def test_latent_x2(assert_same, guidance_scale):
    """Without guidance, too; a scale of 0 also leaves the prompt out."""
    assert_same(LATENT, guidance_scale=guidance_scale, negative_prompt="a blue square")


def test_latent_x2_ignores_the_prompt_at_a_guidance_scale_of_0(load_model):
    model = load_model(LATENT)
    kinds = [(scale, prompt) for scale in (0.0, 1.0) for prompt in PROMPTS[:2]]
    asked = [request(LATENT, 0, guidance_scale=scale, prompt=prompt) for scale, prompt in kinds]
    one, other, *prompted = [image.pixels for image in model.generate(asked)]
    np.testing.assert_array_equal(one, other)
    assert (prompted[0] != prompted[1]).any()


@pytest.mark.parametrize("name", [X4, LATENT])
def test_an_image_depends_on_its_own_request_only(load_model, name):
    model = load_model(name)
    _, second = model.generate([request(name, 0), request(name, 1)])
    again, other = model.generate([request(name, 1), request(name, 1, image=picture(name, 2))])
    np.testing.assert_array_equal(again.pixels, second.pixels)
    assert (other.pixels != second.pixels).any()
    (reseeded,) = model.generate([replace(request(name, 1), seed=2)])
    assert (reseeded.pixels != second.pixels).any()


def test_the_deep_features_of_x4_can_be_reused(checkpoint, load_model):
    """Of four steps, two are evaluated in full; all are if one is the size of a group."""
    asked = request(X4, 0)
    (exact,) = load_model(X4).generate([asked])
    (spared,) = jaxdiff.load(checkpoint(X4), noise="torch", deep_cache=2).generate([asked])
    difference = np.abs(spared.pixels.astype(int) - exact.pixels)
    assert 0 < difference.mean() < 20


def opened(checkpoint, name):
    """An upscaler's networks, the weights of its U-Net, and diffusers' U-Net."""
    files = open_checkpoint(checkpoint(name))
    model = networks_of(files)
    params = load_params(places(model.networks["unet"].shapes, np.float32), files.weights("unet"))
    reference = diffusers.UNet2DConditionModel.from_pretrained(checkpoint(name) / "unet")
    return model, params, reference.eval()


def their_output(unet, latents, timesteps, context, **conditions) -> np.ndarray:
    given = {name: torch.tensor(value) for name, value in conditions.items()}
    with torch.no_grad():
        found = unet(
            torch.tensor(latents).permute(0, 3, 1, 2),
            torch.tensor(timesteps),
            torch.tensor(context),
            **given,
        ).sample
    return found.permute(0, 2, 3, 1).numpy()


def test_the_unet_of_x4(checkpoint):
    """At odd sizes, and with other noise levels than that of the pipeline."""
    model, params, reference = opened(checkpoint, X4)
    given = {
        "latents": networks.drawn("latents", (2, 5, 11, 7)),
        "timesteps": np.array([999, 17]),
        "context": networks.drawn("context", (2, 12, 48)),
    }
    expected = their_output(reference, **given, class_labels=np.array([20, 20]))
    ours, _ = compilation.jit(model.denoiser.evaluate)(params, *given.values())
    assert networks.difference(ours, expected) <= networks.BOUND
    labels = {"class_labels": np.array([20, 350])}

    def run(params, given):
        return model.networks["unet"](params)(**given)

    others = their_output(reference, **given, **labels)
    assert (
        networks.difference(compilation.jit(run)(params, given | labels), others) <= networks.BOUND
    )
    assert np.abs(others[1] - expected[1]).max() > 0.1


def test_the_unet_of_latent_x2(checkpoint):
    """Of whose output the pipeline takes all but the last channel, as -v."""
    model, params, reference = opened(checkpoint, LATENT)
    latents = networks.drawn("latents", (2, 16, 24, 8))
    times, context = np.array([0.6, -0.9], np.float32), networks.drawn("context", (2, 12, 32))
    pooled = networks.drawn("pooled", (2, 32))
    level = np.repeat(np.array([[1, 0]], np.float32), 64, axis=1)
    condition = np.concatenate([np.repeat(level, 2, axis=0), pooled], axis=1)
    expected = their_output(reference, latents, times, context, timestep_cond=condition)
    ours, _ = compilation.jit(model.denoiser.evaluate)(
        params, latents, times, Text(context, pooled)
    )
    assert networks.difference(ours, -expected[..., :-1]) <= networks.BOUND


@pytest.mark.parametrize("name", [X4, LATENT])
def test_a_unet_computes_in_the_dtype_of_its_weights(checkpoint, name):
    model, params, _ = opened(checkpoint, name)
    config = model.configs["unet"]
    text = Text(jnp.zeros((2, 12, config.cross_attention_dim)))
    condition = model.condition(text._replace(pooled=text.context[:, 0]), None)
    arrays = params, jnp.zeros((2, 8, 16, config.in_channels)), jnp.ones(2), condition
    halved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), arrays)
    output, _ = jax.eval_shape(model.denoiser.evaluate, *halved)
    assert output.dtype == jnp.bfloat16


# As on the Hub: stabilityai/stable-diffusion-x4-upscaler and stabilityai/sd-x2-latent-upscaler.
UNET_X4 = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "sample_size": 128,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "use_linear_projection": True,
}
UNET_LATENT = {
    **{key: list(it) if isinstance(it, tuple) else it for key, it in upscalers.LATENT_UNET.items()},
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 64,
    "block_out_channels": [384, 384, 768, 768],
    "cross_attention_dim": 768,
    "layers_per_block": 4,
    "time_cond_proj_dim": 896,
}


@pytest.mark.parametrize(
    ("network", "read", "config"),
    [(UNetUpscaler, UNetUpscalerConfig, UNET_X4), (KUNet, KUNetConfig, UNET_LATENT)],
)
def test_the_keys_at_full_size_match_diffusers(network, read, config):
    ours = file_shapes(abstract_network(network, read.from_json(config))[1])
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(config).state_dict()
    assert ours == {key: tuple(value.shape) for key, value in theirs.items()}


@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_noise_is_drawn_for_the_image_and_then_for_latents(kind):
    image, latents, draws = (12, 20, 3), (12, 20, 4), 2
    seeds = np.array([3, 2**32 - 1], np.uint32)
    noise = random_noise.draw(seeds, latents, kind, draws, before=1, encoded_shape=image)
    assert (noise.start.shape, noise.encoded.shape) == ((2, *latents), (1, 2, *image))
    assert noise.fresh.shape == (draws, 2, *latents)
    for place, seed in enumerate(seeds):
        mine = noise.encoded[0], noise.start, *noise.fresh
        drawn = [np.asarray(each[place]) for each in mine]
        if kind == "torch":
            generator = torch.Generator("cpu").manual_seed(int(seed))
            for found in drawn:
                height, width, channels = found.shape
                theirs = torch.randn((1, channels, height, width), generator=generator)
                np.testing.assert_allclose(found, theirs[0].permute(1, 2, 0), atol=1e-6)
        numbers = np.concatenate([each.ravel() for each in drawn])
        assert len(np.unique(numbers)) > 0.99 * len(numbers)  # nothing is used twice
        assert abs(numbers.mean()) < 0.1
        assert abs(numbers.std() - 1) < 0.1


@pytest.mark.parametrize(("name", "multiple"), [(X4, 16), (LATENT, 64)])
def test_what_users_are_told(checkpoint, name, multiple):
    files = open_checkpoint(checkpoint(name))
    assert open_ensemble(checkpoint(name)).enlarges == ENLARGES[name]
    assert files.defaults.size_multiple == multiple
    assert (files.defaults.steps, files.defaults.guidance_scale) == (75, 9.0)
    said = inspect.report(files)
    assert name in said
    assert said.endswith("yes")


@pytest.mark.parametrize("name", [X4, LATENT])
def test_operations_match_xlas_count(checkpoint, name):
    model, params, _ = opened(checkpoint, name)
    config, tokens = model.configs["unet"], 77
    text = Text(np.zeros((1, tokens, config.cross_attention_dim), np.float32), None)
    text = text._replace(pooled=text.context[:, 0])
    given = np.zeros((1, 16, 16, config.in_channels), np.float32), np.ones(1)
    program = compilation.jit(model.denoiser.evaluate).lower(
        params, *given, model.condition(text, None)
    )
    family = {X4: upscaling.X4_UPSCALER, LATENT: upscaling.LATENT_UPSCALER}[name]
    whole, spared = family.operations(open_checkpoint(checkpoint(name)), 16, 16, tokens)
    assert whole == pytest.approx(program.cost_analysis()["flops"], rel=0.25)
    assert spared < whole if name == X4 else spared == whole
