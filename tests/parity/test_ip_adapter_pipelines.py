"""Images with image prompts are those of the diffusers pipelines with IP-Adapters."""

import numpy as np
import pytest

import jaxdiff

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import families  # noqa: E402  (beside this file)
from cases import further  # noqa: E402
from PIL import Image  # noqa: E402
from test_image_pipelines import PROMPTS, SIZE, picture  # noqa: E402
from test_ip_adapters import write  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

PIPELINES = {
    "SD 1.5": (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline),
    "SDXL": (diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLImg2ImgPipeline),
}


def large(seed: int) -> np.ndarray:
    """A picture that is neither square nor of the encoder's size."""
    image = Image.fromarray(picture(seed)).resize((90, 70), Image.Resampling.BICUBIC)
    return np.asarray(image)


@pytest.mark.parametrize(
    ("family", "kinds", "begins", "changes"),
    [
        further("SD 1.5", ("plain",), False, {}),
        ("SD 1.5", ("plus",), True, {"strength": 0.7}),
        ("SD 1.5", ("plain", "plus"), False, {"ip_adapter_scale": [0.4, 0.9]}),
        further("SD 1.5", ("full-face",), False, {"guidance_scale": 1.0}),
        further("SDXL", ("plus",), False, {"ip_adapter_scale": 0.5}),
        ("SDXL", ("plain",), True, {"strength": 0.7}),
    ],
)
def test_images(tmp_path, record_property, family, kinds, begins, changes):
    model = families.save(family, tmp_path / "model")
    pipeline = PIPELINES[family][begins].from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    # Where diffusers 0.42 looks for the final norm; transformers 5.6 moved it.
    vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    files = write(tmp_path, pipeline.unet, *kinds)
    asked = [
        jaxdiff.Request(
            prompt=prompt,
            negative_prompt="black",
            seed=seed,
            ip_adapter_image=[large(seed + place) for place in range(len(kinds))],
            image=picture(seed + 5) if begins else None,
            width=SIZE[0],
            height=SIZE[1],
            **{"steps": 4, "guidance_scale": 3.0, **changes},
        )
        for seed, prompt in enumerate(PROMPTS)
    ]
    ours = jaxdiff.load(model, ip_adapter=files, noise="torch").generate(asked, batch_size=2)
    pipeline.load_ip_adapter(tmp_path, subfolder="", weight_name=[file.name for file in files])
    pipeline.set_ip_adapter_scale(changes.get("ip_adapter_scale", [1.0] * len(kinds)))
    theirs = [their_pixels(pipeline, request) for request in asked]
    differences = np.abs(np.stack([image.pixels for image in ours]).astype(int) - theirs)
    record_property("difference", f"{differences.max()} {differences.mean():.4f}")
    assert differences.max() <= 2
    assert differences.mean() <= 0.2


def their_pixels(pipeline, request) -> np.ndarray:
    words = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "ip_adapter_image": [Image.fromarray(image) for image in request.ip_adapter_image],
    }
    if request.image is None:
        words |= {"width": request.width, "height": request.height}
    else:
        words |= {"image": Image.fromarray(request.image), "strength": request.strength}
    return np.asarray(pipeline(**words).images[0]).astype(int)
