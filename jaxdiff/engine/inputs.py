"""Gathers what a batch of requests brings to the program."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.devices import parallel
from jaxdiff.diffusion import noise as random_noise
from jaxdiff.diffusion.sampling import Kept
from jaxdiff.engine.denoiser import LoadedDenoiser
from jaxdiff.engine.images import ImageEncoder
from jaxdiff.engine.program import Inputs
from jaxdiff.families.ensemble import Steps
from jaxdiff.families.model import Codec
from jaxdiff.request import Request


class Brings(NamedTuple):
    """Which of the inputs that come from images a request has; see `Inputs`.

    Attributes:
      encodes_first: whether noise for an image's latents is drawn before that of the first step.
    """

    start: bool = False
    kept: bool = False
    channels: bool = False
    encodes_first: bool = False


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
        self._nets = range(len(denoisers[0].controls))

    def brings(self, request: Request) -> Brings:
        """Returns what the image of a resolved request gives to the program."""
        bucket, inpainting = request.bucket, self._inpainting
        if bucket.strength is None:
            return Brings()
        # A network for inpainting sees what is kept; to others it is given back after each step.
        channels = bucket.masked and inpainting is not None
        start = bucket.strength < 1 or not bucket.masked  # as in diffusers
        kept = bucket.masked and not channels
        first = start or kept or (channels and inpainting.encodes_image)
        return Brings(start, kept, channels, first)

    def abstract(self, request: Request, slots: int, steps: Steps) -> Inputs:
        """Returns the shapes and shardings of the inputs of `slots` requests like this one."""
        brings, shape = self.brings(request), self._latent_shape(request)
        each = [
            denoiser.abstract_conditioning(slots, parallel.batch_sharding(self._mesh))
            for denoiser in self._denoisers
        ]

        def batched(*sizes: int, dtype=np.float32) -> jax.ShapeDtypeStruct:
            sharding = parallel.batch_sharding(self._mesh)
            return jax.ShapeDtypeStruct((slots, *sizes), dtype, sharding=sharding)

        def fresh() -> jax.ShapeDtypeStruct:
            sharding = parallel.batch_sharding(self._mesh, axis=1)
            return jax.ShapeDtypeStruct((steps.draws, slots, *shape), np.float32, sharding=sharding)

        def channels() -> jax.ShapeDtypeStruct:
            return batched(*shape[:-1], self._inpainting.channels)

        control = batched(request.height, request.width, 3, dtype=np.uint8), batched()
        return Inputs(
            noise=batched(*shape),
            fresh_noise=fresh() if steps.draws else None,
            positive=each,
            negative=each if steps.is_guided else [None] * len(each),
            guidance_scale=batched(),
            start=batched(*shape) if brings.start else None,
            kept=Kept(batched(*shape), batched(*shape[:-1], 1)) if brings.kept else None,
            channels=channels() if brings.channels else None,
            controls=[control for _ in self._nets],
        )

    def __call__(self, batch: Sequence[Request], steps: Steps, codec_params: dict) -> Inputs:
        """Puts the inputs of a full batch on the devices.

        Args:
          batch: requests as `loading.prepared` returns them.
          steps: the bucket's.
          codec_params: the autoencoder's parameters.
        """
        place = partial(jax.device_put, device=parallel.batch_sharding(self._mesh))
        brings = self.brings(batch[0])
        noise = random_noise.draw(
            np.array([request.seed for request in batch], np.uint32),
            self._latent_shape(batch[0]),
            self._noise,
            steps.draws,
            before=int(brings.encodes_first),
            after=int(brings.kept or brings.channels),
        )
        fresh_noise = noise.fresh
        if fresh_noise is not None:
            fresh_noise = jax.device_put(fresh_noise, parallel.batch_sharding(self._mesh, axis=1))
        positive = place([denoiser.conditioning(batch) for denoiser in self._denoisers])
        negative = [None] * len(positive)
        if steps.is_guided:
            negative = place(
                [denoiser.conditioning(batch, negative=True) for denoiser in self._denoisers]
            )
        scales = np.array([request.guidance_scale for request in batch], np.float32)
        return Inputs(
            noise=place(noise.start),
            fresh_noise=fresh_noise,
            positive=positive,
            negative=negative,
            guidance_scale=place(scales),
            **place(self._of_images(batch, brings, noise.encoded, codec_params)),
            controls=place([self._control(batch, net) for net in self._nets]),
        )

    def _control(self, batch: Sequence[Request], net: int) -> tuple[np.ndarray, np.ndarray]:
        images = np.stack([request.control_image[net] for request in batch])
        scales = [request.controlnet_conditioning_scale[net] for request in batch]
        return images, np.array(scales, np.float32)

    def _of_images(
        self, batch: Sequence[Request], brings: Brings, noise: Array | None, params: dict
    ) -> dict:
        """Returns the inputs that come from images, by name.

        Args:
          noise: for the samples of encoded images, in the order in which diffusers draws them.
          params: the autoencoder's.
        """
        found, images = {}, [request.image for request in batch]
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

    def _latent_shape(self, request: Request) -> tuple[int, int, int]:
        factor = self._codec.factor
        return request.height // factor, request.width // factor, self._codec.channels
