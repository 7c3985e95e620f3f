"""A family's networks as pure functions of their parameters."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jax import Array, export

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.errors import InputError
from jaxdiff.weights.network import Network

Params = dict  # nested, of arrays


class Text(NamedTuple):
    """Encoded prompts, with or without a leading batch axis.

    Attributes:
      context: [tokens, width], the concatenated hidden states of all text encoders.
      pooled: [width], one vector for the whole prompt; None if the denoiser takes none.
      mask: bool [tokens], False for tokens that are not seen; None if all are.
    """

    context: Array
    pooled: Array | None = None
    mask: Array | None = None


export.register_namedtuple_serialization(Text, serialized_name="jaxdiff.Text")


class Inpainting(NamedTuple):
    """The channels that tell a network for inpainting what to keep.

    Attributes:
      channels: their number.
      join: maps masks, float32 [b, height, width] in pixels, 1 where the image is painted, and the
        latents of the image with these parts hidden, [b, h, w, c], to the channels, [b, h, w, ...].
      encodes_image: whether diffusers draws noise for the latents of the whole image, too, before
        that of the first step, even where they are not used.
    """

    channels: int
    join: Callable[[Array, Array], Array]
    encodes_image: bool = False


class Reference(NamedTuple):
    """The channels in which a network for editing sees the image that it edits.

    Attributes:
      channels: their number.
      scale: maps the means of the image's unscaled latents, [b, h, w, c], to the channels.
    """

    channels: int
    scale: Callable[[Array], Array]


class Enlarging(NamedTuple):
    """The channels in which a network for upscaling sees the image that it enlarges.

    Attributes:
      factor: by how much it enlarges the image.
      channels: their number.
      sees_latents: whether they are the scaled latents of the image, each of them `factor` times
        along both sides; if not, they are its pixels in -1..1 with noise: `Family.image_noise`.
    """

    factor: int
    channels: int
    sees_latents: bool


class Denoiser(NamedTuple):
    """The network that removes noise.

    Attributes:
      component: its folder in a checkpoint.
      sample_size: the height and width that it was trained for, in latents.
      size_multiple: the number of latents that height and width must be multiples of in training.
      evaluate: maps (params, latents [b, h, w, c], timesteps [b], conditioning, guidance scale [b]
        or None, kept) to the output, in the latents' shape, and to the features that a later
        evaluation at a nearby timestep may reuse as `kept`; with None, everything is computed. The
        latents given are followed by the channels of `inpainting`, `reference` or `enlarging`, or
        by a control image's. If the family has the option `skip_layers`, `skipped` are the numbers
        of blocks to leave out; if it takes ControlNets, `residuals` is the sum of what they return.
      fixed: options of every call of the network's module.
      guidance_is_input: whether `evaluate` needs the guidance scale.
      norm_patch: as in `guidance.guide`.
      inpainting: what a network for inpainting takes besides the latents; None for others.
      reference: what a network for editing takes besides the latents; None for others.
      enlarging: what a network for upscaling takes besides the latents; None for others.
      sees_noise_level: whether its timesteps are log(sigma / alpha) / 4 (Karras et al., 2022,
        arXiv:2206.00364, table 1) rather than those of training.
      sees_control: whether it takes the scaled latents of a control image besides the latents.
    """

    component: str
    sample_size: int
    size_multiple: int
    evaluate: Callable[[Params, Array, Array, Any, Array | None, Any], tuple[Array, Any]]
    fixed: Mapping[str, Any] = MappingProxyType({})
    guidance_is_input: bool = False
    norm_patch: int | None = None
    inpainting: Inpainting | None = None
    reference: Reference | None = None
    enlarging: Enlarging | None = None
    sees_noise_level: bool = False
    sees_control: bool = False


class Control(NamedTuple):
    """A network that steers the denoiser by an image.

    Attributes:
      network: without its weights.
      evaluate: maps (params, latents [b, h, w, c], timesteps [b], the denoiser's conditioning,
        images in 0..1 [b, height, width, 3] or what it sees instead) to what the denoiser's
        `evaluate` takes as `residuals`, a tree of arrays [b, ...], unscaled, from the outer layers
        to the deepest. A union net sees several images of each request, [b, images, ...], and
        needs `modes`, int32 [b, images], of which kind each is, and `weights`, float32
        [b, images], how much it counts.
      is_pooled: whether it steers the prompt's half of a guided step only.
      sees_latents: whether it sees scaled latents of the images, [b, h, w, c], instead of pixels.
      guidance_is_input: whether `evaluate` needs `guidance_scale`, [b], as well.
      is_union: whether it is a union net, which sees images of several kinds.
    """

    network: Network
    evaluate: Callable[..., Any]
    is_pooled: bool
    sees_latents: bool = False
    guidance_is_input: bool = False
    is_union: bool = False


class ImageAdapter(NamedTuple):
    """Networks that turn images into prompts for the denoiser.

    Attributes:
      adapter, encoder: without their weights.
      size: the height and width in pixels of what the encoder sees.
      encode: maps (params of the adapter, params of the encoder, uint8 images [b, size, size, 3],
        dtype of the arithmetic) to what the denoiser attends to, a tree of arrays [b, ...].
      negative: maps (params of both, dtype) to the same for the unguided half, of a batch of 1.
      conditioned: maps (the denoiser's conditioning; for each adapter, what `encode` returned and
        scales, float32 [b]) to the conditioning with these prompts.
    """

    adapter: Network
    encoder: Network
    size: int
    encode: Callable[[Params, Params, Array, Any], Any]
    negative: Callable[[Params, Params, Any], Any]
    conditioned: Callable[[Any, Sequence[tuple[Any, Array]]], Any]


class Codec(NamedTuple):
    """The autoencoder. Its latents are scaled for the denoiser, to about unit variance.

    Attributes:
      component: its folder in a checkpoint.
      factor: the number of pixels per latent along each side.
      channels: the number of channels of the latents.
      encode: maps (params, images in -1..1 [b, h, w, 3]) to the mean and the log variance of
        unscaled latents.
      scale: scales unscaled latents to about unit variance.
      decode: maps (params, scaled latents [b, h, w, c], dtype of the arithmetic) to float32 images
        in -1..1.
    """

    component: str
    factor: int
    channels: int
    encode: Callable[[Params, Array], tuple[Array, Array]]
    scale: Callable[[Array], Array]
    decode: Callable[[Params, Array, Any], Array]


class Model(NamedTuple):
    """All networks of a checkpoint; `family.Networks.build` makes it.

    Attributes:
      configs: the networks' config dataclasses, by component.
      networks: the networks, by component.
      text_encoders: the components that encode prompts, in the order of their vectors.
      encode_text: maps (params by text encoder, what its tokenizer returns by text encoder,
        clip_skip) to `Text`. With `image_size`, the second also has the images under "image",
        uint8 [texts, height, width, 3].
      condition: maps (Text, sizes [b, numbers] or None) to the denoiser's conditioning, a tree of
        arrays [b, ...].
      denoiser: the network that removes noise.
      codec: the autoencoder.
      skippable: how many of its last layers each text encoder can skip (`Options.clip_skip`).
      zeros_for_empty: whether an empty negative prompt becomes zeros instead of its encoding.
      empty_at_zero: whether the prompt of a request becomes empty where its guidance scale is 0.
      sizes: maps (height and width in pixels, negative) to the numbers of the denoiser's size
        conditioning; None if the denoiser has none.
      image_size: maps the height and width of a request's image to those in which a text encoder
        sees it beside the prompt; None if it sees prompts only.
    """

    configs: Mapping[str, Any]
    networks: Mapping[str, Network]
    text_encoders: Sequence[str]
    encode_text: Callable[..., Text]
    condition: Callable[[Text, Array | None], Any]
    denoiser: Denoiser
    codec: Codec
    skippable: Mapping[str, int] = MappingProxyType({})
    zeros_for_empty: bool = False
    empty_at_zero: bool = False
    sizes: Callable[[int, int, bool], tuple[float, ...]] | None = None
    image_size: Callable[[int, int], tuple[int, int]] | None = None


def networks_of(checkpoint: Checkpoint) -> Model:
    """Builds the networks that a checkpoint's configs describe; reads no weights.

    Raises:
      InputError: naming the checkpoint, if a config value is not supported or the networks do not
        fit together.
    """
    networks = checkpoint.family.networks()
    try:
        configs = networks.read_configs({n: checkpoint.config(n) for n in checkpoint.networks})
        networks.check_counts(configs, checkpoint.tensors)
    except InputError as problem:
        raise InputError(f"{checkpoint.path}: {problem}") from problem
    try:
        return networks.build(configs, checkpoint.index)
    except InputError as problem:
        raise InputError(f"{checkpoint.path}: {problem}; copy the checkpoint again") from problem
