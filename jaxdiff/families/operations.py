"""How many floating-point operations an image takes, from the shapes of the weights alone.

Counted are the multiplications and additions (2 for each pair) of convolutions, linear layers and
attention, which are nearly all; not normalizations, not the text encoders. Imports no JAX.
"""

import re
from collections.abc import Mapping

from jaxdiff import checks
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.step_ranges import Stretch, stretches_of
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.request import Bucket, Options

TOKENS = 77  # of a prompt, where the text encoder does not say
BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.")
RESAMPLED = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(down|up)samplers\.")
LAYER = re.compile(r"up_blocks\.(\d+)\.resnets\.(\d+)\.")
DEEP = ("down_blocks.", "mid_block.", "up_blocks.")
ONCE_AN_IMAGE = re.compile(r"\b(time_embedding|add_embedding|time_emb_proj)\.")


def of_image(ensemble: Ensemble, options: Options, bucket: Bucket) -> int:
    """Those of one image of a bucket: every evaluation of the denoisers, and the decoder."""
    factor = ensemble.base.size_multiple
    height, width = bucket.height // factor, bucket.width // factor
    total = of_network(_decoder(ensemble.base), height, width)
    counts = evaluations(ensemble, options, bucket)
    for checkpoint, (whole, spared) in zip(ensemble.experts, counts, strict=True):
        weights, tokens = checkpoint.weights("unet"), _tokens(checkpoint) * options.prompt_chunks
        total += whole * of_network(weights, height, width, tokens)
        total += spared * of_network(outermost(weights), height, width, tokens)
    return total


def evaluations(ensemble: Ensemble, options: Options, bucket: Bucket) -> list[tuple[int, int]]:
    """Of each expert's U-Net for one image: the whole ones, and those of its outermost layers.

    A guided step takes two.
    """
    counts = [(0, 0)] * len(ensemble.experts)
    for part in _stretches(ensemble, options, bucket):
        turns, groups = 1 + part.guided, -(-part.rows // options.deep_cache)
        whole, spared = counts[part.expert]
        counts[part.expert] = whole + turns * groups, spared + turns * (part.rows - groups)
    return counts


def of_network(
    weights: Mapping[str, StoredTensor], height: int, width: int, tokens: int = TOKENS
) -> int:
    """Those of one evaluation of a U-Net or of an autoencoder's decoder for one image.

    Args:
      weights: by diffusers' keys, a decoder's without "decoder.".
      height, width: of the latents.
      tokens: of the text that cross-attention sees.
    """
    resampled = {found[0] for key in weights if (found := RESAMPLED.match(key))}
    total = 0
    for key, tensor in weights.items():
        if len(tensor.shape) < 2:
            continue
        level = _level(key, resampled)
        positions = _scaled(height, level) * _scaled(width, level)
        if ONCE_AN_IMAGE.search(key):
            positions = 1
        seen = tokens if ".attn2." in key else positions  # keys and values
        if key.endswith(("to_k.weight", "to_v.weight")):
            positions = seen
        elif key.endswith("to_q.weight"):
            total += 2 * 2 * positions * seen * tensor.shape[0]  # scores, and sums of the values
        total += 2 * tensor.size * positions
    return total


def _level(key: str, resampled: set[str]) -> int:
    """How often a layer's input has been halved; below 0, doubled."""
    steps = {"down": 1, "up": -1}
    found = BLOCK.match(key)
    if key.startswith("conv_out"):
        before = resampled
    elif key.startswith("mid_block"):
        before = {each for each in resampled if each.startswith("down")}
    elif found:
        before = {each for each in resampled if _precedes(each, found[1], int(found[2]))}
        before |= {each for each in resampled if key.startswith(each)}  # its own convolution
    else:
        before = set()
    return sum(steps[RESAMPLED.match(each)[3]] for each in before)


def _precedes(resampler: str, blocks: str, index: int) -> bool:
    its_blocks, its_index, _ = RESAMPLED.match(resampler).groups()
    if its_blocks == blocks:
        return int(its_index) < index
    return its_blocks == "down_blocks"


def _scaled(side: int, level: int) -> int:
    return -(-side >> level) if level > 0 else side << -level


def _decoder(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    return {
        key.removeprefix("decoder."): tensor
        for key, tensor in checkpoint.weights("vae").items()
        if key.startswith(("decoder.", "post_quant_conv."))
    }


def _tokens(checkpoint: Checkpoint) -> int:
    said = [
        checkpoint.config(name).get("max_position_embeddings") for name in checkpoint.tokenizers
    ]
    return next((tokens for tokens in said if isinstance(tokens, int)), TOKENS)


def outermost(weights: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What of a U-Net is computed at every evaluation, whatever `Options.deep_cache` says."""
    layers = {found[0] for key in weights if (found := LAYER.match(key))}
    block, layer = max(tuple(map(int, LAYER.match(each).groups())) for each in layers)
    last = tuple(f"up_blocks.{block}.{kind}.{layer}." for kind in ("resnets", "attentions"))
    return {
        key: tensor
        for key, tensor in weights.items()
        if key.startswith(last) or not key.startswith(DEEP)
    }


def _stretches(ensemble: Ensemble, options: Options, bucket: Bucket) -> tuple[Stretch, ...]:
    base = ensemble.base
    config = checks.changed_scheduler(base.scheduler, options.scheduler)
    schedule = NoiseSchedule.from_json(config, bucket.sampler)
    table = samplers.sampler_table(bucket.sampler, schedule, bucket.steps, eta=options.eta)
    unets = [expert.config("unet") for expert in ensemble.experts]
    return stretches_of(
        table.timesteps,
        options,
        guided=bucket.guided,
        distilled=[unet.get("time_cond_proj_dim") is not None for unet in unets],
        train_steps=config.get("num_train_timesteps", 1000),
    )
