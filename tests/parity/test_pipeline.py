"""With the same seed, every family makes the same image as its diffusers pipeline."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

import jaxdiff
from jaxdiff.checkpoint.checkpoint import BUNDLED

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import families  # noqa: E402  (beside this file)
from cases import further  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

# The scheduler that a user of diffusers chooses for each of our samplers.
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}
REQUESTS = [
    jaxdiff.Request(prompt="a red circle", seed=0),
    jaxdiff.Request(prompt="two blue stars", negative_prompt="a ring", seed=1, guidance_scale=7.5),
    jaxdiff.Request(prompt="", negative_prompt="black", seed=2**32 - 1, guidance_scale=3.0),
    jaxdiff.Request(prompt="naïve, 日本; " * 9, seed=3, guidance_scale=1.5),  # truncated
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a function that makes a family's small checkpoint, written by diffusers."""

    @cache
    def checkpoint(family):
        return families.save(family, tmp_path_factory.mktemp("family"))

    return checkpoint


@pytest.fixture(scope="module")
def load_model():
    """Returns `jaxdiff.load` with torch's noise, called once for each set of arguments."""
    return cache(partial(jaxdiff.load, noise="torch"))


@pytest.fixture(scope="module")
def load_reference():
    """Returns a function that opens a directory in diffusers with the scheduler of a sampler."""

    @cache
    def load(directory, variant):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            directory, variant=variant, dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        if encoder := getattr(pipeline, "text_encoder", None):
            # Where diffusers 0.42 looks for the final norm; transformers 5.6 moved it.
            vars(encoder)["text_model"] = encoder
        return pipeline, pipeline.scheduler

    def load_reference(directory, sampler=None, changes=None, variant=None):
        pipeline, scheduler = load(directory, variant)
        scheduler_class, named = SCHEDULERS[sampler] if sampler else (type(scheduler), {})
        changes = {**named, **(changes or {})}
        pipeline.scheduler = scheduler_class.from_config(scheduler.config, **changes)
        return pipeline

    return load_reference


def in_their_words(request):
    """Converts a request to a pipeline's arguments; the rest keep the pipeline's defaults."""
    words = {
        "negative_prompt": request.negative_prompt or None,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
    }
    return {
        "prompt": request.prompt,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        **{name: value for name, value in words.items() if value is not None},
    }


def their_pixels(pipeline, request, **options):
    size = {"width": request.width, "height": request.height}
    return np.asarray(pipeline(**in_their_words(request), **size, **options).images[0])


@pytest.fixture
def assert_same_images(record_property):
    """Returns a function that compares a model's images with diffusers', within fixed bounds."""

    def assert_same_images(model, their_pixels, requests):
        images = model.generate(requests, batch_size=4)
        differences = [
            np.abs(image.pixels.astype(int) - their_pixels(request))
            for image, request in zip(images, requests, strict=True)
        ]
        largest = max(int(difference.max()) for difference in differences)
        mean = max(float(difference.mean()) for difference in differences)
        record_property("difference", f"{largest} {mean:.4f}")
        assert largest <= 2
        assert mean <= 0.2

    return assert_same_images


@pytest.fixture
def compare(load_model, load_reference, assert_same_images):
    """Returns a function that makes `requests` in both libraries and compares the images.

    `changes` apply to the scheduler's file; `options` have the same names in `jaxdiff.load` and in
    the pipelines' calls.
    """

    def compare(directory, requests, *, changes=None, variant=None, **options):
        words = ", ".join(f"{name}={str(value).lower()}" for name, value in (changes or {}).items())
        model = load_model(directory, scheduler=words, variant=variant, **options)
        pipeline = load_reference(directory, requests[0].sampler, changes, variant)
        assert_same_images(model, partial(their_pixels, pipeline, **options), requests)

    return compare


def requests(sampler=None, **changes):
    """Returns four requests of five evaluations of the network, unless `changes` set the steps."""
    steps = {"pndm": 4, "heun": 3}.get(sampler, 5)  # so that the programs are compiled once
    return [
        replace(request, **{"sampler": sampler, "steps": steps, **changes}) for request in REQUESTS
    ]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("SD 1.5", {"steps": 4}),
        ("SD 2.1 base", {}),
        ("SD 2.1", {}),
        ("SDXL", {}),
        ("LCM", {"steps": None}),  # its four steps; the scale is an input of the network
        ("SD-Turbo", {"steps": 1, "guidance_scale": 0.0}),
        further("SDXL-Turbo", {"steps": 4, "guidance_scale": 0.0}),
    ],
    ids=str,
)
def test_families_with_their_own_schedulers(checkpoint, compare, family, changes):
    compare(checkpoint(family), requests(**changes))


@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        *(("SD 1.5", sampler) for sampler in ("ddpm", "heun", "dpmpp_2m_sde", "unipc")),
        *(further("SD 1.5", sampler) for sampler in ("ddim", "pndm", "euler", "euler_ancestral")),
        *(further("SD 1.5", sampler) for sampler in ("dpmpp_2m", "lcm")),
        ("SDXL", "euler"),
        further("SDXL", "dpmpp_2m"),
    ],
)
def test_samplers(checkpoint, compare, family, sampler):
    compare(checkpoint(family), requests(sampler))


