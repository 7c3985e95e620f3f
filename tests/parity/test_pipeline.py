"""A directory that we write runs in diffusers, and one request gives the same image in both."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxdiff
from jaxdiff.checkpoint.layout import BUNDLED

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
REQUESTS = [
    jaxdiff.Request(prompt="a red circle", seed=0),
    jaxdiff.Request(prompt="two blue stars", negative_prompt="a ring", seed=1, guidance_scale=7.5),
    jaxdiff.Request(prompt="", negative_prompt="black", seed=2**32 - 1, guidance_scale=3.0),
    jaxdiff.Request(prompt="naïve, 日本; " * 9, seed=3, guidance_scale=1.5),  # too long: cut
]
PROMPTS = [
    "a circle",
    "a purple star",
    "a square and a ring",
    "three triangles",
    "five green crosses on a black background",
    "a star above a circle",
    "an orange ring and a blue square",
    "a red circle left of a cyan triangle on a white background",
]


def reference_pipeline(directory):
    """The directory in diffusers, opened as its users open it."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
    return reference_pipeline(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return jaxdiff.load(tiny_checkpoint, noise="torch")


def their_pixels(pipeline, request):
    pipeline.scheduler = SCHEDULERS[request.sampler].from_config(pipeline.scheduler.config)
    (image,) = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).images
    return np.asarray(image)


def largest_difference(model, pipeline, requests) -> int:
    """In 8-bit steps, over all pixels of all images."""
    return max(
        np.abs(image.pixels.astype(int) - their_pixels(pipeline, image.request)).max()
        for image in model.generate(requests, batch_size=4)
    )


def test_the_tiny_model_listens_to_its_prompt(model):
    """Else the comparisons below would compare little but noise."""
    one, other = model.generate(
        [jaxdiff.Request(prompt=p, steps=6, sampler="ddim") for p in ("a ring", "five stars")]
    )
    assert np.abs(one.pixels.astype(int) - other.pixels).mean() > 8


@pytest.mark.parametrize(
    "changes",
    [
        *({"sampler": sampler} for sampler in SCHEDULERS),
        {"sampler": "dpmpp_2m", "steps": 1},
        {"sampler": "ddim", "guidance_scale": 1.0},
        {"sampler": "euler", "width": 72, "height": 40},
    ],
    ids=str,
)
def test_the_same_noise_gives_the_same_image(model, pipeline, changes):
    requests = [replace(request, **{"steps": 6, **changes}) for request in REQUESTS]
    assert largest_difference(model, pipeline, requests) <= 2


def test_weights_stored_as_float16_are_computed_with_in_float32(tiny_checkpoint, tmp_path):
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "half")
    for file in directory.glob("*/*.safetensors"):
        half = {key: tensor.astype(np.float16) for key, tensor in load_file(file).items()}
        save_file(half, file, metadata={"format": "pt"})
    pipeline = reference_pipeline(directory)
    for component in ("text_encoder", "unet", "vae"):
        assert getattr(pipeline, component).dtype == torch.float32
    requests = [replace(request, steps=6, sampler="ddim") for request in REQUESTS]
    model = jaxdiff.load(directory, noise="torch")
    assert largest_difference(model, pipeline, requests) <= 2


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_bundled_model_gives_the_same_images(sampler):
    requests = [
        jaxdiff.Request(prompt=prompt, seed=seed, sampler=sampler)
        for seed, prompt in enumerate(PROMPTS)
    ]
    model = jaxdiff.load("shapes64", noise="torch")
    assert largest_difference(model, reference_pipeline(BUNDLED["shapes64"]), requests) <= 2
