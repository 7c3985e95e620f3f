import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run
from jaxdiff.images import image_files

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
PROMPT = 'ein "grüner" Stern 🌟\nzweite Zeile'
SETTINGS = {
    "prompt": PROMPT,
    "negative_prompt": "blur",
    "seed": 7,
    "width": 24,
    "height": 16,
    "steps": 20,
    "guidance_scale": 5.0,
    "sampler": "dpmpp_2m",
    "tokens_lost": 0,
    "noise": "jax",
    "dtype": "float32",
    "options": "",
    "model": "0123456789abcdef",
}
AWKWARD = [
    "一只红色的猫, قطة حمراء, 👩\u200d👩\u200d👧",
    '<a> & ]]> {} <!-- ?> &#0; "quoted"',
    "\x01\x08\x0b\x1f\x7f\x85\x9f \t\r\n \u2028\ufeff\ufffe\uffff\U0001fffe\U0010ffff",
]
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype"
PARAMETERS = (
    f"{PROMPT}\nNegative prompt: blur\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 5, Seed: 7, "
    "Size: 24x16, Model hash: 0123456789"
)
# `re_param` of the web UI, in modules/infotext_utils.py.
WEB_UI = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
# What an image without options says, as read by the web UI.
PLAIN = {"Steps": "20", "Sampler": "DPM++ 2M", "CFG scale": "5", "Seed": "7", "Size": "24x16"}
PLAIN |= {"Model hash": "0123456789"}


def opened(image_format: str, settings: dict = SETTINGS) -> Image.Image:
    image = Image.open(io.BytesIO(image_files.encode(PIXELS, settings, image_format)))
    image.load()
    return image


def test_png_stores_the_settings_in_itxt():
    text = opened("png").text
    assert text["Description"] == PROMPT
    assert text["parameters"] == PARAMETERS
    assert json.loads(text["jaxdiff"]) == SETTINGS


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_webp_and_jpeg_store_the_settings_in_exif(image_format):
    image = opened(image_format)
    comment = image.getexif().get_ifd(image_files.EXIF_IFD)[image_files.USER_COMMENT]
    assert comment == b"UNICODE\0" + PARAMETERS.encode("utf-16-be")
    description = image.getexif()[image_files.IMAGE_DESCRIPTION]
    assert description.encode("latin-1").decode() == PROMPT  # Pillow reads it as Latin-1


def read_by_the_web_ui(text: str) -> tuple[str, str, dict[str, str]]:
    """Returns what `parse_generation_parameters` of the web UI does: both prompts, the settings."""
    *lines, last = text.strip().split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    settings = {
        name: json.loads(value) if value[:1] == value[-1:] == '"' else value
        for name, value in WEB_UI.findall(last)
    }
    return prompt, negative, settings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"options": "use_karras_sigmas=true"}, {"Schedule type": "Karras"}),
        ({"options": "use_exponential_sigmas=true"}, {"Schedule type": "Exponential"}),
        ({"options": "use_beta_sigmas=true"}, {"Schedule type": "Beta"}),
        (
            {"options": "timestep_spacing=trailing"},
            {"Schedule type": "SGM Uniform", "timestep_spacing": "trailing"},
        ),
        (
            {"options": "timestep_spacing=linspace"},
            {"Schedule type": "Uniform", "timestep_spacing": "linspace"},
        ),
        ({"options": "timestep_spacing=leading"}, {"timestep_spacing": "leading"}),
        (
            {"options": "sigma_min=0.02, timestep_spacing=trailing, use_karras_sigmas=true"},
            {"Schedule type": "Karras", "sigma_min": "0.02", "timestep_spacing": "trailing"},
        ),
        ({"options": "use_karras_sigmas=false"}, {"use_karras_sigmas": "false"}),
        ({"options": "use_karras_sigmas=true", "sampler": "ddim"}, {"Sampler": "DDIM"}),
        ({"options": "shift=3.0", "sampler": "euler"}, {"Sampler": "Euler", "shift": "3.0"}),
        ({"options": "clip_skip=1"}, {"Clip skip": "2"}),
        ({"options": "eta=0.3", "sampler": "ddim"}, {"Sampler": "DDIM", "Eta DDIM": "0.3"}),
        ({"options": "eta=0.3"}, {}),  # only other images of the run use it
        ({"options": "refiner_start=0.7"}, {"Refiner switch at": "0.7"}),
        ({"noise": "torch"}, {"RNG": "CPU"}),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"model_name": "my, model"}, {"Model": "my, model"}),
        (
            {"options": "guidance_rescale=0.7, guidance_stop=0.5, prompt_chunks=3, deep_cache=2"},
            {
                **{"guidance_rescale": "0.7", "guidance_stop": "0.5"},
                **{"prompt_chunks": "3", "deep_cache": "2"},
            },
        ),
    ],
)
def test_the_web_ui_reads_the_options_that_determine_the_image(changes, expected):
    text = image_files.parameters(SETTINGS | changes)
    assert read_by_the_web_ui(text) == (PROMPT, "blur", PLAIN | expected)


