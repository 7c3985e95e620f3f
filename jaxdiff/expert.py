"""A checkpoint's denoiser on the devices: what it is told of an image, and how it steps."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff import checks, parallel
from jaxdiff.checkpoint.diffusers import abstract_network, load_params
from jaxdiff.checkpoint.layout import Checkpoint
from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.schedule import FLOW_CLASS, NoiseSchedule
from jaxdiff.errors import InputError
from jaxdiff.models.clip import CLIPTextConfig
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.prompts import PromptEncoder
from jaxdiff.request import Options, Request

# What Stable Diffusion XL's refiner is told of an image's beauty (diffusers' defaults).
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


class Conditioning(NamedTuple):
    """What a denoiser is told of a batch of images; what it does not take is None.

    Attributes:
      context: [batch, tokens, width], the text.
      pooled: [batch, width], the text in one vector.
      time_ids: float32 [batch, 5 or 6], the sizes and so on that Stable Diffusion XL is told.
    """

    context: Array
    pooled: Array | None = None
    time_ids: Array | None = None


class Network(NamedTuple):
    """A denoiser without its weights; static under `jax.jit`.

    Attributes:
      prediction_type: as in `objective.to_x0`.
      distilled: whether it is told the guidance scale, rather than evaluated twice
        (Meng et al., 2023, arXiv:2210.03142).
    """

    graph: nnx.GraphDef
    prediction_type: str
    distilled: bool = False


class Expert:
    """A denoiser with its text encoders and its scheduler; most models have one, some two.

    Attributes:
      network, params: the U-Net and its weights.
      scheduler: the config of its scheduler, changed as the options ask.
      train_steps: how many timesteps it was trained with.
    """

    def __init__(self, checkpoint: Checkpoint, dtype, mesh: jax.sharding.Mesh, options: Options):
        config = UNetConfig.from_json(checkpoint.config("unet"))
        _refuse_misfits(checkpoint, config)
        graph, shapes = abstract_network(UNet2DConditionModel, config)
        self.params = load_params(
            shapes, checkpoint.weights("unet"), dtype, parallel.parameter_shardings(mesh, shapes)
        )
        self._encode = PromptEncoder(
            checkpoint, dtype, mesh, clip_skip=options.clip_skip, chunks=options.prompt_chunks
        )
        self._options = options
        self.scheduler = checkpoint.scheduler | checks.scheduler_changes(options.scheduler)
        self.train_steps = self.scheduler.get("num_train_timesteps", 1000)
        is_flow = self.scheduler.get("_class_name") == FLOW_CLASS
        self.network = Network(
            graph,
            "flow" if is_flow else self.scheduler.get("prediction_type", "epsilon"),
            distilled=config.time_cond_proj_dim is not None,
        )
        self._takes_time_ids = config.addition_embed_type == "text_time"
        self._takes_score = bool(checkpoint.index.get("requires_aesthetics_score"))
        self._ignores_empty = bool(checkpoint.index.get("force_zeros_for_empty_prompt"))

    def table(self, request: Request, begin: int = 0) -> samplers.SamplerTable:
        """The steps of the request's sampler; those before `begin` are another expert's.

        Raises:
          InputError: if the scheduler's config asks for what the sampler cannot do.
        """
        schedule = NoiseSchedule.from_json(self.scheduler, request.sampler)
        return samplers.sampler_table(
            request.sampler, schedule, request.steps, eta=self._options.eta, begin=begin
        )

    def conditioning(self, batch: Sequence[Request], *, negative: bool = False) -> Conditioning:
        """What the denoiser is told of a batch, or of what to steer away from."""
        prompts = [r.negative_prompt if negative else r.prompt for r in batch]
        embeddings = self._encode(prompts, negative=negative)
        if negative and self._ignores_empty and "" in embeddings:
            embeddings[""] = jax.tree.map(jnp.zeros_like, embeddings[""])
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *[embeddings[p] for p in prompts])
        time_ids = [self._time_ids(request, negative) for request in batch]
        return Conditioning(
            stacked.context,
            stacked.pooled if self._takes_time_ids else None,
            jnp.array(time_ids, jnp.float32) if self._takes_time_ids else None,
        )

    def _time_ids(self, request: Request, negative: bool) -> tuple[float, ...]:
        """Podell et al., 2023, arXiv:2307.01952, 2.2: as if the image had never been cropped."""
        size, corner = (request.height, request.width), (0, 0)
        if self._takes_score:
            score = NEGATIVE_AESTHETIC_SCORE if negative else AESTHETIC_SCORE
            return (*size, *corner, score)
        return (*size, *corner, *size)


def _refuse_misfits(checkpoint: Checkpoint, unet: UNetConfig) -> None:
    """Raises InputError unless the networks' configs fit each other."""
    encoders = [CLIPTextConfig.from_json(checkpoint.config(n)) for n in checkpoint.text_encoders]
    vae = AutoencoderKLConfig.from_json(checkpoint.config("vae"))
    widths = {
        "in_channels": vae.latent_channels,
        "out_channels": vae.latent_channels,
        "cross_attention_dim": sum(encoder.hidden_size for encoder in encoders),
    }
    if unet.addition_embed_type == "text_time":
        scores = bool(checkpoint.index.get("requires_aesthetics_score"))
        ids = (5 if scores else 6) * unet.addition_time_embed_dim
        widths["projection_class_embeddings_input_dim"] = encoders[-1].projection_dim + ids
    for key, width in widths.items():
        if getattr(unet, key) != width:
            raise InputError(
                f"{checkpoint.path}: the U-Net's {key} = {getattr(unet, key)} does not fit the "
                f"networks beside it, which need {width}; copy the checkpoint again"
            )
    if vae.out_channels != 3:
        raise InputError(
            f"{checkpoint.path}: the autoencoder's out_channels = {vae.out_channels} are no RGB"
        )
