"""Images that ControlNets steer are those of the diffusers pipelines."""

from functools import cache

import numpy as np
import pytest

import jaxdiff
from jaxdiff.checkpoint import checkpoint as checkpoints
from jaxdiff.checkpoint import controlnet as controlnets

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import families  # noqa: E402  (beside this file)
from cases import further  # noqa: E402
from PIL import Image  # noqa: E402
from test_image_pipelines import PROMPTS, SIZE, mask, picture  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

BUNDLED, UNION = "bundled", "SDXL with union nets"
PIPELINES = {  # for text, images, and masks
    "SD 1.5": (
        diffusers.StableDiffusionControlNetPipeline,
        diffusers.StableDiffusionControlNetImg2ImgPipeline,
        diffusers.StableDiffusionControlNetInpaintPipeline,
    ),
    "SD 2.1": (diffusers.StableDiffusionControlNetPipeline,),
    BUNDLED: (diffusers.StableDiffusionControlNetPipeline,),
    "SDXL": (
        diffusers.StableDiffusionXLControlNetPipeline,
        diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
        diffusers.StableDiffusionXLControlNetInpaintPipeline,
    ),
    UNION: (
        diffusers.StableDiffusionXLControlNetUnionPipeline,
        diffusers.StableDiffusionXLControlNetUnionImg2ImgPipeline,
        diffusers.StableDiffusionXLControlNetUnionInpaintPipeline,
    ),
}
KINDS = 4  # of images that a union net knows
TEXT, IMAGE, MASK = range(3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a function that makes a family's small checkpoint and two ControlNets for it."""

    @cache
    def checkpoint(family):
        if family == BUNDLED:
            return checkpoints.BUNDLED["shapes64"], controlnets.BUNDLED["shapes64-outlines"]
        folder = tmp_path_factory.mktemp("family")
        if family == UNION:
            nets = [
                families.save_controlnet("SDXL", folder / f"net{seed}", seed, KINDS)
                for seed in (1, 2)
            ]
            return checkpoint("SDXL")[0], *nets
        nets = [families.save_controlnet(family, folder / f"net{seed}", seed) for seed in (1, 2)]
        return families.save(family, folder / "model"), *nets

    return checkpoint


@pytest.fixture
def assert_same(checkpoint, record_property):
    """Returns a function that makes two images in both libraries and compares them."""

    def assert_same(family, kind=TEXT, *, nets=1, modes=(), options=None, words=None, **changes):
        model, *folders = checkpoint(family)
        folders = [str(folder) for folder in folders[:nets]]
        kind_of_net = diffusers.ControlNetUnionModel if modes else diffusers.ControlNetModel
        loaded = [kind_of_net.from_pretrained(folder) for folder in folders]
        pipeline = PIPELINES[family][kind].from_pretrained(
            model, controlnet=loaded if nets > 1 else loaded[0], dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        # Where diffusers 0.42 looks for the final norm; transformers 5.6 moved it.
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
        asked = [
            jaxdiff.Request(
                prompt=prompt,
                seed=seed,
                control_image=[picture(seed + 4 + net) for net in range(len(modes) or nets)],
                control_mode=modes or None,
                image=picture(seed) if kind else None,
                mask_image=mask(seed) if kind == MASK else None,
                width=SIZE[0],
                height=SIZE[1],
                **{"steps": 4, "guidance_scale": 3.0, **changes},
            )
            for seed, prompt in enumerate(PROMPTS)
        ]
        ours = jaxdiff.load(
            model, controlnet=folders, noise="torch", keep_unmasked="off", **(options or {})
        ).generate(asked, batch_size=2)
        theirs = [their_pixels(pipeline, request, **(words or {})) for request in asked]
        differences = np.abs(np.stack([image.pixels for image in ours]).astype(int) - theirs)
        record_property("difference", f"{differences.max()} {differences.mean():.4f}")
        assert differences.max() <= 2
        assert differences.mean() <= 0.2

    return assert_same


def their_pixels(pipeline, request, **words) -> np.ndarray:
    """What a user of diffusers gets, who passes pictures of the right size."""
    seen = [Image.fromarray(image) for image in request.control_image]
    seen = seen if len(seen) > 1 or request.control_mode else seen[0]
    words |= {
        "prompt": request.prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "width": request.width,
        "height": request.height,
    }
    scale = request.controlnet_conditioning_scale
    words["controlnet_conditioning_scale"] = 1.0 if scale is None else scale
    for name in ("strength", "control_guidance_start", "control_guidance_end"):
        if getattr(request, name) is not None:
            words[name] = getattr(request, name)
    if request.control_mode is not None:
        words |= {"control_image": seen, "control_mode": list(request.control_mode)}
        words |= {} if request.image is None else {"image": Image.fromarray(request.image)}
    elif request.image is None:
        words["image"] = seen
    else:
        words |= {"image": Image.fromarray(request.image), "control_image": seen}
    if request.mask_image is not None:
        words["mask_image"] = Image.fromarray(request.mask_image.astype(np.uint8) * 255)
    return np.asarray(pipeline(**words).images[0]).astype(int)


@pytest.mark.parametrize("family", ["SD 1.5", BUNDLED, further("SD 2.1"), further("SDXL")])
def test_text_and_a_control_image(assert_same, family):
    assert_same(family)


@pytest.mark.parametrize(("family", "kind"), [("SD 1.5", IMAGE), ("SDXL", MASK)])
def test_images_and_masks(assert_same, family, kind):
    assert_same(family, kind, strength=0.7)


def test_two_nets_with_their_scales(assert_same):
    assert_same("SD 1.5", nets=2, controlnet_conditioning_scale=[0.4, 1.3])


def test_a_part_of_the_steps(assert_same):
    assert_same("SD 1.5", steps=5, control_guidance_start=0.2, control_guidance_end=0.8)


@pytest.mark.parametrize(("family", "guidance_scale"), [further("SD 1.5", 1.0), ("SDXL", 3.0)])
def test_guess_mode(assert_same, family, guidance_scale):
    assert_same(
        family,
        options={"guess_mode": "on"},
        words={"guess_mode": True},
        guidance_scale=guidance_scale,
    )


def test_a_union_net_that_sees_images_of_two_kinds(assert_same):
    assert_same(UNION, modes=[0, 2], controlnet_conditioning_scale=[0.4, 1.3])


@pytest.mark.parametrize(("kind", "modes"), [further(IMAGE, [3]), (MASK, [1, 0])])
def test_union_nets_for_images_and_masks(assert_same, kind, modes):
    assert_same(UNION, kind, nets=len(modes), modes=modes, strength=0.7)
