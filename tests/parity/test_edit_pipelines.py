"""Images that are edited by instruction are those of the diffusers pipelines."""

from functools import cache

import numpy as np
import pytest

import jaxdiff
from jaxdiff.families import flux, inspect, open_checkpoint

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import families  # noqa: E402  (beside this file)
import networks  # noqa: E402
import small_tokenizers  # noqa: E402
import transformer_families  # noqa: E402
import transformers  # noqa: E402
from cases import further  # noqa: E402
from PIL import Image  # noqa: E402
from test_image_pipelines import PROMPTS, SIZE, picture  # noqa: E402
from test_pipeline import SCHEDULERS  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (  # noqa: E402
    Qwen2VLImageProcessorPil,
)

pytestmark = pytest.mark.usefixtures("compiled_faster")

PIX2PIX, KONTEXT, QWEN = "instructed SD 1.5", "instructed FLUX.1", "instructed Qwen-Image"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a function that makes a family's small checkpoint, written by diffusers."""

    @cache
    def checkpoint(family):
        saved = families if family == PIX2PIX else transformer_families
        return saved.save(family, tmp_path_factory.mktemp("family"))

    return checkpoint


@pytest.fixture(scope="module")
def load_model(checkpoint):
    """Returns a function that loads a family's checkpoint with torch's noise."""
    return cache(lambda family: jaxdiff.load(checkpoint(family), noise="torch"))


@pytest.fixture
def assert_same(checkpoint, load_model, record_property):
    """Returns a function that edits two images in both libraries and compares them."""

    def assert_same(family, *, sampler=None, **changes):
        pipeline = opened(family, checkpoint(family))
        if sampler:
            scheduler_class, named = SCHEDULERS[sampler]
            pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **named)
        asked = [request(seed, sampler=sampler, **changes) for seed in range(len(PROMPTS))]
        theirs = np.stack([their_pixels(pipeline, each) for each in asked])
        images = load_model(family).generate(asked, batch_size=2)
        differences = np.abs(np.stack([image.pixels for image in images]).astype(int) - theirs)
        record_property("difference", f"{differences.max()} {differences.mean():.4f}")
        assert differences.max() <= 2
        assert differences.mean() <= 0.2

    return assert_same


def opened(family, folder):
    """The pipeline of a checkpoint in diffusers."""
    parts = {"processor": qwen_processor()} if family == QWEN else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if family == PIX2PIX:
        # Where diffusers 0.42 looks for the final norm; transformers 5.6 moved it.
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    if family == QWEN:
        place_images(pipeline.text_encoder)
    return pipeline


