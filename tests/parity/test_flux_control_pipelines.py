"""Images of FLUX.1 that a control image steers are those of the diffusers pipelines."""

from functools import cache

import numpy as np
import pytest

import jaxdiff
from jaxdiff.errors import InputError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import transformer_families  # noqa: E402  (beside this file)
from PIL import Image  # noqa: E402
from test_image_pipelines import PROMPTS, SIZE, mask, picture  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

DEV, CONTROL = "FLUX.1 dev", "controlled FLUX.1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a function that makes a family's small checkpoint, written by diffusers."""
    return cache(
        lambda family: transformer_families.save(family, tmp_path_factory.mktemp("family"))
    )


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> list[str]:
    """Two small ControlNets for FLUX.1 dev."""
    folder = tmp_path_factory.mktemp("nets")
    return [
        str(transformer_families.save_flux_controlnet(folder / str(seed), seed)) for seed in (1, 2)
    ]


@pytest.fixture(scope="module")
def union(tmp_path_factory) -> str:
    """A small ControlNet for FLUX.1 dev that knows three kinds of images."""
    folder = tmp_path_factory.mktemp("union")
    return str(transformer_families.save_flux_controlnet(folder / "net", 3, num_mode=3))


@pytest.fixture
def assert_same(checkpoint, nets, record_property):
    """Returns a function that makes two images in both libraries and compares them."""

    def assert_same(pipeline, family=DEV, count=1, union=None, **changes):
        asked = [request(seed, count=count or 1, **changes) for seed in range(len(PROMPTS))]
        used, more = [union] if union else nets[:count], {}
        if used:
            loaded = [diffusers.FluxControlNetModel.from_pretrained(net) for net in used]
            more["controlnet"] = loaded if count > 1 else loaded[0]
        reference = getattr(diffusers, pipeline).from_pretrained(
            checkpoint(family), dtype=torch.float32, **more
        )
        reference.set_progress_bar_config(disable=True)
        theirs = np.stack([their_pixels(reference, each) for each in asked])
        model = jaxdiff.load(
            checkpoint(family), controlnet=used, noise="torch", keep_unmasked="off"
        )
        ours = np.stack([image.pixels for image in model.generate(asked, batch_size=2)])
        differences = np.abs(ours.astype(int) - theirs)
        record_property("difference", f"{differences.max()} {differences.mean():.4f}")
        assert differences.max() <= 2
        assert differences.mean() <= 0.2

    return assert_same


def request(seed: int, *, count: int = 1, **changes) -> jaxdiff.Request:
    """A request for one of the two images, with so many control images."""
    return jaxdiff.Request(
        prompt=PROMPTS[seed],
        seed=seed,
        control_image=[picture(seed + 4 + net) for net in range(count)],
        width=SIZE[0],
        height=SIZE[1],
        **{
            "steps": 4,
            "guidance_scale": 3.0,
            **{name: value(seed) if callable(value) else value for name, value in changes.items()},
        },
    )


def their_pixels(pipeline, request: jaxdiff.Request) -> np.ndarray:
    """What a user of diffusers gets, who passes pictures of the right size."""
    seen = [Image.fromarray(image) for image in request.control_image]
    words = {
        "prompt": request.prompt,
        "control_image": seen if len(seen) > 1 else seen[0],
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "width": request.width,
        "height": request.height,
    }
    for name in (
        *("strength", "control_guidance_start", "control_guidance_end"),
        *("controlnet_conditioning_scale", "control_mode"),
    ):
        value = getattr(request, name)
        if isinstance(value, tuple):
            value = [*value] if len(value) > 1 else value[0]
        if value is not None:
            words[name] = value
    if request.control_mode is not None:  # without a list, the pipeline drops all but one image
        words["control_guidance_end"] = [1.0] * len(seen)
    if request.image is not None:
        words["image"] = Image.fromarray(request.image)
    if request.mask_image is not None:
        words["mask_image"] = Image.fromarray(request.mask_image.astype(np.uint8) * 255)
    return np.asarray(pipeline(**words).images[0]).astype(int)


def test_a_net_in_a_part_of_the_steps(assert_same):
    assert_same(
        "FluxControlNetPipeline",
        steps=5,
        control_guidance_start=0.2,
        control_guidance_end=0.8,
        controlnet_conditioning_scale=1.3,
    )


def test_two_nets_with_their_scales(assert_same):
    assert_same("FluxControlNetPipeline", count=2, controlnet_conditioning_scale=[0.4, 1.3])


def test_a_net_and_a_mask(assert_same):
    assert_same(
        "FluxControlNetInpaintPipeline",
        image=picture,
        mask_image=mask,
        strength=0.7,
        controlnet_conditioning_scale=1.0,
    )


def test_a_union_net_that_sees_images_of_two_kinds(assert_same, union):
    scales = {"controlnet_conditioning_scale": [0.4, 1.3]}
    assert_same("FluxControlNetPipeline", count=2, union=union, control_mode=[2, 0], **scales)


def test_a_model_that_sees_the_control_image_itself(assert_same):
    assert_same("FluxControlPipeline", CONTROL, count=0)


def test_an_image_does_not_depend_on_its_neighbours(checkpoint, nets):
    """With latents of control images that are encoded for a batch."""
    for family, controlnet in ((DEV, nets[:1]), (CONTROL, [])):
        model = jaxdiff.load(checkpoint(family), controlnet=controlnet, noise="torch")
        first, second = (request(seed) for seed in range(2))
        together = model.generate([first, second, first], batch_size=2)
        (alone,) = model.generate([first], batch_size=2)
        assert [np.array_equal(alone.pixels, image.pixels) for image in together] == [1, 0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_image": None}, "this model follows a control image: give it control_image"),
        ({"control_image": [picture(0)] * 2}, "has 2 images, but this model sees one"),
        ({"image": picture(0)}, "this model takes no images; leave image out"),
        ({"control_guidance_end": 0.5}, "control_guidance_end is for ControlNets"),
        ({"control_mode": 0}, "control_mode is for ControlNets"),
    ],
)
def test_requests_that_a_model_with_control_cannot_fulfil(checkpoint, changes, message):
    values = {**vars(request(0)), **changes}
    with pytest.raises(InputError, match=message):
        jaxdiff.load(checkpoint(CONTROL)).resolve(jaxdiff.Request(**values))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"joint_attention_dim": 48}, "joint_attention_dim = 48 does not fit the model"),
        ({"conditioning_embedding_channels": 16, "patch_size": 2}, "the ControlNet sees pixels"),
    ],
)
def test_nets_of_other_kinds_are_refused(checkpoint, tmp_path, config, message):
    net = transformer_families.save_flux_controlnet(tmp_path / "net", 0, **config)
    with pytest.raises(InputError, match=message):
        jaxdiff.load(checkpoint(DEV), controlnet=str(net))


def test_nets_and_options_for_other_models_are_refused(checkpoint, nets):
    for model, options, message in (
        ("shapes64", {"controlnet": nets[0]}, "the ControlNet is a FluxControlNetModel"),
        (checkpoint(DEV), {"controlnet": "shapes64-outlines"}, "is a ControlNetModel, and this"),
        (checkpoint(CONTROL), {"controlnet": nets[0]}, "not with FLUX.1 Control"),
        (checkpoint(DEV), {"controlnet": nets[0], "guess_mode": "on"}, "no effect on FLUX.1 dev"),
    ):
        with pytest.raises(InputError, match=message):
            jaxdiff.load(model, **options)
