"""Images that begin with another image are those of the diffusers pipelines."""

from functools import cache

import numpy as np
import pytest

import jaxdiff

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import families  # noqa: E402  (beside this file)
import transformer_families  # noqa: E402
from cases import further  # noqa: E402
from PIL import Image  # noqa: E402
from test_pipeline import SCHEDULERS  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compiled_faster"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

TRANSFORMERS = {  # their pipelines for images, and for masks
    "FLUX.1 dev": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "Stable Diffusion 3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "Qwen-Image": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    "Z-Image": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    "inpainting FLUX.1": (None, "FluxFillPipeline"),
}
U_NETS = {
    "SD 1.5": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "SD 2.1": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "SDXL": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "inpainting SD 1.5": (None, "StableDiffusionInpaintPipeline"),
    "inpainting SDXL": (None, "StableDiffusionXLInpaintPipeline"),
}
SIZE = (64, 48)  # width, height
PROMPTS = ("a red circle", "two blue stars")


def picture(seed: int) -> np.ndarray:
    """A smooth picture with an edge."""
    width, height = SIZE
    y, x = np.mgrid[:height, :width] / 16.0
    waves = [np.sin(x * (1 + seed) + c) * np.cos(y + c * seed) for c in range(3)]
    pixels = np.stack(waves, axis=-1) * 100 + 128
    pixels[height // 3 :, : width // 2] = (220, 38, 38 * seed)
    return pixels.astype(np.uint8)


def mask(seed: int) -> np.ndarray:
    """A mask whose edges do not lie on those of latents."""
    width, height = SIZE
    painted = np.zeros((height, width), bool)
    painted[11 : 37 + seed, 13:50] = True
    return painted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a function that makes a family's small checkpoint, written by diffusers."""

    @cache
    def checkpoint(family):
        saved = transformer_families if family in TRANSFORMERS else families
        return saved.save(family, tmp_path_factory.mktemp("family"))

    return checkpoint


@pytest.fixture(scope="module")
def load_model(checkpoint):
    """Returns a function that loads a family's checkpoint with torch's noise."""
    return cache(
        lambda family: jaxdiff.load(checkpoint(family), noise="torch", keep_unmasked="off")
    )


@pytest.fixture(scope="module")
def load_reference(checkpoint):
    """Returns a function that opens a family's checkpoint in one of its pipelines."""

    @cache
    def load_reference(family, masked):
        name = (TRANSFORMERS | U_NETS)[family][masked]
        pipeline = getattr(diffusers, name).from_pretrained(checkpoint(family), dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if family not in TRANSFORMERS:
            # Where diffusers 0.42 looks for the final norm; transformers 5.6 moved it.
            vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
        return pipeline, pipeline.scheduler

    return load_reference


@pytest.fixture
def assert_same(load_model, load_reference, record_property):
    """Returns a function that makes two images in both libraries and compares them."""

    def assert_same(family, *, masked=False, sampler=None, strength=None, **changes):
        pipeline, scheduler = load_reference(family, masked)
        if sampler:
            scheduler_class, named = SCHEDULERS[sampler]
            pipeline.scheduler = scheduler_class.from_config(scheduler.config, **named)
        else:
            pipeline.scheduler = scheduler
        asked, theirs = [], []
        for seed, prompt in enumerate(PROMPTS):
            request = jaxdiff.Request(
                prompt=prompt,
                seed=seed,
                image=picture(seed),
                mask_image=mask(seed) if masked else None,
                strength=strength,
                width=SIZE[0],
                height=SIZE[1],
                sampler=sampler,
                **{"steps": 4, "guidance_scale": 3.0, **changes},
            )
            asked.append(request)
            theirs.append(their_pixels(pipeline, family, request))
        images = load_model(family).generate(asked, batch_size=2)
        ours = np.stack([image.pixels for image in images]).astype(int)
        differences = np.abs(ours - np.stack(theirs))
        record_property("difference", f"{differences.max()} {differences.mean():.4f}")
        assert differences.max() <= 2
        assert differences.mean() <= 0.2

    return assert_same


def their_pixels(pipeline, family, request) -> np.ndarray:
    """What a user of diffusers gets, who passes pictures of the right size."""
    scale = "true_cfg_scale" if family == "Qwen-Image" else "guidance_scale"
    words = {
        "prompt": request.prompt,
        "image": Image.fromarray(request.image),
        "num_inference_steps": request.steps,
        scale: request.guidance_scale - (family == "Z-Image"),
        "generator": torch.Generator("cpu").manual_seed(request.seed),
    }
    if family == "Qwen-Image":
        words["negative_prompt"] = ""
    if request.mask_image is not None:
        words["mask_image"] = Image.fromarray(request.mask_image.astype(np.uint8) * 255)
    if request.strength is not None:
        words["strength"] = request.strength
    if family in TRANSFORMERS or request.mask_image is not None:
        words |= {"width": request.width, "height": request.height}
    if isinstance(pipeline, diffusers.StableDiffusion3InpaintPipeline):
        # It forgets the shift of the latents when it decodes them; its other pipelines do not.
        vae = pipeline.vae
        latents = pipeline(**words, output_type="latent").images
        with torch.no_grad():
            decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor)
        return np.asarray(pipeline.image_processor.postprocess(decoded.sample)[0]).astype(int)
    return np.asarray(pipeline(**words).images[0]).astype(int)


@pytest.mark.parametrize(
    "family",
    [
        further(name) if name == "SD 2.1" else name
        for name, (images, _) in (U_NETS | TRANSFORMERS).items()
        if images
    ],
)
def test_images_to_images(assert_same, family):
    """With the pipeline's own strength."""
    assert_same(family, steps=6)


@pytest.mark.parametrize("strength", [0.5, further(0.3), further(1.0)])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_samplers(assert_same, sampler, strength):
    """At a strength of a half, 5 steps are cut after 3: a model of flow matching would cut at 2."""
    assert_same("SD 1.5", sampler=sampler, strength=strength, steps=5)


@pytest.mark.parametrize(
    ("family", "strength"), [further("FLUX.1 dev", 1.0), ("Stable Diffusion 3", 0.5)]
)
def test_strengths_of_flow_matching(assert_same, family, strength):
    assert_same(family, strength=strength, steps=5)


@pytest.mark.parametrize(
    "family",
    [
        *("SD 1.5", "SDXL", "inpainting SD 1.5"),
        *("FLUX.1 dev", "Stable Diffusion 3", "inpainting FLUX.1"),
        *map(further, ("SD 2.1", "inpainting SDXL", "Qwen-Image", "Z-Image")),
    ],
)
def test_masks(assert_same, family):
    """With the pipeline's own strength."""
    assert_same(family, masked=True)


def test_a_flow_model_for_inpainting_from_an_image(assert_same):
    assert_same("inpainting FLUX.1", masked=True, strength=0.6, steps=5)


@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        *(("SD 1.5", sampler) for sampler in ("heun", "euler_ancestral")),
        ("inpainting SD 1.5", "pndm"),
        *(further("SD 1.5", sampler) for sampler in ("pndm", "unipc")),
        further("inpainting SD 1.5", "euler_ancestral"),
    ],
)
def test_masks_and_strength(assert_same, family, sampler):
    """Samplers that go back to an earlier state, or draw noise."""
    assert_same(family, masked=True, sampler=sampler, strength=0.6)


def test_without_guidance(assert_same):
    assert_same("SD 1.5", masked=True, strength=0.5, guidance_scale=1.0)
