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
from xml.sax import saxutils

import numpy as np
from PIL import Image, PngImagePlugin

from jaxdiff.diffusion.samplers import SAMPLERS

EXTENSIONS = {"png": "png", "webp": "webp", "jpeg": "jpg"}
SAVE = {
    "png": {},
    "webp": {"lossless": True},
    "jpeg": {"quality": 95, "subsampling": "4:4:4"},
}
LOSSLESS = ("png", "webp")
IMAGE_DESCRIPTION, EXIF_IFD, USER_COMMENT = 0x010E, 0x8769, 0x9286
XMP_KEYWORD = "XML:com.adobe.xmp"
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}">'
    "{settings}</rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="r"?>'
)
XMP_SETTINGS = (  # not in EXIF: its 64 KiB in JPEG are too few for the longest prompts
    '<jaxdiff:settings xmlns:jaxdiff="urn:jaxdiff">{}</jaxdiff:settings>'
)
NOT_IN_XML = re.compile("[\ufffe\uffff]")  # the others are escaped by JSON or rejected in prompts


def encode(pixels: np.ndarray, settings: dict, image_format: str) -> bytes:
    """Encodes an image with its settings in the file's metadata.

    Args:
      pixels: uint8 [height, width, 3], sRGB.
      settings: the image's record: `prompt`, `negative_prompt`, `seed`, `steps` and so on.
      image_format: "png", "webp" (lossless) or "jpeg" (quality 95).
    """
    arguments = dict(SAVE[image_format])
    dumped = json.dumps(settings, ensure_ascii=False)
    if image_format == "png":
        chunks = PngImagePlugin.PngInfo()
        texts = {
            "Description": settings["prompt"],
            "parameters": parameters(settings),
            "jaxdiff": dumped,
            XMP_KEYWORD: XMP.format(settings=""),
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
        xmp = XMP.format(settings=XMP_SETTINGS.format(escaped))
        arguments.update(exif=exif, xmp=xmp.encode())
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **arguments)
    return file.getvalue()


def parameters(settings: dict) -> str:
    """Formats the settings as AUTOMATIC1111's web UI does."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(
        f"Steps: {settings['steps']}, Sampler: {SAMPLERS[settings['sampler']].title}, "
        f"CFG scale: {settings['guidance_scale']:g}, Seed: {settings['seed']}, "
        f"Size: {settings['width']}x{settings['height']}, Model hash: {settings['model'][:10]}"
    )
    return "\n".join(lines)


def pixel_sha256(pixels: np.ndarray) -> str:
    """Returns the SHA-256 (hex) of an image's RGB bytes, row by row from the top."""
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype=np.uint8).tobytes()).hexdigest()


def decode(content: bytes) -> np.ndarray:
    """Decodes an image to pixels, uint8 [height, width, 3].

    Raises:
      ValueError: if it is damaged, huge, or not in a format that `encode` writes.
    """
    try:
        with Image.open(io.BytesIO(content), formats=tuple(SAVE)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as problem:  # Pillow's plugins raise errors of many kinds
        reason, *_ = str(problem).splitlines() or [type(problem).__name__]
        raise ValueError(f"not a readable image ({reason})") from problem
