"""The parts measured for PyTorch diffusers, like those in `ours`, in its fastest configuration.

It uses all threads, fused attention (diffusers' default), inference mode, channels-last
convolutions if they are faster, and on GPUs a compiled denoiser and decoder.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import diffusers
import numpy as np
import torch
from PIL import Image

from tools.bench import workload
from tools.bench.workload import Workload

LAYOUT_STEPS = 2  # steps of the trial images that choose the faster layout
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def text(work: Workload, dtype: str, batch: int) -> Callable[[], torch.Tensor]:
    """Encodes prompts to embeddings; there is no cache here."""
    pipeline = _pipeline(work, dtype, **{work.denoiser: None}, vae=None)
    # Pipelines without an unconditional half do not know this option.
    options = {} if work.rows_an_image == 1 else {"do_classifier_free_guidance": False}
    turns = itertools.count()

    def run() -> torch.Tensor:
        prompts = workload.prompts(next(turns) * batch, batch)
        with torch.inference_mode():
            context, *_ = pipeline.encode_prompt(
                prompts, device=DEVICE, num_images_per_prompt=1, **options
            )
        _synchronize()
        return context[0]

    return run


def step(work: Workload, dtype: str, batch: int) -> Callable[[], torch.Tensor]:
    """Evaluates the denoiser once for a batch of images, each with any unconditional half."""
    network, forward = (_unet if work.denoiser == "unet" else _flux)(work, dtype, batch)
    return _fastest(network, network, forward, work.compile_mode)


def _unet(work: Workload, dtype: str, batch: int) -> tuple[torch.nn.Module, Callable]:
    unet = diffusers.UNet2DConditionModel.from_pretrained(
        work.model, subfolder="unet", dtype=_dtype(dtype)
    ).to(DEVICE)
    rows = work.rows_an_image * batch
    inputs = workload.conditioning(work, rows)
    added = {
        name: _tensor(inputs[key], dtype)
        for name, key in (("text_embeds", "pooled"), ("time_ids", "time_ids"))
        if key in inputs
    }
    latents = _tensor(np.moveaxis(workload.latents(work, rows), -1, 1), dtype)
    context = _tensor(inputs["context"], dtype)
    timestep = torch.tensor(float(workload.TIMESTEP), device=DEVICE)

    def forward(network: Callable) -> torch.Tensor:
        return network(latents, timestep, context, added_cond_kwargs=added).sample

    return unet, forward


def _flux(work: Workload, dtype: str, batch: int) -> tuple[torch.nn.Module, Callable]:
    pipeline, numbers = diffusers.FluxPipeline, _dtype(dtype)
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(
        work.model, subfolder="transformer", dtype=numbers
    ).to(DEVICE)
    inputs = {
        name: _tensor(array, dtype) for name, array in workload.conditioning(work, batch).items()
    }
    latents = _tensor(np.moveaxis(workload.latents(work, batch), -1, 1), dtype)
    _, channels, height, width = latents.shape
    arguments = {
        "hidden_states": pipeline._pack_latents(latents, batch, channels, height, width),
        "timestep": torch.full((batch,), workload.TIMESTEP / 1000, dtype=numbers, device=DEVICE),
        "guidance": inputs.get("guidance_scale"),
        "pooled_projections": inputs["pooled"],
        "encoder_hidden_states": inputs["context"],
        "txt_ids": torch.zeros(inputs["context"].shape[1], 3, dtype=numbers, device=DEVICE),
        "img_ids": pipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, DEVICE, numbers
        ),
    }

    def forward(network: Callable) -> torch.Tensor:
        packed = network(**arguments).sample
        return pipeline._unpack_latents(packed, height, width, vae_scale_factor=1)

    return transformer, forward


def decode(work: Workload, dtype: str, batch: int) -> Callable[[], torch.Tensor]:
    """Decodes latents to images."""
    vae = diffusers.AutoencoderKL.from_pretrained(
        work.model, subfolder="vae", dtype=_dtype(dtype)
    ).to(DEVICE)
    latents = _tensor(np.moveaxis(workload.latents(work, batch), -1, 1), dtype)

    def forward(decode: Callable) -> torch.Tensor:
        return decode(latents).sample

    return _fastest(vae, vae.decode, forward, work.compile_mode)


def images(work: Workload, dtype: str, batch: int) -> Callable[[], np.ndarray]:
    """Makes 8-bit pixels from prompts; the conversion to 8 bits runs on the device."""
    pipeline = _compiled_pipeline(work, dtype)
    few = replace(work, steps=LAYOUT_STEPS)
    _choose_layout(
        (_denoiser(pipeline, work), pipeline.vae), lambda: _pixels(pipeline, few, 0, batch)
    )
    batches = _batches(pipeline, work, batch)
    return lambda: np.concatenate(list(itertools.islice(batches, work.batches_a_turn)))


def first(work: Workload, dtype: str, batch: int) -> Callable[[], np.ndarray]:
    """Does the same as `images`, but without layout trials."""
    batches = _batches(_compiled_pipeline(work, dtype), work, batch)
    return lambda: np.concatenate(list(itertools.islice(batches, work.batches_a_turn)))


def files(work: Workload, dtype: str, batch: int) -> Callable[[], np.ndarray]:
    """Makes PNG files from prompts, in the loop that a user would write instead of a job."""
    pipeline = _compiled_pipeline(work, dtype)
    few = replace(work, steps=LAYOUT_STEPS)
    _choose_layout(
        (_denoiser(pipeline, work), pipeline.vae), lambda: _pixels(pipeline, few, 0, batch)
    )
    batches = _batches(pipeline, work, batch)

    def run() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(work.batches_a_turn):
                pixels = next(batches)
                for index, image in enumerate(pixels):
                    Image.fromarray(image).save(f"{folder}/{number * batch + index:09d}.png")
        return pixels

    return run


def product(work: Workload, dtype: str, batch: int) -> Callable[[], torch.Tensor]:
    """Multiplies two square matrices; the batch size is ignored."""
    size = workload.product_size(platform())
    matrix = _tensor(workload.matrix(size), dtype)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            result = matrix @ matrix
        _synchronize()
        return result

    return run


PARTS = {
    "text": text,
    "step": step,
    "decode": decode,
    "images": images,
    "first": first,
    "files": files,
    "product": product,
}


def device() -> str:
    """Returns the device's name."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def platform() -> str:
    """Returns "cpu" or "gpu", as in JAX."""
    return "gpu" if DEVICE == "cuda" else "cpu"


