"""LoRA files have the same effect in jaxdiff as in diffusers and PEFT."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxdiff
from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.checkpoint.original import ldm
from jaxdiff.families import open_checkpoint
from jaxdiff.families.model import networks_of
from jaxdiff.families.opening import open_ensemble
from jaxdiff.training import low_rank

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import families  # noqa: E402  (beside this file)

pytestmark = pytest.mark.usefixtures("compiled_faster")

REQUEST = jaxdiff.Request(prompt="a red heart", seed=7, steps=4, guidance_scale=3.0)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    return families.save("SD 1.5", tmp_path_factory.mktemp("family"))


def pipeline_of(directory: Path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(directory, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_weights(pipeline, directory: Path, *loras: str) -> None:
    """Asserts that we read the weights that `pipeline` has after fusing."""
    adapted, plain = open_ensemble(directory, lora=loras).base, open_checkpoint(directory)
    changed = 0
    for network in ("unet", *adapted.text_encoders):
        theirs = {
            key.removeprefix("text_model."): tensor.detach().numpy()
            for key, tensor in getattr(pipeline, network).state_dict().items()
        }
        for key, tensor in adapted.weights(network).items():
            np.testing.assert_allclose(tensor.read(), theirs[key], atol=2e-6, err_msg=key)
            if tensor.updates:
                changed += 1
                assert np.abs(tensor.read() - plain.weights(network)[key].read()).max() > 1e-3
    assert changed > 8


def taught(directory: Path, file: Path) -> None:
    """Writes a LoRA as training does, with random numbers that have a large effect."""
    networks = networks_of(open_checkpoint(directory)).networks
    shapes = {
        "unet": networks["unet"].shapes,
        "text_encoder": networks["text_encoder"].shapes,
    }
    adapters = low_rank.init(shapes, 4, jax.random.key(0))
    random = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: (0.2 * random.standard_normal(leaf.shape)).astype(np.float32), adapters
    )
    low_rank.save_lora(adapters, 8.0, file)


def test_a_lora_as_training_writes_it_gives_the_same_image_in_diffusers(tmp_path, record_property):
    """Uses the bundled model at weights 1 and 0.5, as an adapter and fused."""
    directory, file = BUNDLED["shapes64"], tmp_path / low_rank.FILE
    taught(directory, file)
    pipeline = pipeline_of(directory)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    request = dataclasses.replace(REQUEST, sampler="ddim")  # fresh noise magnifies differences

    def theirs() -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(REQUEST.seed)
        arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": generator}
        return np.asarray(pipeline(REQUEST.prompt, **arguments).images[0]).astype(int)

    plain = theirs()
    pipeline.load_lora_weights(tmp_path, adapter_name="heart")
    wanted = {"1": theirs()}
    pipeline.set_adapters(["heart"], [0.5])
    wanted["0.5"] = theirs()
    pipeline.set_adapters(["heart"], [1.0])
    pipeline.fuse_lora(lora_scale=0.5)
    np.testing.assert_allclose(theirs(), wanted["0.5"], atol=1)
    for weight, image in wanted.items():
        model = jaxdiff.load("shapes64", noise="torch", lora=f"{file}:{weight}")
        difference = np.abs(model.generate([request], batch_size=1)[0].pixels - image)
        record_property(f"difference at {weight}", f"{difference.max()} {difference.mean():.4f}")
        assert difference.max() <= 2
        assert np.abs(plain - image).mean() > 1


def test_two_loras_with_peft_metadata(sd, tmp_path):
    """diffusers saves alpha and rank in the file's metadata."""
    pipeline = pipeline_of(sd)
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        pipeline.unet.add_adapter(
            peft.LoraConfig(
                r=2 + number,
                lora_alpha=5,
                target_modules=TARGETS,
                alpha_pattern={
                    r"mid_block\..*\.to_q": 32,
                    "attn1.to_q": 3,
                    r"(down|up)_blocks\.\d+\.attentions\..*to_k": 7,
                    "to_q": 11,
                },
                init_lora_weights=False,
            ),
            adapter_name=name,
        )
        torch.manual_seed(number)
        pipeline.text_encoder.add_adapter(
            peft.LoraConfig(r=3, target_modules=["q_proj", "fc1"], init_lora_weights=False),
            adapter_name=name,
        )
        configs = {
            network: getattr(pipeline, network).peft_config[name].to_dict()
            for network in ("unet", "text_encoder")
        }
        for config in configs.values():
            config["target_modules"] = list(config["target_modules"])
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path / name,
            unet_lora_layers=peft.get_peft_model_state_dict(pipeline.unet, adapter_name=name),
            text_encoder_lora_layers=peft.get_peft_model_state_dict(
                pipeline.text_encoder, adapter_name=name
            ),
            unet_lora_adapter_metadata=configs["unet"],
            text_encoder_lora_adapter_metadata=configs["text_encoder"],
        )
    pipeline = pipeline_of(sd)
    for name in ("one", "two"):
        pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
    pipeline.set_adapters(["one", "two"], [1.0, -0.5])
    pipeline.fuse_lora(adapter_names=["one", "two"])
    pipeline.unload_lora_weights()
    files = (f"{tmp_path / name / low_rank.FILE}:{w}" for name, w in (("one", 1), ("two", -0.5)))
    assert_same_weights(pipeline, sd, *files)


