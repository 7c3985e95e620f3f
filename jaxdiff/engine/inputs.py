"""Gathers what a batch of requests brings to the program."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.checks import BadValueError
from jaxdiff.devices import parallel
from jaxdiff.diffusion import noise as random_noise
from jaxdiff.diffusion.noise import Noise
from jaxdiff.diffusion.objective import noisy
from jaxdiff.diffusion.sampling import Kept
from jaxdiff.engine.denoiser import LoadedDenoiser
from jaxdiff.engine.images import ImageEncoder
from jaxdiff.engine.program import Inputs, to_float
from jaxdiff.families.ensemble import Steps
from jaxdiff.families.model import Codec, Control
from jaxdiff.request import Request


class Brings(NamedTuple):
    """Which of the inputs that come from images a request has; see `Inputs`.

    Attributes:
      encodes_first: how often noise for images' latents is drawn before that of the first step.
      encodes_last: whether it is drawn after that.
    """

    start: bool = False
    kept: bool = False
    channels: bool = False
    encodes_first: int = 0
    encodes_last: bool = False


class InputMaker:
    """Makes the inputs of batches.

    Attributes:
      encoder: of images.
    """

    def __init__(
        self,
        denoisers: Sequence[LoadedDenoiser],
        codec: Codec,
        encoder: ImageEncoder,
        mesh: jax.sharding.Mesh,
        noise: str,
    ):
        """Prepares to make inputs.

        Args:
          denoisers: the base model's and perhaps a refiner's.
          codec: the autoencoder.
          encoder: of images.
          mesh: the devices.
          noise: the kind of noise, as in `Options`.
        """
        self.encoder = encoder
        self._denoisers, self._codec, self._mesh, self._noise = denoisers, codec, mesh, noise
        self._inpainting = denoisers[0].model.denoiser.inpainting
        self._reference = denoisers[0].model.denoiser.reference
        self._enlarging = denoisers[0].model.denoiser.enlarging
        self._sees_control = denoisers[0].model.denoiser.sees_control
        self._nets = denoisers[0].denoising.controls

    def brings(self, request: Request) -> Brings:
        """Returns what the image of a resolved request gives to the program."""
        bucket, inpainting, first = request.bucket, self._inpainting, self._encoded(request)
        if self._sees_control or self._enlarging is not None:
            return Brings(channels=True, encodes_first=1)
        if request.image is None:  # a second pass begins with the latents of the first
            return Brings(encodes_first=first)
        if self._reference is not None:
            return Brings(channels=True)
        # A network for inpainting sees what is kept; to others it is given back after each step.
        channels = bucket.masked and inpainting is not None
        start = bucket.strength < 1 or not bucket.masked  # as in diffusers
        kept = bucket.masked and not channels
        first += start or kept or (channels and inpainting.encodes_image)
        return Brings(start, kept, channels, first, encodes_last=kept or channels)

    def with_latents(self, request: Request) -> Request:
        """Returns a resolved request whose latents, if it has any, are an array.

        Raises:
          BadValueError: unless they are floats in the size of the image's latents.
        """
        if request.latents is None:
            return request
        latents, shape = np.asarray(request.latents), self._latent_shape(request)
        if latents.shape != shape or not np.issubdtype(latents.dtype, np.floating):
            raise BadValueError(
                f"latents must be floats {[*shape]} (height, width, channels) for "
                f"{request.width}x{request.height}, not {latents.dtype} {[*latents.shape]}"
            )
        return replace(request, latents=latents.astype(np.float32))

    def abstract(self, request: Request, slots: int, steps: Steps) -> Inputs:
        """Returns the shapes and shardings of the inputs of `slots` requests like this one."""
        brings, shape, seen = self.brings(request), self._latent_shape(request), steps.bucket
        sharding = parallel.batch_sharding(self._mesh)
        each = [
            denoiser.abstract_conditioning(slots, seen.height, seen.width, sharding)
            for denoiser in self._denoisers
        ]

        def batched(*sizes: int, dtype=np.float32) -> jax.ShapeDtypeStruct:
            sharding = parallel.batch_sharding(self._mesh)
            return jax.ShapeDtypeStruct((slots, *sizes), dtype, sharding=sharding)

        def fresh() -> jax.ShapeDtypeStruct:
            sharding = parallel.batch_sharding(self._mesh, axis=1)
            return jax.ShapeDtypeStruct((steps.draws, slots, *shape), np.float32, sharding=sharding)

        def channels() -> jax.ShapeDtypeStruct:
            more = self._enlarging or self._reference or self._inpainting
            return batched(*shape[:-1], more.channels) if more else batched(*shape)

        def control(net: Control, images: Sequence[int]) -> tuple:
            several = (len(images),) if net.is_union else ()
            pixels = batched(*several, request.height, request.width, 3, dtype=np.uint8)
            seen = batched(*several, *shape) if net.sees_latents else pixels
            modes = [batched(*several, dtype=np.int32)] if net.is_union else []
            return seen, batched(*several), *modes

        return Inputs(
            noise=batched(*shape),
            fresh_noise=fresh() if steps.draws else None,
            positive=each,
            negative=each if steps.is_guided else [None] * len(each),
            guidance_scale=batched(),
            image_guidance_scale=None if request.image_guidance_scale is None else batched(),
            start=batched(*shape) if brings.start else None,
            kept=Kept(batched(*shape), batched(*shape[:-1], 1)) if brings.kept else None,
            channels=channels() if brings.channels else None,
            controls=[control(*each) for each in self._seen(request)],
        )

    def __call__(self, batch: Sequence[Request], steps: Steps, codec_params: dict) -> Inputs:
        """Puts the inputs of a full batch on the devices.

        Args:
          batch: requests as `loading.prepared` returns them.
          steps: those of one pass of the bucket's images.
          codec_params: the autoencoder's parameters.
        """
        place = partial(jax.device_put, device=parallel.batch_sharding(self._mesh))
        brings = self.brings(batch[0])
        noise = self._drawn(batch, brings, steps.draws)
        encoded = () if noise.encoded is None else noise.encoded
        of_nets = self._encoded(batch[0])
        fresh_noise = noise.fresh
        if fresh_noise is not None:
            fresh_noise = jax.device_put(fresh_noise, parallel.batch_sharding(self._mesh, axis=1))
        seen = steps.bucket
        prompts = [replace(each, height=seen.height, width=seen.width) for each in batch]
        positive = place([denoiser.conditioning(prompts) for denoiser in self._denoisers])
        negative = [None] * len(positive)
        if steps.is_guided:
            negative = place(
                [denoiser.conditioning(prompts, negative=True) for denoiser in self._denoisers]
            )
        return Inputs(
            noise=place(noise.start),
            fresh_noise=fresh_noise,
            positive=positive,
            negative=negative,
            guidance_scale=place(_numbers(batch, "guidance_scale")),
            image_guidance_scale=place(_numbers(batch, "image_guidance_scale")),
            **place(self._of_images(batch, brings, encoded[of_nets:], codec_params)),
            controls=place(self._controls(batch, encoded, codec_params)),
        )

    def _drawn(self, batch: Sequence[Request], brings: Brings, draws: int) -> Noise:
        seeds = np.array([request.seed for request in batch], np.uint32)
        shape = self._latent_shape(batch[0])
        drawn = random_noise.draw(
            seeds,
            shape,
            self._noise,
            draws,
            before=brings.encodes_first,
            after=int(brings.encodes_last),
            encoded_shape=None if self._enlarging is None else self._image_shape(batch[0]),
            again=batch[0].strength is not None and batch[0].image is None,
        )
        if all(request.latents is None for request in batch):
            return drawn
        pairs = zip(batch, np.asarray(drawn.start), strict=True)
        given = [start if each.latents is None else each.latents for each, start in pairs]
        return drawn._replace(start=np.stack(given))

    def _seen(self, request: Request) -> list[tuple[Control, Sequence[int]]]:
        """Returns each net with the places of its control images in a resolved request."""
        if len(self._nets) == 1:  # a union net sees all images
            return [(self._nets[0], range(len(request.control_image)))]
        return [(net, (place,)) for place, net in enumerate(self._nets)]

    def _encoded(self, request: Request) -> int:
        """Returns how many samples of control images' latents are drawn before all else."""
        return sum(len(images) for net, images in self._seen(request) if net.sees_latents)

    def _controls(
        self, batch: Sequence[Request], noise: Array | Sequence, params: dict
    ) -> list[tuple[Array | np.ndarray, ...]]:
        """Returns `Inputs.controls`; the noise is for the images of all nets in turn."""
        samples = iter(noise)

        def image(net: Control, place: int) -> Array | np.ndarray:
            seen = [request.control_image[place] for request in batch]
            return self.encoder(params, seen, next(samples)) if net.sees_latents else np.stack(seen)

        def numbers(name: str, places: Sequence[int], dtype) -> np.ndarray:
            each = [getattr(request, name) for request in batch]
            return np.array([[found[place] for place in places] for found in each], dtype)

        def control(net: Control, places: Sequence[int]) -> tuple:
            images = [image(net, place) for place in places]
            scales = numbers("controlnet_conditioning_scale", places, np.float32)
            if not net.is_union:
                return images[0], scales[:, 0]
            stack = jnp.stack if net.sees_latents else np.stack
            return stack(images, axis=1), scales, numbers("control_mode", places, np.int32)

        return [control(*each) for each in self._seen(batch[0])]

    def _of_images(
        self, batch: Sequence[Request], brings: Brings, noise: Array | Sequence, params: dict
    ) -> dict:
        """Returns the inputs that come from images, by name.

        Args:
          noise: for the samples of encoded images, in the order in which diffusers draws them.
          params: the autoencoder's.
        """
        found, images = {}, [request.image for request in batch]
        if self._sees_control:
            images = [request.control_image[0] for request in batch]
            return {"channels": self.encoder(params, images, noise[0])}
        if self._enlarging is not None:
            return {"channels": self._enlarged(images, noise[0], params)}
        if self._reference is not None:
            return {"channels": self._reference.scale(self.encoder.means(params, images))}
        if brings.kept or brings.channels:
            masks = np.stack([request.mask_image for request in batch])
        if brings.start or brings.kept:
            latents = self.encoder(params, images, noise[0])
        if brings.start:
            found["start"] = latents
        if brings.kept:
            factor = self._codec.factor
            found["kept"] = Kept(latents, masks[:, ::factor, ::factor, None].astype(np.float32))
        if brings.channels:
            hidden = self.encoder(params, images, noise[-1], hidden=masks)
            found["channels"] = self._inpainting.join(jnp.asarray(masks, jnp.float32), hidden)
        return found

    def _enlarged(self, images: Sequence[np.ndarray], noise: Array, params: dict) -> Array:
        """Returns the channels in which a network for upscaling sees images."""
        if not self._enlarging.sees_latents:
            return noisy(to_float(np.stack(images)), noise, *self._denoisers[0].image_noise)
        latents, factor = self.encoder(params, images, noise), self._enlarging.factor
        return jnp.repeat(jnp.repeat(latents, factor, axis=1), factor, axis=2)

    def _latent_shape(self, request: Request) -> tuple[int, int, int]:
        factor = self._codec.factor
        return request.height // factor, request.width // factor, self._codec.channels

    def _image_shape(self, request: Request) -> tuple[int, int, int]:
        """Returns the height, width and channels in which an image to enlarge gets noise."""
        seen = self._enlarging
        factor = seen.factor * (self._codec.factor if seen.sees_latents else 1)
        return request.height // factor, request.width // factor, seen.channels


def _numbers(batch: Sequence[Request], name: str) -> np.ndarray | None:
    """Returns a number of each request, float32 [batch]; None if they have none."""
    numbers = [getattr(request, name) for request in batch]
    return None if None in numbers else np.array(numbers, np.float32)