def device_peak_bytes() -> int | None:
    """Returns the peak memory allocated on a GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def to_numpy(output: torch.Tensor | np.ndarray) -> np.ndarray:
    """Converts an output to float32, with an image's channels last."""
    if isinstance(output, np.ndarray):
        return output.astype(np.float32)
    array = output.float().cpu().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def prepare_process(work: Workload) -> None:
    """Sets all cores, the share of a GPU's memory, and TF32 for float32 products, as in XLA."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")
    if DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(work.memory_fraction)


def _batches(pipeline, work: Workload, batch: int) -> Iterator[np.ndarray]:
    for first in itertools.count(0, batch):
        yield _pixels(pipeline, work, first, batch)


@torch.inference_mode()
def _pixels(pipeline, work: Workload, first: int, batch: int) -> np.ndarray:
    seeds = range(first, first + batch)
    pictures = pipeline(
        workload.prompts(first, batch),
        width=work.width,
        height=work.height,
        num_inference_steps=work.steps,
        guidance_scale=work.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _pipeline(work: Workload, dtype: str, **without):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        work.model, dtype=_dtype(dtype), **without
    ).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _compiled_pipeline(work: Workload, dtype: str):
    pipeline = _pipeline(work, dtype)
    if work.compile_mode != "off":
        _denoiser(pipeline, work).compile(mode=work.compile_mode, dynamic=False)
        pipeline.vae.decode = torch.compile(
            pipeline.vae.decode, mode=work.compile_mode, dynamic=False
        )
    return pipeline


def _denoiser(pipeline, work: Workload) -> torch.nn.Module:
    return getattr(pipeline, work.denoiser)


def _fastest(
    module: torch.nn.Module, function: Callable, forward: Callable, mode: str
) -> Callable[[], torch.Tensor]:
    """Makes a part from `forward(function)`, after choosing the module's layout."""
    if mode != "off":
        function = torch.compile(function, mode=mode, dynamic=False)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            output = forward(function)
        _synchronize()
        return output

    _choose_layout((module,), run)
    return run


def _choose_layout(modules: tuple[torch.nn.Module, ...], run: Callable) -> None:
    """Sets the modules' convolutions to the layout in which `run` is faster.

    On GPUs that is channels-last, without a trial.
    """
    seconds = {torch.channels_last: 0.0}
    for layout in LAYOUTS if DEVICE == "cpu" else ():
        for module in modules:
            module.to(memory_format=layout)
        run()  # the first run is slower
        began = time.perf_counter()
        run()
        seconds[layout] = time.perf_counter() - began
    for module in modules:
        module.to(memory_format=min(seconds, key=seconds.get))


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.tensor(array, dtype=_dtype(dtype), device=DEVICE)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
