"""Counts the floating-point operations of an image from the shapes of the weights alone.

Counts the multiplications and additions (2 for each pair) of convolutions, linear layers and
attention, which are nearly all of them, but not normalizations or the text encoders. Imports no
JAX.
"""

from jaxdiff.families.ensemble import Ensemble, Steps
from jaxdiff.request import Bucket, Options


def of_image(ensemble: Ensemble, options: Options, bucket: Bucket) -> int:
    """Counts the operations of one image of a bucket.

    They are those of all evaluations of the denoiser, in all windows, of the decoder and of an
    upscaler.
    """
    base, again = ensemble.base, ensemble.second_pass
    factor = base.defaults.factor

    def in_latents(bucket: Bucket) -> tuple[int, int]:
        return bucket.height // factor, bucket.width // factor

    total = 0
    if ensemble.upscaler is not None:
        upscaler = ensemble.upscaler.checkpoint
        seen = (bucket.height, bucket.width) if ensemble.samples else in_latents(bucket)
        total += upscaler.family.operations(upscaler, *seen, 0)[0]
    for steps in ensemble.passes(options, bucket) if ensemble.samples else ():
        windows = 1 if steps.windows is None else steps.windows.count
        counts = evaluations(ensemble, options, steps)
        for checkpoint, (whole, spared) in zip(ensemble.checkpoints, counts, strict=True):
            tokens = checkpoint.defaults.tokens * options.prompt_chunks
            of_whole, of_spared = checkpoint.family.operations(
                checkpoint, *in_latents(steps.bucket), tokens
            )
            total += windows * (whole * of_whole + spared * of_spared)
    decoded = bucket if again is None else again.enlarged(bucket)
    return total + base.family.decoder_operations(base, *in_latents(decoded))


def evaluations(ensemble: Ensemble, options: Options, steps: Steps) -> list[tuple[int, int]]:
    """Counts each denoiser's full evaluations for one image, and those of its outermost layers.

    A guided step takes two evaluations, or three with skip-layer guidance.
    """
    counts = [(0, 0)] * len(ensemble.checkpoints)
    for part in steps.ranges:
        turns, groups = part.evaluations, -(-part.rows // options.deep_cache)
        whole, spared = counts[part.denoiser]
        counts[part.denoiser] = whole + turns * groups, spared + turns * (part.rows - groups)
    return counts
