"""A family's networks as pure functions of their parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx
from jax import Array

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.errors import InputError
from jaxdiff.models.sharding import Rules

Params = dict  # nested, of arrays


class Text(NamedTuple):
    """Encoded prompts, with a leading batch axis or without.

    Attributes:
      context: [tokens, width], the hidden states of all text encoders side by side.
      pooled: [width], the whole prompt in one vector; None where the denoiser takes none.
    """

    context: Array
    pooled: Array | None


class Network(NamedTuple):
    """A network without its weights; static under `jax.jit`.

    Attributes:
      graph: `nnx.merge(graph, params)` is the module.
      shapes: a `jax.ShapeDtypeStruct` for each parameter, as a nested dict.
      sharding: how its parameters are split over a mesh.
    """

    graph: nnx.GraphDef
    shapes: dict
    sharding: Rules


class Denoiser(NamedTuple):
    """The network that removes noise.

    Attributes:
      component: its folder in a checkpoint.
      guidance_is_input: as in `family.Defaults`.
      sample_size: height and width, in latents, that it was trained for.
      size_multiple: what height and width must be multiples of in training, in latents.
      evaluate: (params, latents [b, h, w, c], timesteps [b], conditioning, guidance scale [b] or
        None, kept) to the output, of the latents' shape, and to what later evaluations of near
        timesteps may be given as `kept`; None computes everything.
    """

    component: str
    guidance_is_input: bool
    sample_size: int
    size_multiple: int
    evaluate: Callable[[Params, Array, Array, Any, Array | None, Any], tuple[Array, Any]]


class Codec(NamedTuple):
    """The autoencoder. Latents here are as the denoiser sees them, of about unit variance.

    Attributes:
      component: its folder in a checkpoint.
      factor: pixels per latent, along each side.
      channels: of the latents.
      encode: (params, images in -1..1 [b, h, w, 3]) to the mean and the log variance of latents
        that are not scaled yet.
      scale: brings such latents to about unit variance.
      decode: (params, latents [b, h, w, c], dtype of the arithmetic) to float32 images in -1..1.
    """

    component: str
    factor: int
    channels: int
    encode: Callable[[Params, Array], tuple[Array, Array]]
    scale: Callable[[Array], Array]
    decode: Callable[[Params, Array, Any], Array]


class Model(NamedTuple):
    """All networks of a checkpoint; `Family.build` makes it.

    Attributes:
      configs: the networks' config dataclasses, by component.
      networks: the networks, by component.
      text_encoders: the components that read prompts, in the order of their vectors.
      positions: for each of them, the tokens that it takes at most.
      layers_skipped: how many of the text encoders' last layers are never used.
      encode_text: (params by text encoder, int32 token ids [b, chunks, tokens] by text encoder,
        clip_skip) to `Text`.
      zeros_for_empty: whether an empty negative prompt becomes zeros instead of its encoding.
      sizes: what the denoiser takes of an image's size: (height, width in pixels, negative) to
        numbers; None for a family whose denoiser takes nothing of it.
      condition: (Text, sizes [b, numbers] or None) to the denoiser's conditioning, a tree of arrays
        [b, ...].
    """

    configs: Mapping[str, Any]
    networks: Mapping[str, Network]
    text_encoders: Sequence[str]
    positions: Mapping[str, int]
    layers_skipped: int
    encode_text: Callable[..., Text]
    zeros_for_empty: bool
    sizes: Callable[[int, int, bool], tuple[float, ...]] | None
    condition: Callable[[Text, Array | None], Any]
    denoiser: Denoiser
    codec: Codec


def networks_of(checkpoint: Checkpoint) -> Model:
    """Builds the networks that a checkpoint's configs describe; reads no weights.

    Raises:
      InputError: naming the checkpoint, for a value that is not built, or networks that do not fit
        one another.
    """
    family = checkpoint.family
    try:
        configs = family.read_configs({n: checkpoint.config(n) for n in checkpoint.networks})
    except InputError as problem:
        raise InputError(f"{checkpoint.path}: {problem}") from problem
    try:
        return family.build(configs, checkpoint.index)
    except InputError as problem:
        raise InputError(f"{checkpoint.path}: {problem}; copy the checkpoint again") from problem
