"""A checkpoint's denoiser on the devices: its weights, text encoders and conditioning."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.controlnet import ControlNetFiles
from jaxdiff.checkpoint.ip_adapter import IPAdapterFiles
from jaxdiff.devices import parallel
from jaxdiff.diffusion import scheduler_config
from jaxdiff.engine.image_prompts import ImagePromptEncoder
from jaxdiff.engine.program import Denoising
from jaxdiff.engine.prompts import PromptEncoder
from jaxdiff.errors import InputError
from jaxdiff.families.model import ImageAdapter, Model, networks_of
from jaxdiff.families.tokenizers.tokenizer import of_checkpoint
from jaxdiff.request import Options, Request
from jaxdiff.weights.load import open_network


class LoadedDenoiser:
    """The denoiser of a base model or of a refiner, with its text encoders.

    Attributes:
      model: the checkpoint's networks as pure functions.
      stored: the denoiser's weights in their files.
      codec: the autoencoder's weights in their files.
      prompts: the text encoders.
      controls: the weights of its ControlNets in their files.
      image_prompts: its IP-Adapters.
      denoising: how the program evaluates the denoiser.
      image_noise: as in `Family`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheduler: dict,
        dtype,
        mesh: jax.sharding.Mesh,
        options: Options,
        controls: Sequence[ControlNetFiles] = (),
        adapters: Sequence[IPAdapterFiles] = (),
    ):
        """Locates the weights of the networks; reads none of them.

        Args:
          checkpoint: the base model or the refiner.
          scheduler: the checkpoint's scheduler config, as `Ensemble.schedulers` returns it.
          dtype: of the weights and the arithmetic.
          mesh: the devices.
          options: how the model is loaded and sampled.
          controls: the ControlNets that steer it.
          adapters: the IP-Adapters that show it image prompts.

        Raises:
          InputError: if the weights do not match the configs, or the networks do not fit the
            options.
        """
        self.model = model = networks_of(checkpoint)

        def stored(component: str, mesh: jax.sharding.Mesh, kind: str | None = None):
            network, tensors = model.networks[component], checkpoint.weights(component)
            return open_network(network.shapes, network.sharding, tensors, dtype, mesh, kind)

        kind = None if options.weights == "full" else options.weights
        self.stored = stored(model.denoiser.component, mesh, kind)
        self.codec = stored(model.codec.component, mesh)
        self._mesh, of_texts = mesh, mesh
        if options.text_encoders == "host":
            of_texts = parallel.host_mesh()
        self.prompts = PromptEncoder(
            model,
            of_checkpoint(checkpoint),
            {name: stored(name, of_texts, kind) for name in model.text_encoders},
            dtype,
            of_texts,
            clip_skip=options.clip_skip,
            chunks=options.prompt_chunks,
            unloads=options.text_encoders == "unload",
        )
        networks = checkpoint.family.networks()
        nets = [_fitted(networks.control, model, files, files.config) for files in controls]
        self.controls = [
            open_network(net.network.shapes, net.network.sharding, files.tensors, dtype, mesh, kind)
            for net, files in zip(nets, controls, strict=True)
        ]
        self.image_prompts = [
            _adapter(_fitted(networks.image_adapter, model, files, files), files, dtype, mesh)
            for files in adapters
        ]
        self.image_noise = checkpoint.family.image_noise(checkpoint)
        prediction_type = scheduler_config.prediction_type(scheduler)
        self.denoising = Denoising(model, prediction_type, tuple(nets))

    def encode_prompts(self, batch: Sequence[Request], *, guided: bool) -> None:
        """Encodes prompts, and negative ones if `guided`, ahead of their use."""
        for negative in (False, True)[: 1 + guided]:
            self.prompts([self._prompt(each, negative) for each in batch], negative=negative)

    def conditioning(self, batch: Sequence[Request], *, negative: bool = False):
        """Returns the denoiser's conditioning for a batch's prompts or negative prompts."""
        prompts = [self._prompt(request, negative) for request in batch]
        images = None if self.model.image_size is None else [r.image for r in batch]
        texts = self.prompts(prompts, images=images, negative=negative)
        if self.prompts.unloads or self.prompts.mesh is not self._mesh:
            texts = jax.device_put(texts, parallel.replicated(self._mesh))
        if negative and self.model.zeros_for_empty:
            texts = [
                text if prompt else jax.tree.map(jnp.zeros_like, text)
                for prompt, text in zip(prompts, texts, strict=True)
            ]
        text = jax.tree.map(lambda *arrays: jnp.stack(arrays), *texts)
        sizes = None
        if self.model.sizes:
            each = [self.model.sizes(r.height, r.width, negative) for r in batch]
            sizes = jnp.array(each, jnp.float32)
        conditioning = self.model.condition(text, sizes)
        prompts = [
            (
                encoder.negative(len(batch))
                if negative
                else encoder([request.ip_adapter_image[place] for request in batch]),
                jnp.array([request.ip_adapter_scale[place] for request in batch], jnp.float32),
            )
            for place, encoder in enumerate(self.image_prompts)
        ]
        return self._conditioned(conditioning, prompts)

    def _prompt(self, request: Request, negative: bool) -> str:
        if self.model.empty_at_zero and request.guidance_scale == 0:
            return ""
        return request.negative_prompt if negative else request.prompt

    def abstract_conditioning(
        self, batch: int, height: int, width: int, sharding: jax.sharding.Sharding
    ):
        """Returns the shapes of the conditioning of `batch` images, with the given sharding."""

        def placed(leaf) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch, *leaf.shape), leaf.dtype, sharding=sharding)

        sizes = None
        if self.model.sizes:
            count = len(self.model.sizes(1, 1, False))
            sizes = jax.ShapeDtypeStruct((count,), jnp.float32)
        conditioning = self.model.condition(self.prompts.abstract(height, width), sizes)
        scale = jax.ShapeDtypeStruct((), jnp.float32)
        prompts = [(encoder.abstract(), scale) for encoder in self.image_prompts]
        return jax.tree.map(placed, self._conditioned(conditioning, prompts))

    def _conditioned(self, conditioning, prompts: list):
        """Returns the conditioning with image prompts, if there are any."""
        if not prompts:
            return conditioning
        return self.image_prompts[0].adapter.conditioned(conditioning, prompts)


def _fitted(build: Callable, model: Model, files, *arguments):
    """Builds a network for a model; an error names its files."""
    try:
        return build(model.configs, *arguments)
    except InputError as problem:
        raise InputError(f"{files.path}: {problem}") from problem


def _adapter(
    adapter: ImageAdapter, files: IPAdapterFiles, dtype, mesh: jax.sharding.Mesh
) -> ImagePromptEncoder:
    stored = (
        open_network(network.shapes, network.sharding, tensors, dtype, mesh)
        for network, tensors in (
            (adapter.adapter, files.tensors),
            (adapter.encoder, files.encoder_tensors),
        )
    )
    return ImagePromptEncoder(adapter, tuple(stored), dtype, mesh)
