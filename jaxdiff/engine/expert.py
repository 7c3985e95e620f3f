"""A checkpoint's denoiser on the devices: what it is told of an image, and how it steps."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff import checks
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.schedule import FLOW_CLASS, NoiseSchedule
from jaxdiff.diffusion.solvers import SamplerTable
from jaxdiff.engine.prompts import PromptEncoder
from jaxdiff.families.networks import read_configs
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.request import Options, Request
from jaxdiff.weights.load import open_network

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
      network, stored: the U-Net, and where its weights lie.
      prompts: the text encoders.
      scheduler: the config of its scheduler, changed as the options ask.
      train_steps: how many timesteps it was trained with.
    """

    def __init__(self, checkpoint: Checkpoint, dtype, mesh: jax.sharding.Mesh, options: Options):
        configs = read_configs(checkpoint)
        config = configs["unet"]
        self.stored = open_network(
            UNet2DConditionModel, config, checkpoint.weights("unet"), dtype, mesh
        )
        self.prompts = PromptEncoder(
            checkpoint,
            configs,
            dtype,
            mesh,
            clip_skip=options.clip_skip,
            chunks=options.prompt_chunks,
        )
        self._options = options
        self.scheduler = checks.changed_scheduler(checkpoint.scheduler, options.scheduler)
        self.train_steps = self.scheduler.get("num_train_timesteps", 1000)
        is_flow = self.scheduler.get("_class_name") == FLOW_CLASS
        self.network = Network(
            self.stored.graph,
            "flow" if is_flow else self.scheduler.get("prediction_type", "epsilon"),
            distilled=config.time_cond_proj_dim is not None,
        )
        self._takes_time_ids = config.addition_embed_type == "text_time"
        self._takes_score = bool(checkpoint.index.get("requires_aesthetics_score"))
        self._ignores_empty = bool(checkpoint.index.get("force_zeros_for_empty_prompt"))

    def table(self, request: Request, begin: int = 0) -> SamplerTable:
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
        embeddings = self.prompts(prompts, negative=negative)
        if negative and self._ignores_empty and "" in embeddings:
            embeddings[""] = jax.tree.map(jnp.zeros_like, embeddings[""])
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *[embeddings[p] for p in prompts])
        time_ids = [self._time_ids(request, negative) for request in batch]
        return Conditioning(
            stacked.context,
            stacked.pooled if self._takes_time_ids else None,
            jnp.array(time_ids, jnp.float32) if self._takes_time_ids else None,
        )

    def abstract_conditioning(self, batch: int, sharding: jax.sharding.Sharding) -> Conditioning:
        """The shapes of what `conditioning` gives for so many images, placed by `sharding`."""
        one = self.prompts.abstract()
        time_ids = jax.ShapeDtypeStruct((5 if self._takes_score else 6,), jnp.float32)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape), leaf.dtype, sharding=sharding),
            Conditioning(
                one.context,
                one.pooled if self._takes_time_ids else None,
                time_ids if self._takes_time_ids else None,
            ),
        )

    def _time_ids(self, request: Request, negative: bool) -> tuple[float, ...]:
        """Podell et al., 2023, arXiv:2307.01952, 2.2: as if the image had never been cropped."""
        size, corner = (request.height, request.width), (0, 0)
        if self._takes_score:
            score = NEGATIVE_AESTHETIC_SCORE if negative else AESTHETIC_SCORE
            return (*size, *corner, score)
        return (*size, *corner, *size)