@pytest.mark.parametrize(
    ("family", "sampler", "changes"),
    [
        further("SD 1.5", "dpmpp_2m", {"use_karras_sigmas": True}),
        ("SD 1.5", "euler", {"use_exponential_sigmas": True, "timestep_spacing": "trailing"}),
        ("SDXL", "dpmpp_2m_sde", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
        further("SDXL", "ddim", {"timestep_spacing": "linspace", "set_alpha_to_one": True}),
    ],
    ids=str,
)
def test_changes_to_the_scheduler(checkpoint, compare, family, sampler, changes):
    compare(checkpoint(family), requests(sampler), changes=changes)


@pytest.mark.parametrize(("family", "eta"), [("SD 1.5", 0.3), further("SDXL", 1.0)])
def test_eta(checkpoint, compare, family, eta):
    compare(checkpoint(family), requests("ddim"), eta=eta)


@pytest.mark.parametrize(
    ("family", "clip_skip"), [("SD 1.5", 2), ("SDXL", 1), further("SD 1.5", 1), further("SDXL", 2)]
)
def test_clip_skip(checkpoint, compare, family, clip_skip):
    """diffusers skips layers for the prompt, but never for the negative prompt."""
    compare(checkpoint(family), requests("ddim"), clip_skip=clip_skip)


def test_long_prompts_in_chunks(checkpoint, load_model, load_reference, assert_same_images):
    """Users of diffusers encode each chunk separately and pass the embeddings on."""
    pipeline = load_reference(checkpoint("SD 1.5"), "ddim")
    tokenizer, room = pipeline.tokenizer, pipeline.tokenizer.model_max_length - 2

    def embed(text):
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        parts = [words[start : start + room] for start in (0, room)]
        ids = [[tokenizer.bos_token_id, *part, tokenizer.eos_token_id] for part in parts]
        ids = [row + [tokenizer.pad_token_id] * (room + 2 - len(row)) for row in ids]
        with torch.no_grad():
            return pipeline.text_encoder(torch.tensor(ids))[0].reshape(1, 2 * (room + 2), -1)

    def their_pixels(request):
        words = in_their_words(request)
        words = {name: words[name] for name in words if not name.endswith("prompt")}
        embeddings = embed(request.prompt), embed(request.negative_prompt)
        names = ("prompt_embeds", "negative_prompt_embeds")
        return np.asarray(pipeline(**words, **dict(zip(names, embeddings, strict=True))).images[0])

    model = load_model(checkpoint("SD 1.5"), prompt_chunks=2)
    assert_same_images(model, their_pixels, requests("ddim"))


def test_guidance_rescale(checkpoint, compare):
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    compare(checkpoint("SD 2.1"), requests(), changes=changes, guidance_rescale=0.7)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("SD 1.5", {"guidance_scale": 1.0}),
        ("SDXL", {"guidance_scale": 1.0, "sampler": "euler_ancestral", "steps": 4}),
        further("SD 1.5", {"width": 72, "height": 40}),
        ("SDXL", {"width": 72, "height": 40}),
    ],
    ids=str,
)
def test_no_guidance_and_odd_sizes(checkpoint, compare, family, changes):
    compare(checkpoint(family), requests(**{"sampler": "ddim", **changes}))


@pytest.mark.parametrize(
    ("family", "variant", "dtype"),
    [("SD 1.5", "fp16", torch.float16), further("SDXL", "bf16", torch.bfloat16)],
)
def test_variant_files_are_computed_in_float32(
    checkpoint, compare, load_reference, tmp_path, family, variant, dtype
):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(checkpoint(family), dtype=dtype)
    pipeline.save_pretrained(tmp_path, variant=variant)
    pipeline = load_reference(tmp_path, variant=variant)
    assert {pipeline.text_encoder.dtype, pipeline.unet.dtype} == {torch.float32}
    compare(tmp_path, requests("ddim"), variant=variant)


# Not heun: diffusers ends the base in the middle of a step, which the refiner then repeats.
@pytest.mark.parametrize(
    "sampler", ["dpmpp_2m", further("ddim"), further("euler"), further("unipc")]
)
def test_a_base_and_its_refiner(
    checkpoint, load_model, load_reference, assert_same_images, sampler
):
    directories = checkpoint("SDXL"), checkpoint("SDXL refiner")
    base, refiner = (load_reference(directory, sampler) for directory in directories)

    def their_pixels(request):
        words = in_their_words(request)
        latents = base(**words, denoising_end=0.8, output_type="latent").images
        return np.asarray(refiner(**words, image=latents, denoising_start=0.8).images[0])

    model = load_model(directories[0], refiner=directories[1], refiner_start=0.8)
    assert_same_images(model, their_pixels, requests(sampler))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(families.FAMILIES.keys() - {"SDXL refiner"}))
def test_the_small_checkpoints_follow_the_prompt(checkpoint, load_reference, family):
    """Ensures that the comparisons above compare more than noise."""
    pipeline = load_reference(checkpoint(family))
    images = [
        their_pixels(pipeline, jaxdiff.Request(prompt=prompt, seed=0, steps=4)).astype(int)
        for prompt in ("a ring", "five stars")
    ]
    assert np.abs(images[0] - images[1]).mean() > 3
    assert all(30 < image.std() < 100 for image in images)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", further("ddim"), further("euler_ancestral")])
def test_the_bundled_model_gives_the_same_images(compare, sampler):
    """Tests a directory that jaxdiff wrote, with trained weights."""
    settings = {"sampler": sampler, "steps": 20, "guidance_scale": 3.0}
    compare(
        BUNDLED["shapes64"],
        [jaxdiff.Request(prompt=text, seed=i, **settings) for i, text in enumerate(PROMPTS)],
    )


def test_the_bundled_student_gives_the_same_images(compare):
    """Uses its four steps and the sampler that its scheduler names."""
    settings = {"sampler": "euler_ancestral", "steps": 4, "guidance_scale": 2.0}
    compare(
        BUNDLED["shapes64-4step"],
        [jaxdiff.Request(prompt=text, seed=i, **settings) for i, text in enumerate(PROMPTS)],
    )