def test_the_images_of_a_run_say_its_options(finished):
    said = {"scheduler": "timestep_spacing=trailing", "clip_skip": 1, "eta": 0.25}
    said |= {"sampler": "ddim", "noise": "torch", "dtype": "bfloat16", "width": 32, "height": 32}
    run = open_run(finished(**said))
    sample = next(shards.samples(run, shards.read_marker(run, 0), run.store))
    with Image.open(io.BytesIO(sample.image)) as image:
        _, _, read = read_by_the_web_ui(image.text["parameters"])
    expected = {"Schedule type": "SGM Uniform", "timestep_spacing": "trailing", "Clip skip": "2"}
    expected |= {"Eta DDIM": "0.25", "RNG": "CPU", "dtype": "bfloat16", "Model": "tiny"}
    assert {name: value for name, value in read.items() if name not in PLAIN} == expected


@pytest.mark.parametrize("negative", ["blur", ""])
def test_the_web_ui_reads_loras_from_the_prompt(negative):
    options = "clip_skip=1, lora=heart:0.5, lora=Tusche, zart:-1e-05, use_karras_sigmas=true"
    settings = SETTINGS | {"negative_prompt": negative, "options": options}
    prompt, read_negative, read = read_by_the_web_ui(image_files.parameters(settings))
    # `re_extra_net` of the web UI, in modules/extra_networks.py.
    tags = re.findall(r"<(\w+):([^>]+)>", prompt)
    assert tags == [("lora", "heart:0.5"), ("lora", "Tusche, zart:-1e-05")]
    assert prompt.startswith(f"{PROMPT} <")
    assert read_negative == negative
    assert read == PLAIN | {"Clip skip": "2", "Schedule type": "Karras"}


@pytest.mark.parametrize("name", ["a>b", "a:b", "a\nSteps: 1, x", 'a", Seed: 9, b: "', "a, eta=1"])
def test_a_lora_with_an_awkward_name_changes_no_other_setting(name):
    settings = SETTINGS | {"options": f"lora={name}:0.5, lora={name}:2", "sampler": "ddim"}
    prompt, _, read = read_by_the_web_ui(image_files.parameters(settings))
    loras = re.findall(r"<lora:([^>]+)>", prompt)
    if not loras:
        loras = [read.pop("lora")]
    assert ", ".join(loras) == f"{name}:0.5, {name}:2"
    assert read == PLAIN | {"Sampler": "DDIM"}


@pytest.mark.parametrize("text", AWKWARD)
def test_png_keeps_text_of_every_script(text):
    kept = opened("png", {**SETTINGS, "prompt": text, "negative_prompt": text}).text
    assert kept["Description"] == text
    assert kept["parameters"] == PARAMETERS.replace(PROMPT, text).replace(": blur", f": {text}")
    assert json.loads(kept["jaxdiff"])["prompt"] == text
    assert type(kept["parameters"]) is PngImagePlugin.iTXt


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_webp_and_jpeg_keep_text_of_every_script(image_format, text):
    settings = {**SETTINGS, "prompt": text, "negative_prompt": text}
    image = opened(image_format, settings)
    comment = image.getexif().get_ifd(image_files.EXIF_IFD)[image_files.USER_COMMENT]
    parameters = comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert parameters == PARAMETERS.replace(PROMPT, text).replace(": blur", f": {text}")
    (found,) = ElementTree.fromstring(image.info["xmp"].decode()).iter("{urn:jaxdiff}settings")
    assert json.loads(found.text) == settings


