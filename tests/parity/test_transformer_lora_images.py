"""LoRA files for transformers have the same effect in jaxdiff as in diffusers and PEFT."""

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import original_transformers
import pytest
from safetensors.numpy import save_file

import jaxdiff
from jaxdiff.checkpoint import lora
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.families import flux, flux2, open_checkpoint, z_image
from jaxdiff.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from jaxdiff.models.flux import FluxConfig, FluxTransformer2DModel
from jaxdiff.models.flux2 import Flux2Config, Flux2Transformer2DModel
from jaxdiff.models.sd3 import SD3Config, SD3Transformer2DModel
from jaxdiff.models.z_image import ZImageConfig, ZImageTransformer2DModel
from jaxdiff.weights.load import file_shapes
from jaxdiff.weights.network import abstract_network

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import transformer_families  # noqa: E402  (beside this file)
from diffusers.loaders import single_file_utils  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

REQUEST = jaxdiff.Request(prompt="a red heart", seed=7, steps=4, width=64, height=64)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
BLOCKS = [*ATTENTION, "to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.2"]
ENDS = ["context_embedder", "norm_out.linear", "proj_out", "timestep_embedder.linear_1"]
TARGETS = [*BLOCKS, *ENDS, "norm1.linear", "norm1_context.linear", "norm.linear", "proj_mlp"]
TEXT_TARGETS = ["q_proj", "out_proj", "fc1"]
FILE = "pytorch_lora_weights.safetensors"
KOHYAS = re.compile(r"double_blocks\.\d+\.\w+\.\w+|single_blocks\.\d+\.(linear2|modulation\.lin)")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Returns a function that saves the checkpoint of a family and returns its directory."""
    saved = {}

    def save(family: str) -> Path:
        if family not in saved:
            folder = tmp_path_factory.mktemp("family")
            saved[family] = transformer_families.save(family, folder)
        return saved[family]

    return save


def pipeline_of(directory: Path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_of(pipeline) -> np.ndarray:
    image = pipeline(
        prompt=REQUEST.prompt,
        generator=torch.Generator().manual_seed(REQUEST.seed),
        num_inference_steps=REQUEST.steps,
        width=REQUEST.width,
        height=REQUEST.height,
    ).images[0]
    return np.asarray(image).astype(int)


def assert_same_images(record, pipeline, plain: np.ndarray, directory: Path, *loras: str) -> None:
    """Asserts that we make the image of a pipeline that has loaded LoRAs."""
    theirs = image_of(pipeline)
    model = jaxdiff.load(directory, noise="torch", lora=loras)
    difference = np.abs(model.generate([REQUEST])[0].pixels - theirs)
    record("difference", f"{difference.max()} {difference.mean():.4f}")
    assert difference.max() <= 2
    assert np.abs(plain - theirs).mean() > 2


def assert_same_effect(record, directory: Path, file: Path, tensors: dict) -> None:
    """Asserts that a LoRA file with these tensors changes diffusers' image as it changes ours."""
    save_file(tensors, file)
    pipeline = pipeline_of(directory)
    plain = image_of(pipeline)
    pipeline.load_lora_weights(file)
    assert_same_images(record, pipeline, plain, directory, str(file))


def write_peft(pipeline, folder: Path, rank: int, encoders: tuple[str, ...]) -> None:
    """Writes a LoRA as diffusers' training scripts do, with alpha and rank in the metadata."""
    torch.manual_seed(rank)
    networks = {"transformer": TARGETS, **dict.fromkeys(encoders, TEXT_TARGETS)}
    arguments = {}
    for network, targets in networks.items():
        module = getattr(pipeline, network)
        module.add_adapter(
            peft.LoraConfig(
                r=rank,
                lora_alpha=3 * rank,
                target_modules=targets,
                init_lora_weights=False,
                alpha_pattern={targets[0]: 2},
            ),
            adapter_name=folder.name,
        )
        config = module.peft_config[folder.name].to_dict()
        config["target_modules"] = list(config["target_modules"])
        state = peft.get_peft_model_state_dict(module, adapter_name=folder.name)
        arguments |= {f"{network}_lora_layers": state, f"{network}_lora_adapter_metadata": config}
    pipeline.save_lora_weights(folder, **arguments)


@pytest.mark.parametrize(
    ("family", "encoders"),
    [
        ("FLUX.1 dev", ("text_encoder",)),
        ("Stable Diffusion 3.5", ("text_encoder", "text_encoder_2")),
    ],
)
def test_a_file_written_by_diffusers(directory, tmp_path, record_property, family, encoders):
    model, folder = directory(family), tmp_path / "style"
    pipeline = pipeline_of(model)
    plain = image_of(pipeline)
    write_peft(pipeline, folder, 3, encoders)
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(folder)
    assert_same_images(record_property, pipeline, plain, model, f"{folder / FILE}")


def test_two_loras_with_weights(directory, tmp_path, record_property):
    model = directory("FLUX.1 dev")
    for rank, name in ((2, "one"), (4, "two")):
        write_peft(pipeline_of(model), tmp_path / name, rank, ("text_encoder",))
    pipeline = pipeline_of(model)
    plain = image_of(pipeline)
    for name in ("one", "two"):
        pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
    pipeline.set_adapters(["one", "two"], [0.8, -0.5])
    loras = (f"{tmp_path / name / FILE}:{w}" for name, w in (("one", 0.8), ("two", -0.5)))
    assert_same_images(record_property, pipeline, plain, model, *loras)


