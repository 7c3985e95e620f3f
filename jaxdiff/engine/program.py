"""The program that is compiled: samples latents, decodes them and rounds to 8 bits."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdiff.diffusion import guidance, objective, sampling
from jaxdiff.diffusion.step_ranges import StepRange
from jaxdiff.engine import steering, windows
from jaxdiff.families.model import Codec, Control, Model
from jaxdiff.images.tiles import Tiling
from jaxdiff.weights.quantization import restored


class Inputs(NamedTuple):
    """The program's arguments that depend on the batch.

    Attributes:
      noise: float32 [batch, h, w, latent channels].
      fresh_noise: float32 [draws, batch, h, w, latent channels]; None for a deterministic sampler.
      positive, negative: the conditioning of each denoiser, a tree of arrays [batch, ...]; the
        negative one is None if no step is guided.
      guidance_scale: float32 [batch].
      image_guidance_scale: float32 [batch]; None if no image guides.
      start: float32 latents [batch, h, w, channels] to begin with; None to begin with noise.
      kept: the part of the latents that must not change; None if all may.
      channels: float32 [batch, h, w, more channels], which the denoisers get beside the latents;
        None if they take none.
      controls: for each ControlNet, uint8 images [batch, height, width, 3] or float32 latents of
        them [batch, h, w, channels], and float32 scales [batch]; for a union net, these have a
        second axis, of images, and int32 modes [batch, images] follow. Empty if none steers.
    """

    noise: Any
    fresh_noise: Any
    positive: Sequence[Any]
    negative: Sequence[Any]
    guidance_scale: Any
    image_guidance_scale: Any = None
    start: Any = None
    kept: sampling.Kept | None = None
    channels: Any = None
    controls: Sequence[tuple] = ()


class Pass(NamedTuple):
    """The program's arguments for one sampling of latents; a second pass enlarges those of a first.

    Attributes:
      inputs: the batch's.
      initial_scale, columns: of a `SamplerTable`.
    """

    inputs: Inputs
    initial_scale: Any
    columns: dict[str, Any]


class Route(NamedTuple):
    """The way of one pass; static under `jax.jit`.

    Attributes:
      ranges: which denoiser evaluates which rows of the sampler's table; they cover all rows.
      windows: where on the latents the denoisers see windows; None if they see them whole.
    """

    ranges: Sequence[StepRange]
    windows: Tiling | None = None


class Weights(NamedTuple):
    """The parameters of the networks, or their shapes and shardings.

    Attributes:
      denoisers: one tree for each denoiser.
      codec: the autoencoder's tree.
      controls: one tree for each ControlNet.
    """

    denoisers: Sequence[dict]
    codec: dict
    controls: Sequence[dict] = ()


SAMPLING = "sampling"  # what compiled programs and traces call it
SKIP_SCALE = 2.8  # of skip-layer guidance, as in diffusers and Stability AI's code
# The batch axis of each part of a pass.
AXES = Pass(
    inputs=Inputs(
        noise=0,
        fresh_noise=1,
        positive=0,
        negative=0,
        guidance_scale=0,
        image_guidance_scale=0,
        start=0,
        kept=0,
        channels=0,
        controls=0,
    ),
    initial_scale=None,
    columns=None,
)


class Denoising(NamedTuple):
    """How a denoiser is evaluated; static under `jax.jit`.

    Attributes:
      model: its checkpoint's networks.
      prediction_type: as in `objective.to_x0`.
      controls: the ControlNets that steer it.
    """

    model: Model
    prediction_type: str
    controls: tuple[Control, ...] = ()


def sample_pixels(
    denoisers: Sequence[Denoising],
    codec: Codec,
    dtype,
    weights: Weights,
    passes: Sequence[Pass],
    *,
    routes: Sequence[Route],
    decoded_at_once: int,
    guidance_rescale: float = 0.0,
    deep_cache: int = 1,
    skipped: tuple[int, ...] = (),
    guesses: bool = False,
    decodes: bool = True,
) -> tuple[Array, Array]:
    """Samples pixels from noise; a pure function, for `jax.jit`.

    Args:
      denoisers: that of the base model and, if there is one, of its refiner.
      codec: the autoencoder.
      dtype: of the networks' arithmetic; the sampler computes in float32.
      weights: the parameters of the denoisers and of the codec.
      passes: the batch's; each but the first begins with the latents of the one before it, enlarged
        to the size of its noise by bilinear interpolation.
      routes: the way of each pass.
      decoded_at_once: the number of images to decode at once, a divisor of the batch size.
      guidance_rescale, deep_cache: as in `Options`.
      skipped: its `skipped_layers`.
      guesses: whether its `guess_mode` is on.
      decodes: whether to decode the latents.

    Returns:
      pixels, uint8 [batch, h * factor, w * factor, 3], or else latents, float32 [batch, h, w,
      channels]; and whether each image was finite, [batch].
    """
    latents = None
    for given, route in zip(passes, routes, strict=True):
        inputs, start = given.inputs, given.inputs.start
        if latents is not None:
            start = jax.image.resize(latents, inputs.noise.shape, "bilinear")
        walk = _stretches(
            denoisers, weights, dtype, inputs, route, guidance_rescale, skipped, guesses
        )
        with jax.named_scope(SAMPLING):
            latents = sampling.sample(
                walk,
                inputs.noise,
                given.initial_scale,
                given.columns,
                inputs.fresh_noise,
                start=start,
                kept=inputs.kept,
                whole_every=deep_cache,
            )

    def decode(latents: Array) -> tuple[Array, Array]:
        images = codec.decode(weights.codec, latents, dtype)
        return to_pixels(images), jnp.isfinite(images).all(axis=(1, 2, 3))

    if not decodes:
        return latents, jnp.isfinite(latents).all(axis=(1, 2, 3))

    if decoded_at_once == len(latents):
        return decode(latents)
    turns = latents.reshape(-1, decoded_at_once, *latents.shape[1:])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(decode, turns))


def _stretches(
    denoisers: Sequence[Denoising],
    weights: Weights,
    dtype,
    inputs: Inputs,
    route: Route,
    guidance_rescale: float,
    skipped: tuple[int, ...],
    guesses: bool,
) -> list[sampling.Stretch]:
    """Returns the denoisers of a pass; the arguments are those of `sample_pixels`, of one pass."""

    def of_window(part: StepRange, crop: windows.Crop) -> sampling.Denoiser:
        seen = [(crop(images), *rest) for images, *rest in inputs.controls]
        nets = denoisers[0].controls, weights.controls, seen
        steer = steering.steer(*nets, inputs.guidance_scale, guesses)
        return denoiser(
            denoisers[part.denoiser],
            weights.denoisers[part.denoiser],
            dtype,
            inputs.positive[part.denoiser],
            inputs.negative[part.denoiser] if part.guided else None,
            inputs.guidance_scale,
            guidance_rescale,
            skipped if part.skips else (),
            inputs.channels,
            steer if part.controlled else None,
            inputs.image_guidance_scale if part.image_guided else None,
        )

    return [
        sampling.Stretch(
            part.rows, windows.fused(partial(of_window, part), route.windows), part.clamp
        )
        for part in route.ranges
    ]


def denoiser(
    denoising: Denoising,
    params: dict,
    dtype,
    positive,
    negative,
    guidance_scale: Array,
    guidance_rescale: float,
    skipped: tuple[int, ...] = (),
    channels: Array | None = None,
    steer: steering.Steer | None = None,
    image_guidance_scale: Array | None = None,
) -> sampling.Denoiser:
    """Makes a denoiser for `sampling.sample`; it is guided if `negative` is not None.

    If an image guides, too, the denoiser is evaluated without the prompt and the image, with the
    image (zeros in its place hide it), and with both.

    The arguments are those of `sample_pixels`, for one denoiser.
    """
    network, guided = denoising.model.denoiser, negative is not None
    by_image = image_guidance_scale is not None
    unprompted = [negative] * (guided + by_image)
    conditioning = jax.tree.map(guidance.paired, *unprompted, positive) if guided else positive

    def denoise(
        x: Array, timestep: Array, alpha: Array, sigma: Array, kept: Any
    ) -> tuple[Array, Any]:
        known = x if channels is None else jnp.concatenate([x, channels], axis=-1)
        weights = restored(params, dtype, after=x)
        latents = known
        if by_image:
            hidden = jnp.concatenate([x, jnp.zeros_like(channels)], axis=-1)
            latents = guidance.paired(hidden, known, known)
        elif guided:
            latents = guidance.paired(known, known)
        latents = latents.astype(dtype)
        options = {}
        if steer is not None:
            options["residuals"] = steer(x.astype(dtype), timestep, positive, conditioning)
        seen = jnp.log(sigma / alpha) / 4 if network.sees_noise_level else timestep
        output, kept = network.evaluate(
            weights,
            latents,
            jnp.full(latents.shape[0], seen),
            conditioning,
            guidance_scale if network.guidance_is_input else None,
            kept,
            **options,
        )
        output = output.astype(jnp.float32)
        paired = output
        if guided:
            output = guidance.guide(
                output,
                guidance_scale,
                guidance_rescale,
                norm_patch=network.norm_patch,
                image_scale=image_guidance_scale,
            )
        if skipped:
            times = jnp.full(len(x), timestep)
            without, _ = network.evaluate(
                weights, known.astype(dtype), times, positive, None, None, skipped=skipped
            )
            output = output + SKIP_SCALE * (paired[1::2] - without)
        return objective.to_x0(output, x, alpha, sigma, denoising.prediction_type), kept

    return denoise


def to_pixels(images: Array) -> Array:
    """Converts images in -1..1 to uint8, rounding to the nearest."""
    return jnp.round(jnp.clip(images / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def to_float(pixels: Array) -> Array:
    """Converts uint8 pixels to float32 in -1..1, the range of the networks."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0
