"""What is measured of jaxdiff, each by a function that prepares it.

A part returns a function without arguments that does the work once, and returns its result when
the device has finished.
"""

from collections.abc import Callable
from functools import partial
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxdiff
from jaxdiff.devices import compilation, parallel
from jaxdiff.engine.engine import DTYPES
from jaxdiff.engine.prompts import PromptEncoder
from jaxdiff.families.networks import read_configs
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.weights.load import abstract_network, load_params
from tools.bench import workload
from tools.bench.workload import Workload

ONE_DEVICE = "data=1"  # as the other engine


def text(work: Workload, dtype: str, batch: int) -> Callable[[], jax.Array]:
    """Prompts, each met for the first time, to embeddings."""
    checkpoint = work.checkpoint
    encode = PromptEncoder(
        checkpoint,
        read_configs(checkpoint),
        DTYPES[dtype],
        parallel.make_mesh(ONE_DEVICE),
        clip_skip=0,
        chunks=1,
    )
    encode.load()
    turns = count()

    def run() -> jax.Array:
        prompts = workload.prompts(next(turns) * batch, batch)
        embeddings = jax.block_until_ready(encode(prompts))
        return embeddings[prompts[0]].context

    return run


def step(work: Workload, dtype: str, batch: int) -> Callable[[], jax.Array]:
    """One evaluation of the U-Net for a batch of images, each with its unguided half."""
    graph, params = _network(work, "unet", UNet2DConditionModel, dtype)
    rows = workload.GUIDED_PAIR * batch
    latents = jax.device_put(workload.latents(work, rows).astype(DTYPES[dtype]))
    told = {
        name: jnp.asarray(array, jnp.float32 if name == "time_ids" else DTYPES[dtype])
        for name, array in workload.conditioning(work, rows).items()
    }
    timesteps = jnp.full(rows, workload.TIMESTEP, jnp.float32)

    @compilation.jit
    def unet(params: dict, latents: jax.Array, told: dict) -> jax.Array:
        return nnx.merge(graph, params)(latents, timesteps, **told)

    return lambda: unet(params, latents, told).block_until_ready()


def decode(work: Workload, dtype: str, batch: int) -> Callable[[], jax.Array]:
    """Latents to images."""
    graph, params = _network(work, "vae", AutoencoderKL, dtype)
    latents = jax.device_put(workload.latents(work, batch).astype(DTYPES[dtype]))
    vae = compilation.jit(lambda params, latents: nnx.merge(graph, params).decode(latents))
    return lambda: vae(params, latents).block_until_ready()


def images(work: Workload, dtype: str, batch: int) -> Callable[[], np.ndarray]:
    """Prompts to 8-bit pixels."""
    settings = {
        "width": work.width,
        "height": work.height,
        "steps": work.steps,
        "guidance_scale": work.guidance_scale,
    }
    expecting = {jaxdiff.Request(prompt="", **settings): batch}
    model = jaxdiff.load(
        work.model, dtype=dtype, noise="torch", mesh=ONE_DEVICE, expecting=expecting
    )
    turns = count()

    def run() -> np.ndarray:
        number = batch * work.batches_a_turn
        first = next(turns) * number
        requests = [
            jaxdiff.Request(prompt=prompt, seed=first + index, **settings)
            for index, prompt in enumerate(workload.prompts(first, number))
        ]
        return np.stack([image.pixels for image in model.generate(requests, batch)])

    return run


def product(work: Workload, dtype: str, batch: int) -> Callable[[], jax.Array]:
    """The product of two square matrices, whatever the batch."""
    size = workload.product_size(platform())
    matrix = jax.device_put(workload.matrix(size).astype(DTYPES[dtype]))
    multiply = compilation.jit(jnp.matmul)
    return lambda: multiply(matrix, matrix).block_until_ready()


PARTS = {
    "text": text,
    "step": step,
    "decode": decode,
    "images": images,
    "first": images,  # prepares nothing that a user would not
    "product": product,
}


def device() -> str:
    """What the device is called."""
    return jax.devices()[0].device_kind


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def device_peak_bytes() -> int | None:
    """The most that has been in use on an accelerator; None on a CPU."""
    statistics = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return statistics and statistics["peak_bytes_in_use"]


def to_numpy(output: jax.Array | np.ndarray) -> np.ndarray:
    """An output in float32, images with the channels last."""
    return np.asarray(output).astype(np.float32)


def prepare_process(work: Workload) -> None:
    """JAX takes what it needs from its environment."""


def _network(work: Workload, name: str, model_class: type, dtype: str) -> tuple:
    checkpoint = work.checkpoint
    graph, shapes = abstract_network(model_class, read_configs(checkpoint)[name])
    load = partial(load_params, shapes, checkpoint.weights(name), DTYPES[dtype])
    return graph, load(jax.sharding.SingleDeviceSharding(jax.devices()[0]))