def drawn(directory: Path, names: Iterator[tuple[str, str, str]]) -> dict[str, np.ndarray]:
    """Draws kohya's file: both halves and the alpha for each (network, key, name in the file).

    The alpha is the same for all, as kohya's scripts write it: if alphas differ, diffusers 0.42
    loses those of attention.
    """
    checkpoint, random, tensors = open_checkpoint(directory), np.random.default_rng(0), {}
    for number, (network, key, name) in enumerate(names):
        out, inputs, *kernel = checkpoint.weights(network)[key].shape
        rank = 2 + number % 2
        shapes = {"down": (rank, inputs, *kernel), "up": (out, rank, *(1 for _ in kernel))}
        for part, shape in shapes.items():
            half = random.standard_normal(shape).astype(np.float32)
            tensors[f"{name}.lora_{part}.weight"] = half
        tensors[f"{name}.alpha"] = np.array(1.0, np.float32)
    return tensors


def adaptable(directory: Path, network: str, parts: tuple[str, ...]) -> list[str]:
    ends = tuple(f"{part}.weight" for part in parts)
    return [key for key in open_checkpoint(directory).weights(network) if key.endswith(ends)]


def kohya_text(directory: Path, network: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    for key in adaptable(directory, network, ("q_proj", "v_proj", "out_proj", "fc2")):
        layer = key.removesuffix(".weight").replace(".", "_")
        yield network, key, f"{prefix}_text_model_{layer}"


def test_kohyas_names(sd, tmp_path):
    def names():
        for key in adaptable(sd, "unet", (*TARGETS, "net.2", "conv2")):
            yield "unet", key, f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        yield from kohya_text(sd, "text_encoder", "lora_te")

    save_file(drawn(sd, names()), tmp_path / low_rank.FILE)
    pipeline = pipeline_of(sd)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert_same_weights(pipeline, sd, str(tmp_path / low_rank.FILE))


def test_kohyas_names_for_xl_are_the_original_ones(tmp_path):
    xl = families.save("SDXL", tmp_path)
    config = open_checkpoint(xl).config("unet")
    theirs = {ours: original for ours, original, _ in ldm.unet_names(config)}

    def names():
        for key in adaptable(xl, "unet", (*TARGETS, "time_emb_proj", "upsamplers.0.conv")):
            original = theirs[key].removesuffix(".weight").replace(".", "_")
            yield "unet", key, f"lora_unet_{original}"
        yield from kohya_text(xl, "text_encoder", "lora_te1")
        yield from kohya_text(xl, "text_encoder_2", "lora_te2")

    save_file(drawn(xl, names()), tmp_path / low_rank.FILE)
    pipeline = pipeline_of(xl)
    pipeline.load_lora_weights(tmp_path / low_rank.FILE)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert_same_weights(pipeline, xl, str(tmp_path / low_rank.FILE))


def test_a_file_written_by_peft(sd, tmp_path):
    pipeline = pipeline_of(sd)
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": True, "init_lora_weights": False}
    adapted = peft.get_peft_model(
        pipeline.unet, peft.LoraConfig(target_modules=TARGETS, **settings)
    )
    adapted.save_pretrained(tmp_path)
    pipeline.unet = adapted.merge_and_unload()
    file = str(tmp_path / "adapter_model.safetensors")
    plain = open_checkpoint(sd)
    assert open_ensemble(sd, lora=[file]).base.weights("vae") == plain.weights("vae")
    assert_same_weights(pipeline, sd, file)
