"""The parts measured for jaxdiff; each function prepares one.

A part returns a function without arguments that does the work once and returns the result when
the device has finished.
"""

from collections.abc import Callable
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from jaxdiff.devices import compilation, parallel
from jaxdiff.engine.denoiser import LoadedDenoiser
from jaxdiff.engine.engine import DTYPES
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.families.model import networks_of
from jaxdiff.request import Options
from jaxdiff.weights.load import load_params, places
from tools.bench import workload
from tools.bench.workload import Workload

ONE_DEVICE = "data=1"  # like the other engine
NUMBERS = ("time_ids", "guidance_scale")  # conditioning that is float32 whatever the dtype


def text(work: Workload, dtype: str, batch: int) -> Callable[[], jax.Array]:
    """Encodes prompts that are not in the cache to embeddings."""
    mesh = parallel.make_mesh(ONE_DEVICE)
    (scheduler,) = Ensemble(work.checkpoint).schedulers("")
    encode = LoadedDenoiser(work.checkpoint, scheduler, DTYPES[dtype], mesh, Options()).prompts
    encode.load()
    turns = count()

    def run() -> jax.Array:
        prompts = workload.prompts(next(turns) * batch, batch)
        embeddings = jax.block_until_ready(encode(prompts))
        return embeddings[0].context

    return run


def step(work: Workload, dtype: str, batch: int) -> Callable[[], jax.Array]:
    """Evaluates the denoiser once for a batch of images, each with any unconditional half."""
    network, params = _network(work, work.denoiser, dtype)
    rows = work.rows_an_image * batch
    latents = jax.device_put(workload.latents(work, rows).astype(DTYPES[dtype]))
    conditioning = {
        name: jnp.asarray(array, jnp.float32 if name in NUMBERS else DTYPES[dtype])
        for name, array in workload.conditioning(work, rows).items()
    }
    timesteps = jnp.full(rows, workload.TIMESTEP, jnp.float32)

    @compilation.jit
    def denoise(params: dict, latents: jax.Array, conditioning: dict) -> jax.Array:
        return network(params)(latents, timesteps, **conditioning)

    return lambda: denoise(params, latents, conditioning).block_until_ready()


def decode(work: Workload, dtype: str, batch: int) -> Callable[[], jax.Array]:
    """Decodes latents to images."""
    network, params = _network(work, "vae", dtype)
    latents = jax.device_put(workload.latents(work, batch).astype(DTYPES[dtype]))
    vae = compilation.jit(lambda params, latents: network(params).decode(latents))
    return lambda: vae(params, latents).block_until_ready()


def images(work: Workload, dtype: str, batch: int) -> Callable[[], np.ndarray]:
    """Makes 8-bit pixels from prompts."""
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
    """Multiplies two square matrices; the batch size is ignored."""
    size = workload.product_size(platform())
    matrix = jax.device_put(workload.matrix(size).astype(DTYPES[dtype]))
    multiply = compilation.jit(jnp.matmul)
    return lambda: multiply(matrix, matrix).block_until_ready()


PARTS = {
    "text": text,
    "step": step,
    "decode": decode,
    "images": images,
    "first": images,  # its preparation is the same as a user's
    "product": product,
}


def device() -> str:
    """Returns the device's name."""
    return jax.devices()[0].device_kind


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def device_peak_bytes() -> int | None:
    """Returns the peak memory used on an accelerator; None on a CPU."""
    statistics = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return statistics and statistics["peak_bytes_in_use"]


def to_numpy(output: jax.Array | np.ndarray) -> np.ndarray:
    """Converts an output to float32, with an image's channels last."""
    return np.asarray(output).astype(np.float32)


def prepare_process(work: Workload) -> None:
    """Keeps compiled programs, as `jaxdiff.load` does; JAX's settings are in the environment."""
    compilation.keep_programs()


def _network(work: Workload, name: str, dtype: str) -> tuple:
    network = networks_of(work.checkpoint).networks[name]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = places(network.shapes, DTYPES[dtype], device)
    return network, load_params(where, work.checkpoint.weights(name))
