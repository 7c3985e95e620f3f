"""With the same seed, the transformer families make the same images as their pipelines."""

import inspect
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import jaxdiff
from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.families import open_checkpoint

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import transformer_families as families  # noqa: E402  (beside this file)
from cases import further  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compiled_faster"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

NAMES = sorted(families.FAMILIES)
# Like another one of its kind but for a config's value, which tests of networks have.
LIKE_OTHERS = {
    *("FLUX.1 schnell", "FLUX.2 klein", "PixArt-Alpha"),
    *("Stable Diffusion 3", "Stable Diffusion 3 without T5"),
}
FAMILIES = [further(name) if name in LIKE_OTHERS else name for name in NAMES]
# Sizes that are changed to others of a table, unless the pipelines are told not to.
BINNING = ("PixArt-Alpha", "PixArt-Sigma", "Sana")
WITHOUT_NEGATIVE = "FLUX"  # no such argument, or no effect without another one
SCALES = {"Qwen-Image": "true_cfg_scale"}  # the argument that is our guidance scale
REQUESTS = [
    jaxdiff.Request(prompt="A red circle", seed=0, guidance_scale=3.0),
    jaxdiff.Request(prompt="two  blue stars", negative_prompt="a ring", seed=1, guidance_scale=5.0),
    jaxdiff.Request(prompt="on the left 日本, naïve; " * 30, seed=2**32 - 1, guidance_scale=1.5),
    jaxdiff.Request(prompt="", negative_prompt="black", seed=3, guidance_scale=2.0),
]

# Of guided images, so that their program is compiled once for each family.
COMPILED = {"width": 64, "height": 64, "steps": 5}
BATCH_SIZE = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a function that makes a family's small checkpoint, written by diffusers."""

    @cache
    def checkpoint(family):
        return families.save(family, tmp_path_factory.mktemp("family"))

    return checkpoint


@pytest.fixture(scope="module")
def load_model(checkpoint):
    """Returns a function that loads a family's checkpoint with torch's noise."""
    return cache(lambda family: jaxdiff.load(checkpoint(family), noise="torch"))


@pytest.fixture(scope="module")
def load_reference(checkpoint):
    """Returns a function that opens a family's checkpoint in diffusers."""

    @cache
    def load_reference(family):
        absent = {}
        if family == "Stable Diffusion 3 without T5":  # diffusers must be told so again
            absent = {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            checkpoint(family), dtype=torch.float32, **absent
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load_reference


def their_pixels(pipeline, family, request, **options):
    words = {
        "prompt": request.prompt,
        SCALES.get(family, "guidance_scale"): request.guidance_scale,
        "num_inference_steps": request.steps,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "width": request.width,
        "height": request.height,
    }
    if family in BINNING:
        words["use_resolution_binning"] = False
    if family == "Z-Image":  # which adds the scaled difference to the conditional prediction
        words["guidance_scale"] -= 1
    if not str(family).startswith(WITHOUT_NEGATIVE):
        words["negative_prompt"] = request.negative_prompt
    return np.asarray(pipeline(**words, **options).images[0]).astype(int)


@pytest.mark.parametrize("family", FAMILIES)
def test_images(load_model, load_reference, record_property, family):
    """Guided by different scales, and not guided; two sizes, of which one is not square."""
    model, pipeline = load_model(family), load_reference(family)
    requests = REQUESTS
    if family.startswith(WITHOUT_NEGATIVE):
        requests = [replace(request, negative_prompt="") for request in requests]
    height = 32 if family == "Sana" else 48  # its pipeline wants multiples of 32
    unguided = {"width": 96, "height": height, "steps": 4, "guidance_scale": 1.0}
    differences = []
    for changes in (COMPILED, unguided):
        asked = [replace(each, **changes) for each in requests]
        for image, request in zip(model.generate(asked, BATCH_SIZE), asked, strict=True):
            difference = image.pixels.astype(int) - their_pixels(pipeline, family, request)
            differences.append(np.abs(difference))
    largest = max(int(difference.max()) for difference in differences)
    mean = max(float(difference.mean()) for difference in differences)
    record_property("difference", f"{largest} {mean:.4f}")
    assert largest <= 2
    assert mean <= 0.2


def test_skip_layer_guidance(checkpoint, load_reference):
    model = jaxdiff.load(checkpoint("Stable Diffusion 3.5"), noise="torch", skip_layers="0")
    request = replace(REQUESTS[1], width=64, height=48, steps=20)
    (image,) = model.generate([request], batch_size=2)
    pipeline = load_reference("Stable Diffusion 3.5")
    expected = their_pixels(pipeline, None, request, skip_guidance_layers=[0])
    assert np.abs(image.pixels - expected).max() <= 2
    plain = their_pixels(pipeline, None, request)
    assert np.abs(expected - plain).mean() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_does_not_depend_on_its_neighbours(load_model, family):
    """Neither its pixels, nor its prompt's embedding, which is encoded among three others."""
    model = load_model(family)
    first = replace(REQUESTS[0], **COMPILED)
    others = [replace(first, prompt="two blue stars " * n, seed=n) for n in range(3)]
    (alone,) = model.generate([first], batch_size=BATCH_SIZE)
    among = model.generate([*others, first], batch_size=BATCH_SIZE)[-1]
    np.testing.assert_array_equal(alone.pixels, among.pixels)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_small_checkpoints_follow_the_prompt(load_model, family):
    """Ensures that the comparisons above compare more than noise."""
    model = load_model(family)
    asked = [
        jaxdiff.Request(prompt=prompt, guidance_scale=3.0, **COMPILED)
        for prompt in ("a red ring", "five stars on the left of a black circle")
    ]
    pixels = [image.pixels.astype(int) for image in model.generate(asked, BATCH_SIZE)]
    assert np.abs(pixels[0] - pixels[1]).mean() > 1
    assert all(30 < image.std() < 100 for image in pixels)


@pytest.mark.parametrize("family", NAMES)
def test_defaults_are_the_pipelines(checkpoint, family):
    """Checks the size, the steps and the guidance scale that `__call__` has without arguments."""
    opened = open_checkpoint(checkpoint(family))
    call = inspect.signature(getattr(diffusers, opened.pipeline).__call__).parameters
    defaults = opened.defaults
    if family not in ("FLUX.1 schnell", "FLUX.2 klein"):  # distilled: see their cards
        assert defaults.steps == call["num_inference_steps"].default
        scale = call[SCALES.get(family, "guidance_scale")].default + (family == "Z-Image")
        assert defaults.guidance_scale == scale


@pytest.mark.slow
def test_the_bundled_transformer_gives_the_same_images(record_property):
    """Loaded by diffusers as any Stable Diffusion 3 without T5; at its own steps and guidance."""
    directory = BUNDLED["shapes64-flow"]
    model = jaxdiff.load("shapes64-flow", noise="torch")
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        directory, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    defaults = model.checkpoint.defaults
    prompts = (
        "a circle",
        "two green rings",
        "a red star above a blue square on a white background",
    )
    differences = []
    for seed, prompt in enumerate(prompts):
        request = model.resolve(jaxdiff.Request(prompt=prompt, seed=seed))
        assert (request.steps, request.guidance_scale) == (20, defaults.guidance_scale)
        (image,) = model.generate([request])
        theirs = their_pixels(pipeline, "Stable Diffusion 3", request)
        differences.append(np.abs(image.pixels.astype(int) - theirs))
    largest, mean = max(map(np.max, differences)), max(map(np.mean, differences))
    record_property("difference", f"{largest} {mean:.4f}")
    assert largest <= 2
    assert mean <= 0.2
