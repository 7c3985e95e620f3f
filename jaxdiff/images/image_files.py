"""Encodes images with their generation settings, in metadata that other programs read.

The metadata contain the prompt, the settings line of AUTOMATIC1111's web UI (`parameters`, which
most viewers of generated images read), XMP with IPTC's digital source type for AI-generated media,
and every setting as JSON: in PNG the text `jaxdiff`, elsewhere the XMP property `jaxdiff:settings`.
Equal pixels and settings give equal bytes with the same version of Pillow: there is no time or host
name in a file.
"""

import hashlib
import io
import json
import re
from functools import partial
from xml.sax import saxutils

import numpy as np
from PIL import Image, PngImagePlugin

from jaxdiff.diffusion.samplers import SAMPLERS
from jaxdiff.diffusion.scheduler_config import FLOW_CONFIG
from jaxdiff.request import OPTION_CHECKS, Options

EXTENSIONS = {"png": "png", "webp": "webp", "jpeg": "jpg"}
SAVE = {
    "png": {},
    "webp": {"lossless": True, "exact": True},  # also the colors of transparent pixels
    "jpeg": {"quality": 95, "subsampling": "4:4:4"},
}
LOSSLESS = ("png", "webp")
IMAGE_DESCRIPTION, EXIF_IFD, USER_COMMENT = 0x010E, 0x8769, 0x9286
XMP_KEYWORD = "XML:com.adobe.xmp"
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
CREATED, EDITED = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="{source_type}">'
    "{settings}</rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="r"?>'
)
XMP_SETTINGS = (  # not in EXIF: its 64 KiB in JPEG are too few for the longest prompts
    '<jaxdiff:settings xmlns:jaxdiff="urn:jaxdiff">{}</jaxdiff:settings>'
)
# An option in a record. Names of LoRAs may contain ", ", but each ends with its weight.
OPTION = re.compile(r"lora=.*?:-?[\d.]+(?:e[+-]\d+)?(?=, \w+=|\Z)|\w+=[^,]*", re.DOTALL)
UNDESCRIBED = {"options": "", "noise": "jax", "dtype": Options.dtype}
LORA_TAG = re.compile(r"[^<>:\r\n]+:[^:]+")  # the LoRAs that a tag in the prompt can name
# The web UI's names of noise schedules, by the changes to the scheduler that select them.
SCHEDULE_TYPES = {
    "use_karras_sigmas=true": "Karras",
    "use_exponential_sigmas=true": "Exponential",
    "use_beta_sigmas=true": "Beta",
    "timestep_spacing=trailing": "SGM Uniform",
    "timestep_spacing=linspace": "Uniform",
}
NOT_IN_XML = re.compile("[\ufffe\uffff]")  # the others are escaped by JSON or rejected in prompts


def source_type(settings: dict) -> str:
    """Returns IPTC's digital source type of an image: whether it was made of another one."""
    return SOURCE_TYPES + (CREATED if settings.get("init_image") is None else EDITED)


def encode(pixels: np.ndarray, settings: dict, image_format: str) -> bytes:
    """Encodes an image with its settings in the file's metadata.

    Args:
      pixels: uint8 [height, width, 3], sRGB; or [..., 4] with opacity, except in JPEG.
      settings: the image's record: `prompt`, `negative_prompt`, `seed`, `steps` and so on.
      image_format: "png", "webp" (lossless) or "jpeg" (quality 95).
    """
    arguments = dict(SAVE[image_format])
    xmp = partial(XMP.format, source_type=source_type(settings))
    dumped = json.dumps(settings, ensure_ascii=False)
    if image_format == "png":
        chunks = PngImagePlugin.PngInfo()
        texts = {
            "Description": settings["prompt"],
            "parameters": parameters(settings),
            "jaxdiff": dumped,
            XMP_KEYWORD: xmp(settings=""),
        }
        for keyword, text in texts.items():
            chunks.add_itxt(keyword, text)
        arguments["pnginfo"] = chunks
    else:
        exif = Image.Exif()
        exif[IMAGE_DESCRIPTION] = settings["prompt"].encode()
        comment = b"UNICODE\0" + parameters(settings).encode("utf-16-be")
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = comment
        escaped = NOT_IN_XML.sub(lambda match: f"\\u{ord(match[0]):04x}", saxutils.escape(dumped))
        described = xmp(settings=XMP_SETTINGS.format(escaped))
        arguments.update(exif=exif, xmp=described.encode())
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **arguments)
    return file.getvalue()


