"""Counts the floating-point operations of an image from the shapes of the weights alone.

Counts the multiplications and additions (2 for each pair) of convolutions, linear layers and
attention, which are nearly all of them, but not normalizations or the text encoders. Imports no
JAX.
"""

from jaxdiff.families.ensemble import Ensemble
from jaxdiff.request import Bucket, Options


def of_image(ensemble: Ensemble, options: Options, bucket: Bucket) -> int:
    """Counts the operations of one image of a bucket.

    They are those of all evaluations of the denoiser, of the decoder and of an upscaler.
    """
    base = ensemble.base
    factor = base.defaults.factor
    height, width = bucket.height // factor, bucket.width // factor
    total = base.family.decoder_operations(base, height, width)
    if ensemble.upscaler is not None:
        upscaler, seen = ensemble.upscaler.checkpoint, (bucket.height, bucket.width)
        if not ensemble.samples:
            seen = height, width
        total += upscaler.family.operations(upscaler, *seen, 0)[0]
    counts = evaluations(ensemble, options, bucket)
    for checkpoint, (whole, spared) in zip(ensemble.checkpoints, counts, strict=True):
        tokens = checkpoint.defaults.tokens * options.prompt_chunks
        of_whole, of_spared = checkpoint.family.operations(checkpoint, height, width, tokens)
        total += whole * of_whole + spared * of_spared
    return total


def evaluations(ensemble: Ensemble, options: Options, bucket: Bucket) -> list[tuple[int, int]]:
    """Counts each denoiser's full evaluations for one image, and those of its outermost layers.

    A guided step takes two evaluations, or three with skip-layer guidance.
    """
    counts = [(0, 0)] * len(ensemble.checkpoints)
    if not ensemble.samples:
        return counts
    for part in ensemble.steps(options, bucket).ranges:
        turns, groups = part.evaluations, -(-part.rows // options.deep_cache)
        whole, spared = counts[part.denoiser]
        counts[part.denoiser] = whole + turns * groups, spared + turns * (part.rows - groups)
    return counts
