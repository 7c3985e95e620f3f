"""Images of two passes are those of two diffusers pipelines, one after the other.

The windows of the second pass, which diffusers has not, are put around its networks.
"""

from collections.abc import Callable

import numpy as np
import pytest

import jaxdiff

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import families  # noqa: E402  (beside this file)
import transformer_families  # noqa: E402
from cases import further  # noqa: E402
from PIL import Image  # noqa: E402
from test_image_pipelines import PROMPTS, picture  # noqa: E402
from test_pipeline import SCHEDULERS  # noqa: E402

from jaxdiff.images import fitting, tiles  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compiled_faster"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PIPELINES = {  # for text, and for images
    "SD 1.5": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    "SDXL": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    "SDXL with a net": (
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
    ),
    "Stable Diffusion 3": ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
}
STRENGTH, STEPS, GUIDANCE = 0.6, 5, 3.0


@pytest.fixture
def assert_same(tmp_path, record_property):
    """Returns a function that makes two images in both libraries and compares them."""

    def assert_same(family, size, factor, sampler=None, tiling=None, **options):
        saved = transformer_families if family == "Stable Diffusion 3" else families
        model = saved.save(family.removesuffix(" with a net"), tmp_path / "model")
        nets = []
        if family.endswith("a net"):
            nets = [families.save_controlnet("SDXL", tmp_path / "net")]
        asked = [
            jaxdiff.Request(
                prompt=prompt,
                seed=seed,
                width=size[0],
                height=size[1],
                steps=STEPS,
                guidance_scale=GUIDANCE,
                sampler=sampler,
                control_image=[Image.fromarray(picture(seed)).resize(size)] if nets else None,
            )
            for seed, prompt in enumerate(PROMPTS)
        ]
        upscale = f"latent:{factor:g},strength={STRENGTH:g}"
        loaded = jaxdiff.load(
            model, controlnet=[*map(str, nets)], upscale=upscale, noise="torch", **options
        )
        ours = np.stack([image.pixels for image in loaded.generate(asked, batch_size=2)])
        pipelines = references(model, PIPELINES[family], nets, sampler)
        theirs = [their_pixels(*pipelines, request, factor, tiling) for request in asked]
        differences = np.abs(ours.astype(int) - np.stack(theirs))
        record_property("difference", f"{differences.max()} {differences.mean():.4f}")
        assert ours.shape[1:3] == tuple(round(factor * side) for side in size[::-1])
        assert differences.max() <= 2
        assert differences.mean() <= 0.2

    return assert_same


def references(model, names, nets, sampler) -> list:
    words = {"controlnet": diffusers.ControlNetModel.from_pretrained(nets[0])} if nets else {}
    first = getattr(diffusers, names[0]).from_pretrained(model, dtype=torch.float32, **words)
    if sampler:
        scheduler, named = SCHEDULERS[sampler]
        first.scheduler = scheduler.from_config(first.scheduler.config, **named)
    if hasattr(first, "unet"):
        # Where diffusers 0.42 looks for the final norm; transformers 5.6 moved it.
        vars(first.text_encoder)["text_model"] = first.text_encoder
    pipelines = [first, getattr(diffusers, names[1])(**first.components)]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def their_pixels(first, second, request, factor, tiling) -> np.ndarray:
    """What a user of diffusers gets who enlarges the latents of one pipeline for another."""
    words = {
        "prompt": request.prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
    }
    size = {"width": request.width, "height": request.height}
    control = request.control_image and request.control_image[0]
    seen = {"image": control} if control else {}
    latents = first(
        **words, **size, **seen, generator=generator(request), output_type="latent"
    ).images
    larger = [round(factor * side) for side in (request.height, request.width)]
    latents = torch.nn.functional.interpolate(
        latents, size=[side // 8 for side in larger], mode="bilinear"
    )
    words |= {"image": latents, "strength": STRENGTH, "generator": generator(request)}
    if control:
        words["controlnet_conditioning_scale"] = 1.0  # the default of the first alone
        words["control_image"] = Image.fromarray(fitting.fitted(np.asarray(control), *larger))
    if isinstance(second, diffusers.StableDiffusion3Img2ImgPipeline):
        words |= {"height": larger[0], "width": larger[1]}
    if tiling:
        if isinstance(second, diffusers.StableDiffusionXLImg2ImgPipeline) or control:
            side = (8 * tiling.height, 8 * tiling.width)
            words |= {"original_size": side, "target_size": side}
        with windows(second, tiling):
            return np.asarray(second(**words).images[0])
    return np.asarray(second(**words).images[0])


def generator(request) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(request.seed)


class windows:
    """Lets a pipeline's networks see windows of the latents, whose noise is averaged by weight."""

    def __init__(self, pipeline, tiling):
        self.networks = [pipeline.unet]
        if hasattr(pipeline, "controlnet"):
            self.networks.append(pipeline.controlnet)
        self.tiling = tiling

    def __enter__(self):
        self.forwards = [network.forward for network in self.networks]
        unet, *net = self.forwards
        self.networks[0].forward = self.fused(unet, *net)
        if net:  # it is evaluated with each window of the U-Net instead
            self.networks[1].forward = lambda *given, **named: ((given, named), None)

    def __exit__(self, *_):
        for network, forward in zip(self.networks, self.forwards, strict=True):
            network.forward = forward

    def fused(self, unet: Callable, net: Callable | None = None) -> Callable:
        tiling = self.tiling
        down, across = (
            tiles.weights(starts, side, overlap=side // 4, margin=0)
            for starts, side in ((tiling.tops, tiling.height), (tiling.lefts, tiling.width))
        )

        def forward(sample, timestep, down_block_additional_residuals=None, **named):
            total = torch.zeros_like(sample)
            for row, column in tiling.places:
                top, left = tiling.tops[row], tiling.lefts[column]
                rows, columns = (
                    slice(top, top + tiling.height),
                    slice(left, left + tiling.width),
                )
                crop = sample[..., rows, columns]
                if net is not None:
                    (_, _), more = down_block_additional_residuals
                    pixels = [slice(8 * part.start, 8 * part.stop) for part in (rows, columns)]
                    image = more["controlnet_cond"][..., *pixels]
                    residuals, middle = net(crop, timestep, **{**more, "controlnet_cond": image})
                    named["down_block_additional_residuals"] = residuals
                    named["mid_block_additional_residual"] = middle
                (noise,) = unet(crop, timestep, **named)
                weight = np.outer(down[row], across[column])
                total[..., rows, columns] += torch.from_numpy(weight) * noise
            return (total,)

        return forward


@pytest.mark.parametrize(
    ("family", "size", "factor"),
    [
        ("SDXL", (32, 32), 1.25),
        ("Stable Diffusion 3", (64, 64), 1.5),
        further("SD 1.5", (32, 32), 1.5),
    ],
)
def test_a_larger_image_that_the_model_sees_whole(assert_same, family, size, factor):
    assert_same(family, size, factor)


@pytest.mark.parametrize("sampler", ["euler_ancestral", further("heun")])
def test_samplers(assert_same, sampler):
    assert_same("SD 1.5", (32, 32), 2, sampler)


@pytest.mark.parametrize("family", ["SDXL with a net", further("SD 1.5"), further("SDXL")])
def test_windows(assert_same, family):
    """They are as large as the model's own images or the first pass, whichever is larger."""
    tiling = tiles.windows(12, 20, 8, 10)
    assert (len(tiling.tops), len(tiling.lefts)) == (2, 3)
    assert_same(family, (80, 48), 2, tiling=tiling)