def qwen_processor() -> transformers.Qwen2VLProcessor:
    """Qwen-Image-Edit's, without the part for videos: that one needs torchvision."""
    tokenizer = small_tokenizers.qwen()
    made = transformers.Qwen2VLProcessor.__new__(transformers.Qwen2VLProcessor)
    made.image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56**2, "longest_edge": 3584**2}
    )
    made.tokenizer, made.video_processor, made.chat_template = tokenizer, None, None
    for kind in ("image", "video"):
        token = f"<|{kind}_pad|>"
        setattr(made, f"{kind}_token", token)
        setattr(made, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
    return made


def place_images(encoder) -> None:
    """Gives images the positions in rows and columns that they had in training.

    transformers 5 knows them by the processor's `mm_token_type_ids`, which diffusers 0.42 does not
    pass on: then an image's tokens have positions as if they were text.
    """
    forward, token = encoder.forward, encoder.config.image_token_id
    encoder.forward = lambda input_ids, **words: forward(
        input_ids, mm_token_type_ids=(input_ids == token).int(), **words
    )


def request(seed: int, **changes) -> jaxdiff.Request:
    """Asks for an edit of one of the pictures."""
    usual = {"steps": 4, "guidance_scale": 3.0, "width": SIZE[0], "height": SIZE[1]}
    usual |= {"prompt": PROMPTS[seed], "image": picture(seed)}
    return jaxdiff.Request(seed=seed, **{**usual, **changes})


def their_pixels(pipeline, request) -> np.ndarray:
    """What a user of diffusers gets, who passes pictures of the right size."""
    words = {
        "prompt": request.prompt,
        "image": Image.fromarray(request.image),
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
    }
    if request.negative_prompt:
        words["negative_prompt"] = request.negative_prompt
    if request.image_guidance_scale is not None:
        words["image_guidance_scale"] = request.image_guidance_scale
    if isinstance(pipeline, diffusers.FluxKontextPipeline):
        size = {"width": request.width, "height": request.height}
        words |= {**size, "max_area": request.width * request.height, "_auto_resize": False}
    if isinstance(pipeline, diffusers.QwenImageEditPipeline):
        words["true_cfg_scale"] = words.pop("guidance_scale")
        words["negative_prompt"] = request.negative_prompt
    return np.asarray(pipeline(**words).images[0]).astype(int)


@pytest.mark.parametrize(
    "sampler", ["pndm", "euler_ancestral", further("euler"), further("dpmpp_2m")]
)
def test_samplers(assert_same, sampler):
    """With the pipeline's own image guidance."""
    assert_same(PIX2PIX, sampler=sampler)


@pytest.mark.parametrize(
    ("image_guidance_scale", "guidance_scale"),
    [(2.5, 5.0), (0.8, 5.0), (2.0, 1.0), further(1.0, 5.0)],
)
def test_two_guidance_scales(assert_same, image_guidance_scale, guidance_scale):
    """Guidance is off if the image's scale is below 1, or the prompt's is not above it."""
    assert_same(
        PIX2PIX,
        image_guidance_scale=image_guidance_scale,
        guidance_scale=guidance_scale,
        negative_prompt="a blue square",
    )


@pytest.mark.parametrize("guidance_scale", [3.5, further(1.0)])
def test_kontext(assert_same, guidance_scale):
    assert_same(KONTEXT, guidance_scale=guidance_scale)


@pytest.mark.parametrize("guidance_scale", [4.0, further(1.0)])
def test_qwen_image_edit(assert_same, monkeypatch, guidance_scale):
    """At the size of the request: the pipeline makes one of about 1024x1024 of the image's."""
    width, height = SIZE
    monkeypatch.setattr(
        diffusers.pipelines.qwenimage.pipeline_qwenimage_edit,
        "calculate_dimensions",
        lambda area, ratio: (width, height, None),
    )
    assert_same(QWEN, guidance_scale=guidance_scale, negative_prompt="a ring")


def test_qwen_image_edit_encodes_prompts_with_images(checkpoint, load_model):
    """From the picture and the prompt: its size, the conversation around it, the hidden tokens."""
    pipeline, pictures = opened(QWEN, checkpoint(QWEN)), [picture(0), picture(1)]
    ours = load_model(QWEN)._sampler._denoisers[0].prompts(PROMPTS, images=pictures)
    for text, prompt, image in zip(ours, PROMPTS, pictures, strict=True):
        with torch.no_grad():
            theirs, _ = pipeline.encode_prompt(prompt, Image.fromarray(image))
        found = np.asarray(text.context)[np.asarray(text.mask)]
        assert networks.difference(found, theirs[0].numpy()) <= networks.BOUND


@pytest.mark.parametrize("family", [KONTEXT, QWEN])
def test_a_model_sees_its_own_image_only(load_model, family):
    model = load_model(family)
    _, second = model.generate([request(0), request(1)], batch_size=2)
    asked = [request(1), request(1, image=picture(5))]
    again, other = model.generate(asked, batch_size=2)
    np.testing.assert_array_equal(again.pixels, second.pixels)
    assert (other.pixels != second.pixels).any()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (PIX2PIX, "InstructPix2Pix"),
        (KONTEXT, "Kontext"),
        (QWEN, "Qwen-Image-Edit"),
    ],
)
def test_inspection(checkpoint, family, name):
    said = inspect.report(open_checkpoint(checkpoint(family)))
    assert name in said
    assert said.endswith("yes")


def test_kontext_counts_the_operations_of_both_images(checkpoint):
    kontext = open_checkpoint(checkpoint(KONTEXT))
    (both, _), (one, _), (twice, _) = (
        family.operations(kontext, height, 8, 1)
        for family, height in ((flux.FLUX_KONTEXT, 8), (flux.FLUX, 8), (flux.FLUX, 16))
    )
    assert one < both < twice  # the output is of one image
