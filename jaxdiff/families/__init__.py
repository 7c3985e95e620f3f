"""The model families: what their checkpoints consist of, and how they make images.

Imports no JAX, because planning needs the families' defaults and sizes.
"""

from pathlib import Path

from jaxdiff.checkpoint import checkpoint
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.families import (
    flux,
    flux2,
    qwen_image,
    sana,
    stable_diffusion_3,
    upscaling,
    z_image,
)
from jaxdiff.families.family import Family
from jaxdiff.families.pixart import PIXART
from jaxdiff.families.stable_diffusion import (
    INPAINT_PIPELINE,
    INSTRUCT_PIPELINE,
    INSTRUCT_PIX2PIX,
    LCM_PIPELINE,
    PIPELINE,
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    XL_PIPELINES,
)
from jaxdiff.families.upscaler import UPSCALERS

FAMILIES: dict[str, Family] = {  # by the pipeline's class in diffusers
    PIPELINE: STABLE_DIFFUSION,
    LCM_PIPELINE: STABLE_DIFFUSION,
    INPAINT_PIPELINE: STABLE_DIFFUSION,
    INSTRUCT_PIPELINE: INSTRUCT_PIX2PIX,
    **dict.fromkeys(XL_PIPELINES, STABLE_DIFFUSION_XL),
    upscaling.X4_PIPELINE: upscaling.X4_UPSCALER,
    upscaling.LATENT_PIPELINE: upscaling.LATENT_UPSCALER,
    **PIXART,
    flux.PIPELINE: flux.FLUX,
    flux.FILL_PIPELINE: flux.FLUX_FILL,
    flux.KONTEXT_PIPELINE: flux.FLUX_KONTEXT,
    flux.CONTROL_PIPELINE: flux.FLUX_CONTROL,
    stable_diffusion_3.PIPELINE: stable_diffusion_3.STABLE_DIFFUSION_3,
    z_image.PIPELINE: z_image.Z_IMAGE,
    flux2.PIPELINE: flux2.FLUX_2,
    qwen_image.PIPELINE: qwen_image.QWEN_IMAGE,
    qwen_image.EDIT_PIPELINE: qwen_image.QWEN_IMAGE_EDIT,
    sana.PIPELINE: sana.SANA,
    **UPSCALERS,  # which have no pipeline: by the network's class
}


def open_checkpoint(
    model: str | Path, variant: str | None = None, base: str | Path | None = None
) -> Checkpoint:
    """Opens a checkpoint of any family; see `checkpoint.open_checkpoint`."""
    return checkpoint.open_checkpoint(model, variant, FAMILIES, base)