def drawn(rows: int, columns: int, seed: int, rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Returns down [rank, columns] and up [rows, rank]; their product is about as large as 1."""
    random = np.random.default_rng(seed)
    halves = random.standard_normal((rank, columns)), random.standard_normal((rows, rank))
    return tuple((half * columns**-0.25).astype(np.float32) for half in halves)


def kohya_tensors(weights, names) -> dict[str, np.ndarray]:
    """Returns kohya's tensors for layers with the names of a table."""
    tensors = {}
    for seed, (name, layer) in enumerate(names.items()):
        shapes = [weights[key].shape for key in layer.keys]
        down, up = drawn(sum(shape[0] for shape in shapes), shapes[0][1], seed)
        name = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = np.array(3, np.float32)
    return tensors


def test_kohyas_names_for_flux(directory, tmp_path, record_property):
    """Without layers that diffusers 0.42 splits only at FLUX.1's own width or loses.

    It loses CLIP's attention and the transformer's layers outside of its blocks.
    """
    model = directory("FLUX.1 dev")
    checkpoint = open_checkpoint(model)
    names = {
        name: layer
        for name, layer in original_transformers.lora_layers(checkpoint).items()
        if KOHYAS.fullmatch(name)
    }
    tensors = kohya_tensors(checkpoint.weights("transformer"), names)
    for key, tensor in checkpoint.weights("text_encoder").items():
        if key.endswith(("fc1.weight", "fc2.weight")):
            name = f"lora_te1_text_model_{key.removesuffix('.weight').replace('.', '_')}"
            down, up = drawn(*tensor.shape, len(tensors))
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = np.array(1, np.float32)
    assert_same_effect(record_property, model, tmp_path / "kohya.safetensors", tensors)


def test_xlabs_names_for_flux(directory, tmp_path, record_property):
    model, width, tensors = directory("FLUX.1 dev"), 32, {}
    shapes = {
        **{f"double_blocks.0.processor.qkv_lora{n}": (3 * width, width) for n in (1, 2)},
        **{f"double_blocks.0.processor.proj_lora{n}": (width, width) for n in (1, 2)},
        **{f"single_blocks.{n}.processor.qkv_lora": (3 * width, width) for n in (0, 1)},
        **{f"single_blocks.{n}.processor.proj_lora": (width, 5 * width) for n in (0, 1)},
    }
    for seed, (name, shape) in enumerate(shapes.items()):
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = drawn(*shape, seed)
    assert_same_effect(record_property, model, tmp_path / "xlabs.safetensors", tensors)


class Original(dict):
    """A file's tensors in which those that no LoRA changes, such as biases, are zeros."""

    def pop(self, key, *default):
        return super().pop(key, *default or [torch.zeros(21504)])


@pytest.mark.parametrize(
    ("family", "network", "config", "convert"),
    [
        (
            flux.FLUX,
            FluxTransformer2DModel,
            FluxConfig(num_layers=2, num_single_layers=2, guidance_embeds=True),
            single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        ),
        (
            flux2.FLUX_2,
            Flux2Transformer2DModel,
            Flux2Config(num_layers=2, num_single_layers=2),
            single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
        ),
        (
            z_image.Z_IMAGE,
            ZImageTransformer2DModel,
            ZImageConfig(n_layers=2),
            single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        ),
        (
            STABLE_DIFFUSION_3,
            SD3Transformer2DModel,
            SD3Config(num_layers=3, dual_attention_layers=(0,)),
            single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        ),
    ],
    ids=["FLUX.1", "FLUX.2", "Z-Image", "Stable Diffusion 3.5"],
)
def test_original_names_and_rows_are_those_of_single_files(
    tmp_path, family, network, config, convert
):
    """A LoRA's product with original names, converted by diffusers, is what we add.

    The rows are those of the published models; of each layer's columns, there are two.
    """
    weights = {
        key: StoredTensor(tmp_path, key, "F32", (shape[0], 2) if len(shape) in (2, 4) else shape, 0)
        for key, shape in file_shapes(abstract_network(network, config)[1]).items()
    }
    configs = {"transformer": asdict(config)}
    plain = Checkpoint(tmp_path, "small", family, {}, configs, {"transformer": weights}, {}, {})
    names = original_transformers.lora_layers(plain)
    tensors = kohya_tensors(weights, names)
    save_file(tensors, tmp_path / "style.safetensors")
    original = Original()
    for name in names:
        kohya = f"lora_unet_{name.replace('.', '_')}"
        down, up = (tensors[f"{kohya}.lora_{part}.weight"] for part in ("down", "up"))
        original[f"{name}.weight"] = torch.from_numpy(3 / 2 * up @ down)
    wanted = convert(original)
    adapted = lora.adapted(plain, [str(tmp_path / "style.safetensors")])
    added = {
        key: tensor.updates[0].read()
        for key, tensor in adapted.weights("transformer").items()
        if tensor.updates
    }
    assert len(added) > 20
    for key, update in added.items():
        np.testing.assert_allclose(update, wanted[key].numpy(), atol=1e-5, err_msg=key)