@pytest.mark.parametrize("text", [PROMPT, *AWKWARD])
@pytest.mark.parametrize("image_format", image_files.EXTENSIONS)
def test_every_format_has_the_digital_source_type(image_format, text):
    for settings, kind in (
        (SETTINGS, "trainedAlgorithmicMedia"),
        ({**SETTINGS, "init_image": "a.png"}, "compositeWithTrainedAlgorithmicMedia"),
    ):
        xmp = opened(image_format, {**settings, "prompt": text}).getxmp()["xmpmeta"]["RDF"]
        assert xmp["Description"]["DigitalSourceType"] == f"{SOURCE_TYPES}/{kind}"


@pytest.mark.parametrize("image_format", image_files.EXTENSIONS)
def test_the_longest_prompts_fit_into_every_format(image_format):
    long = {**SETTINGS, "prompt": "🌟" * 4000, "negative_prompt": "🌟" * 4000}
    assert opened(image_format, long).size == (24, 16)
    escaped = {**SETTINGS, "prompt": "\x01&" * 2000, "negative_prompt": "\x01&" * 2000}
    assert opened(image_format, escaped).size == (24, 16)


@pytest.mark.parametrize("image_format", image_files.EXTENSIONS)
def test_equal_images_are_equal_bytes(image_format):
    first, second = (image_files.encode(PIXELS, SETTINGS, image_format) for _ in range(2))
    assert first == second
    decoded = image_files.decode(first)
    if image_format in image_files.LOSSLESS:
        assert (decoded == PIXELS).all()
    else:  # noise is the hardest case for JPEG
        assert np.abs(decoded.astype(int) - PIXELS).mean() < 8


def test_pixel_sha256_depends_on_the_pixels_alone():
    identity = image_files.pixel_sha256(PIXELS)
    assert identity == image_files.pixel_sha256(np.asfortranarray(PIXELS))
    changed = PIXELS.copy()
    changed[0, 0, 0] ^= 1
    assert image_files.pixel_sha256(changed) != identity


@pytest.mark.parametrize("image_format", image_files.LOSSLESS)
def test_a_damaged_image_raises_a_one_line_value_error(image_format):
    content = image_files.encode(PIXELS, SETTINGS, image_format)
    random = np.random.default_rng(1)
    reasons = []
    for _ in range(300):
        damaged = bytearray(content[: random.integers(len(content) + 1)])
        for at in random.integers(max(len(damaged), 1), size=random.integers(4)):
            damaged[at : at + 1] = random.bytes(1)
        try:
            image_files.decode(bytes(damaged))
        except ValueError as problem:
            reasons.append(str(problem))
    assert len(reasons) > 100
    assert not any("\n" in reason for reason in reasons)


def test_a_huge_image_is_not_decoded(monkeypatch):
    content = image_files.encode(PIXELS, SETTINGS, "png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        image_files.decode(content)


def test_other_formats_are_not_decoded():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "gif")
    with pytest.raises(ValueError, match="not a readable image"):
        image_files.decode(file.getvalue())


def test_images_of_datasets_that_earlier_versions_planned_keep_their_bytes():
    """`verify --repair` has to make them again; they have no `tokens_lost`."""
    changes = {"options": "eta=0.3, clip_skip=1", "noise": "torch", "dtype": "bfloat16"}
    older = {name: value for name, value in SETTINGS.items() if name != "tokens_lost"} | changes
    assert image_files.parameters(older) == PARAMETERS
    assert image_files.parameters({**older, "tokens_lost": 0}) != PARAMETERS
