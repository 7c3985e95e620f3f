"""A complete checkpoint, small enough for every test: real architecture, random weights."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

# Always one CPU device, because the tests compare bits. Must be set before JAX is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("XLA_FLAGS", None)
# Models that differ only in weights or options share a program: it is compiled once per test run,
# for all processes that pytest-xdist and the tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.mkdtemp(prefix="jaxdiff-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # small programs too
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)

TOKENIZER = Path(__file__).parents[1] / "jaxdiff" / "assets" / "shapes64" / "tokenizer"
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


@pytest.fixture(scope="module")
def compiled_fast():
    """Speeds up modules that compile a lot and need no exact bits, to 0.6 of the time.

    The processes that they start inherit it.
    """
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        jax.clear_caches()  # their keys do not include the option
        yield
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_faster(compiled_fast):
    """Also compiles fusions in XLA's older way, and in one thread: 0.7 of the time again.

    For modules that start no processes: those would share no program with this one.
    """
    from jaxdiff.devices import compilation

    older = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compilation.OPTIONS, "cpu", compilation.OPTIONS["cpu"] | older)
        compilation._options.cache_clear()
        yield
    compilation._options.cache_clear()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Returns a diffusers directory: 64x64 pixels, 8x8 latents, about 0.4 million weights."""
    from random_weights import random_params

    from jaxdiff.families.stable_diffusion import PIPELINE, STABLE_DIFFUSION
    from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
    from jaxdiff.models.text.clip import CLIPTextConfig, CLIPTextModel
    from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
    from jaxdiff.weights.save import save_pipeline

    networks = {
        "text_encoder": (
            CLIPTextModel,
            CLIPTextConfig(
                vocab_size=641,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=24,
                bos_token_id=639,
                eos_token_id=640,
                pad_token_id=640,
            ),
        ),
        "unet": (
            UNet2DConditionModel,
            UNetConfig(
                sample_size=8,
                block_out_channels=(32, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=32,
                attention_head_dim=4,
                norm_num_groups=8,
            ),
        ),
        "vae": (
            AutoencoderKL,
            AutoencoderKLConfig(
                sample_size=64,
                block_out_channels=(8, 16, 16, 32),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                norm_num_groups=8,
            ),
        ),
    }
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_pipeline(
        directory,
        components=STABLE_DIFFUSION.components,
        pipeline={"_class_name": PIPELINE, **STABLE_DIFFUSION.absent},
        configs={component: config for component, (_, config) in networks.items()},
        params={
            component: random_params(model, config, seed)
            for seed, (component, (model, config)) in enumerate(networks.items())
        },
        scheduler=SCHEDULER,
        tokenizers={"text_encoder": TOKENIZER},
        dtype=np.float32,
    )
    return directory


@pytest.fixture(scope="session")
def inpainting_checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """Returns the tiny checkpoint with a U-Net that also takes a mask and masked latents."""
    directory = tmp_path_factory.mktemp("checkpoint") / "inpainting"
    return _with_channels(tiny_checkpoint, directory, 5, "StableDiffusionInpaintPipeline")


@pytest.fixture(scope="session")
def editing_checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """Returns the tiny checkpoint with a U-Net that also takes the latents of an image to edit."""
    directory = tmp_path_factory.mktemp("checkpoint") / "editing"
    return _with_channels(tiny_checkpoint, directory, 4, "StableDiffusionInstructPix2PixPipeline")


def _with_channels(checkpoint: Path, directory: Path, more: int, pipeline: str) -> Path:
    """Writes a checkpoint whose U-Net takes more channels; returns its directory."""
    import json

    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, directory)
    weights = directory / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    first = tensors["conv_in.weight"]
    others = np.random.default_rng(0).normal(0, 0.2, (len(first), more, *first.shape[2:]))
    tensors["conv_in.weight"] = np.concatenate([first, others.astype(first.dtype)], axis=1)
    save_file(tensors, weights)
    changes = {
        "unet/config.json": {"in_channels": 4 + more},
        "model_index.json": {"_class_name": pipeline},
    }
    for name, change in changes.items():
        said = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(said | change))
    return directory