def parameters(settings: dict) -> str:
    """Formats the settings as AUTOMATIC1111's web UI does.

    Its names are used for the options that it has, and jaxdiff's for the others. As the web UI
    reads LoRAs from the prompt, they are added to it: <lora:NAME:WEIGHT>.
    """
    # Earlier versions wrote no options; images of their datasets, remade, must have equal bytes.
    described = settings if "tokens_lost" in settings else {**settings, **UNDESCRIBED}
    loras, options = _options(described)
    sampler = settings["sampler"]
    tags = [f"<lora:{lora}>" for lora in loras if LORA_TAG.fullmatch(lora)]
    lines = [" ".join(filter(None, [settings["prompt"], *tags]))]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    told = {
        "Steps": settings["steps"],
        "Sampler": SAMPLERS[sampler].title if sampler in SAMPLERS else None,
        "Schedule type": _schedule_type(options),
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Image CFG scale": settings.get("image_guidance_scale"),
        "Denoising strength": settings.get("strength"),
        "Model hash": settings.get("model", "")[:10] or None,
        "Model": settings.get("model_name"),
        "Clip skip": int(options.pop("clip_skip", 0)) + 1,  # 1 uses all layers
        "RNG": "CPU" if described["noise"] == "torch" else None,
        "Eta DDIM": options.pop("eta", None),
        "Refiner switch at": options.pop("refiner_start", None),
        "dtype": described["dtype"],
        **options,
        "lora": ", ".join(lora for lora in loras if not LORA_TAG.fullmatch(lora)) or None,
    }
    defaults = {"Clip skip": 1, "dtype": Options.dtype}
    lines.append(
        ", ".join(
            f"{name}: {_quoted(value)}"
            for name, value in told.items()
            if value is not None and value != defaults.get(name)
        )
    )
    return "\n".join(lines)


def _options(settings: dict) -> tuple[list[str], dict[str, str]]:
    """Returns an image's LoRAs, and the other options that its sampler uses."""
    sampler = settings["sampler"]
    used = OPTION_CHECKS.keys() | {"controlnet", "ip_adapter", "upscale"}
    used |= SAMPLERS[sampler].config.keys() if sampler in SAMPLERS else set()
    if sampler == "euler":  # the only one of models trained by flow matching
        used |= FLOW_CONFIG.keys()
    if sampler != "ddim":
        used -= {"eta"}
    matches = OPTION.findall(settings["options"])
    pairs = [match.split("=", 1) for match in matches]
    loras = [value for name, value in pairs if name == "lora"]
    return loras, {name: value for name, value in pairs if name in used}


def _schedule_type(options: dict[str, str]) -> str | None:
    """Returns the web UI's name of the schedule, if the options choose one that it has.

    Removes from the options what the name says in full; timesteps are not spaced quite alike.
    """
    for change, schedule_type in SCHEDULE_TYPES.items():
        name, _, value = change.partition("=")
        if options.get(name) == value:
            if name != "timestep_spacing":
                del options[name]
            return schedule_type
    return None


def _quoted(value) -> str:
    """Returns a value as the web UI's reader expects it: as JSON if it could end too early."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search('[,:\n"]', text) else text


def pixel_sha256(pixels: np.ndarray) -> str:
    """Returns the SHA-256 (hex) of an image's RGB or RGBA bytes, row by row from the top."""
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype=np.uint8).tobytes()).hexdigest()


def decode(content: bytes) -> np.ndarray:
    """Decodes an image to pixels, uint8 [height, width, 3], or [..., 4] if it has opacity.

    Raises:
      ValueError: if it is damaged, huge, or not in a format that `encode` writes.
    """
    try:
        with Image.open(io.BytesIO(content), formats=tuple(SAVE)) as image:
            return np.asarray(image.convert("RGBA" if image.mode == "RGBA" else "RGB"))
    except Exception as problem:  # Pillow's plugins raise errors of many kinds
        reason, *_ = str(problem).splitlines() or [type(problem).__name__]
        raise ValueError(f"not a readable image ({reason})") from problem
