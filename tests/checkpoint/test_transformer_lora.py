"""LoRA files for transformers: every naming of the layers of every family, and rejected files."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import original_transformers
import pytest
from safetensors.numpy import save_file

from jaxdiff.checkpoint import lora
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.weight_files import read_weights
from jaxdiff.errors import InputError
from jaxdiff.families import flux, flux2, qwen_image, sana, z_image
from jaxdiff.families.pixart import PIXART, SIGMA
from jaxdiff.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from jaxdiff.models.flux import FluxConfig, FluxTransformer2DModel
from jaxdiff.models.flux2 import Flux2Config, Flux2Transformer2DModel
from jaxdiff.models.pixart import PixArtConfig, PixArtTransformer2DModel
from jaxdiff.models.qwen_image import QwenImageConfig, QwenImageTransformer2DModel
from jaxdiff.models.sana import SanaConfig, SanaTransformer2DModel
from jaxdiff.models.sd3 import SD3Config, SD3Transformer2DModel
from jaxdiff.models.text.clip import CLIPTextConfig, CLIPTextModel
from jaxdiff.models.text.t5 import T5Config, T5EncoderModel
from jaxdiff.models.z_image import ZImageConfig, ZImageTransformer2DModel
from jaxdiff.weights.load import file_shapes
from jaxdiff.weights.network import abstract_network

RANK = 2
TINY = {"num_layers": 2, "num_attention_heads": 2}
TINY_CLIP = {"hidden_size": 8, "num_hidden_layers": 2, "max_position_embeddings": 8}
CLIP = CLIPTextModel, CLIPTextConfig(vocab_size=20, intermediate_size=16, **TINY_CLIP)
T5 = T5EncoderModel, T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
FLUX_1 = FluxConfig(
    **TINY,
    **{"num_single_layers": 3, "attention_head_dim": 12, "axes_dims_rope": (4, 4, 4)},
    **{"joint_attention_dim": 8, "pooled_projection_dim": 6, "guidance_embeds": True},
)
FLUX_2 = Flux2Config(
    **TINY,
    **{"num_single_layers": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)},
    **{"joint_attention_dim": 8, "timestep_guidance_channels": 8},
)
SD_3 = SD3Config(
    **TINY,
    **{"attention_head_dim": 8, "caption_projection_dim": 16, "joint_attention_dim": 8},
    **{"pooled_projection_dim": 6, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
)
SIGMAS = PixArtConfig(
    **TINY, attention_head_dim=8, cross_attention_dim=16, sample_size=8, caption_channels=8
)
Z_IMAGE = ZImageConfig(
    **{"dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 8},
    **{"axes_dims": (4, 4, 4), "axes_lens": (32, 8, 8)},
)
QWEN = QwenImageConfig(
    **TINY, attention_head_dim=12, joint_attention_dim=8, axes_dims_rope=(4, 4, 4)
)
SANA = SanaConfig(
    **TINY,
    **{"attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8},
    **{"cross_attention_dim": 16, "caption_channels": 8},
)


# A family, then the class and the config of its transformer and of its text encoders.
MODELS = {
    "FLUX.1": (flux.FLUX, (FluxTransformer2DModel, FLUX_1), CLIP, T5),
    "Stable Diffusion 3.5": (STABLE_DIFFUSION_3, (SD3Transformer2DModel, SD_3), CLIP, CLIP, T5),
    "PixArt": (PIXART[SIGMA], (PixArtTransformer2DModel, SIGMAS), T5),
    "FLUX.2": (flux2.FLUX_2, (Flux2Transformer2DModel, FLUX_2)),
    "Z-Image": (z_image.Z_IMAGE, (ZImageTransformer2DModel, Z_IMAGE)),
    "Qwen-Image": (qwen_image.QWEN_IMAGE, (QwenImageTransformer2DModel, QWEN)),
    "Sana": (sana.SANA, (SanaTransformer2DModel, SANA)),
}
NETWORKS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
WITH_ORIGINAL_NAMES = ("FLUX.1", "FLUX.2", "Stable Diffusion 3.5", "Z-Image")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a function that makes the checkpoint of a model in `MODELS`, with random weights."""

    @cache
    def make(name: str) -> Checkpoint:
        family, *networks = MODELS[name]
        folder, tensors = tmp_path_factory.mktemp("model"), {}
        random = np.random.default_rng(0)
        for network, (kind, config) in zip(NETWORKS, networks, strict=False):
            component, file = family.components[network], folder / f"{network}.safetensors"
            shapes = file_shapes(abstract_network(kind, config)[1])
            saved(
                {
                    f"{component.prefix}{key}": random.standard_normal(shape, np.float32)
                    for key, shape in shapes.items()
                },
                file,
            )
            tensors[network] = read_weights(component, file)
        configs = {"transformer": asdict(networks[0][1])}
        return Checkpoint(folder, "small", family, {}, configs, tensors, {}, {})

    return make


def layers(checkpoint: Checkpoint, network: str = "transformer") -> list[str]:
    """Returns the layers that a LoRA can adapt, but for convolutions."""
    return [
        key.removesuffix(".weight")
        for key, tensor in checkpoint.weights(network).items()
        if key.endswith(".weight") and len(tensor.shape) == 2
    ]


def drawn(shape: tuple[int, int], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns down [rank, in] and up [out, rank] for a weight [out, in], seeded by a name."""
    random, (rows, columns) = np.random.default_rng([*name.encode()]), shape
    halves = random.standard_normal((RANK, columns)), random.standard_normal((rows, RANK))
    return tuple(half.astype(np.float32) for half in halves)


def peft(name: str, halves, prefix: str) -> dict[str, np.ndarray]:
    down, up = halves
    return {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}


def kohya(name: str, halves, prefix: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a layer; the alpha makes the scale 1."""
    down, up = halves
    name = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    return {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": np.array(RANK, np.float32),
    }


def saved(tensors: dict, file: Path, **metadata: str) -> str:
    save_file({key: np.ascontiguousarray(t) for key, t in tensors.items()}, file, metadata or None)
    return str(file)


def assert_merged(checkpoint: Checkpoint, adapted: Checkpoint, updates: dict) -> None:
    """Asserts that exactly these updates, by (network, layer), were added to the weights."""
    changed = {
        (network, key.removesuffix(".weight"))
        for network in adapted.networks
        for key, tensor in adapted.weights(network).items()
        if tensor.updates
    }
    assert changed == updates.keys()
    for (network, layer), update in updates.items():
        base, merged = (each.weights(network)[f"{layer}.weight"] for each in (checkpoint, adapted))
        np.testing.assert_allclose(merged.read(), base.read() + update, atol=1e-5, err_msg=layer)


@pytest.mark.parametrize(
    ("write", "prefix"),
    [
        (peft, "transformer."),
        (peft, "diffusion_model."),
        (peft, ""),
        (kohya, "transformer."),
        (kohya, "lora_unet_"),
        (kohya, "lora_transformer_"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_every_layer_by_diffusers_names(checkpoint, tmp_path, model, write, prefix):
    plain, tensors, updates = checkpoint(model), {}, {}
    for layer in layers(plain):
        down, up = drawn(plain.weights("transformer")[f"{layer}.weight"].shape, layer)
        tensors |= write(layer, (down, up), prefix)
        updates["transformer", layer] = 0.5 * up @ down
    file = saved(tensors, tmp_path / "style.safetensors")
    assert_merged(plain, lora.adapted(plain, [f"{file}:0.5"]), updates)


def original_lora(plain: Checkpoint, write, prefix: str, names) -> tuple[dict, dict]:
    """Returns a LoRA's tensors for layers with original names, and the updates by definition."""
    tensors, updates, weights = {}, {}, plain.weights("transformer")
    for name, layer in names.items():
        sizes = [weights[key].shape[0] for key in layer.keys]
        down, up = drawn((sum(sizes), weights[layer.keys[0]].shape[1]), name)
        tensors |= write(name, (down, up), prefix)
        if layer.halves_swapped:
            up = np.concatenate(np.split(up, 2)[::-1])
        for key, rows in zip(layer.keys, np.split(up, np.cumsum(sizes)[:-1]), strict=True):
            updates["transformer", key.removesuffix(".weight")] = rows @ down
    return tensors, updates


@pytest.mark.parametrize(
    ("write", "prefix"),
    [(kohya, "lora_unet_"), (peft, "diffusion_model."), (peft, ""), (kohya, "")],
)
@pytest.mark.parametrize("model", WITH_ORIGINAL_NAMES)
def test_every_layer_by_its_original_name(checkpoint, tmp_path, model, write, prefix):
    """Which layers these are is tested against diffusers: `test_transformer_lora_images`."""
    plain = checkpoint(model)
    names = {
        name: layer
        for name, layer in original_transformers.lora_layers(plain).items()
        if layer.keys != ("pos_embed.proj.weight",)  # a convolution
    }
    tensors, updates = original_lora(plain, write, prefix, names)
    file = saved(tensors, tmp_path / "style.safetensors")
    assert_merged(plain, lora.adapted(plain, [file]), updates)
    assert len(updates) == len(layers(plain))


def test_xlabs_names(checkpoint, tmp_path):
    plain = checkpoint("FLUX.1")
    double, single = "transformer_blocks.1", "single_transformer_blocks.2"
    named = {
        "double_blocks.1.processor.qkv_lora1": [f"{double}.attn.to_{x}" for x in "qkv"],
        "double_blocks.1.processor.qkv_lora2": [f"{double}.attn.add_{x}_proj" for x in "qkv"],
        "double_blocks.1.processor.proj_lora1": [f"{double}.attn.to_out.0"],
        "double_blocks.1.processor.proj_lora2": [f"{double}.attn.to_add_out"],
        "single_blocks.2.processor.qkv_lora": [f"{single}.attn.to_{x}" for x in "qkv"],
        "single_blocks.2.processor.proj_lora": [f"{single}.proj_out"],
    }
    tensors, updates = {}, {}
    for name, ours in named.items():
        rows, columns = plain.weights("transformer")[f"{ours[0]}.weight"].shape
        down, up = drawn((rows * len(ours), columns), name)
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        for layer, part in zip(ours, np.split(up, len(ours)), strict=True):
            updates["transformer", layer] = part @ down
    file = saved(tensors, tmp_path / "xlabs.safetensors")
    assert_merged(plain, lora.adapted(plain, [file]), updates)


@pytest.mark.parametrize(
    ("model", "network", "write", "prefix"),
    [
        ("FLUX.1", "text_encoder", peft, "text_encoder.text_model."),
        ("FLUX.1", "text_encoder", kohya, "lora_te1_text_model_"),
        ("FLUX.1", "text_encoder", kohya, "text_encoders.clip_l.transformer.text_model."),
        ("FLUX.1", "text_encoder_2", peft, "text_encoder_2."),
        ("FLUX.1", "text_encoder_2", kohya, "lora_te2_"),
        ("FLUX.1", "text_encoder_2", kohya, "lora_te3_"),
        ("FLUX.1", "text_encoder_2", kohya, "text_encoders.t5xxl.transformer."),
        ("Stable Diffusion 3.5", "text_encoder_2", peft, "text_encoder_2.text_model."),
        ("Stable Diffusion 3.5", "text_encoder_2", kohya, "lora_te2_text_model_"),
        ("Stable Diffusion 3.5", "text_encoder_3", peft, "text_encoder_3."),
        ("Stable Diffusion 3.5", "text_encoder_3", kohya, "lora_te3_"),
        ("PixArt", "text_encoder", peft, "text_encoder."),
    ],
)
def test_text_encoders(checkpoint, tmp_path, model, network, write, prefix):
    plain, tensors, updates = checkpoint(model), {}, {}
    for layer in layers(plain, network):
        if any(part in layer for part in ("SelfAttention.", "self_attn.", "fc1", "wi_0")):
            down, up = drawn(plain.weights(network)[f"{layer}.weight"].shape, layer)
            tensors |= write(layer, (down, up), prefix)
            updates[network, layer] = up @ down
    assert len(updates) > 8
    file = saved(tensors, tmp_path / "text.safetensors")
    assert_merged(plain, lora.adapted(plain, [file]), updates)


def test_alphas_in_the_metadata_and_of_fused_layers(checkpoint, tmp_path):
    plain, ours = checkpoint("FLUX.1"), [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    config = {"transformer.r": 4, "transformer.lora_alpha": 8}
    config["transformer.alpha_pattern"] = {r"transformer_blocks\.0\.attn\.to_k": 6}
    tensors, updates = {}, {}
    for layer, alpha in zip(ours, (8, 6, 8), strict=True):
        down, up = drawn(plain.weights("transformer")[f"{layer}.weight"].shape, layer)
        tensors |= peft(layer, (down, up), "transformer.")
        updates["transformer", layer] = alpha / RANK * up @ down
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    file = saved(tensors, tmp_path / "peft.safetensors", **metadata)
    assert_merged(plain, lora.adapted(plain, [file]), updates)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = drawn((72, 24), name)
    tensors = kohya(name, (down, up), "") | {f"{name}.alpha": np.array(5, np.float32)}
    file = saved(tensors, tmp_path / "kohya.safetensors")
    updates = {
        ("transformer", layer): 5 / RANK * rows @ down
        for layer, rows in zip(ours, np.split(up, 3), strict=True)
    }
    assert_merged(plain, lora.adapted(plain, [file]), updates)


def test_several_loras_with_weights_are_added_up(checkpoint, tmp_path):
    plain, layer = checkpoint("FLUX.1"), "single_transformer_blocks.1.attn.to_k"
    down, up = drawn((24, 24), layer)
    one = saved(peft(layer, (down, up), "transformer."), tmp_path / "one.safetensors")
    wide, tall = drawn((4 * 24 + 3 * 24, 24), "linear1")
    fused = kohya("single_blocks.1.linear1", (wide, tall), "lora_unet_")
    two = saved(fused, tmp_path / "two.safetensors")
    adapted = lora.adapted(plain, [f"{one}:0.8", f"{two}:-0.5"])
    assert adapted.name == "small + one:0.8 + two:-0.5"
    block, rows = "single_transformer_blocks.1", -0.5 * tall @ wide
    updates = {("transformer", f"{block}.proj_mlp"): rows[72:]}
    updates |= {("transformer", f"{block}.attn.to_q"): rows[:24]}
    updates |= {("transformer", layer): 0.8 * up @ down + rows[24:48]}
    updates |= {("transformer", f"{block}.attn.to_v"): rows[48:72]}
    assert_merged(plain, adapted, updates)


def test_a_convolution_is_adapted(checkpoint, tmp_path):
    plain, random = checkpoint("Stable Diffusion 3.5"), np.random.default_rng(0)
    down, up = random.standard_normal((RANK, 16, 2, 2)), random.standard_normal((16, RANK, 1, 1))
    halves = down.astype(np.float32), up.astype(np.float32)
    update = np.einsum("or,rihw->oihw", halves[1][:, :, 0, 0], halves[0])
    for name, prefix in {"pos_embed.proj": "transformer.", "x_embedder.proj": ""}.items():
        file = saved(peft(name, halves, prefix), tmp_path / "conv.safetensors")
        adapted = lora.adapted(plain, [file])
        assert_merged(plain, adapted, {("transformer", "pos_embed.proj"): update})


QKV = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{QKV}.lora_up.weight": (60, 2)}, r"make \[60, 24\], but \[72, 24\] is needed"),
        ({f"{QKV}.lora_up.weight": (72, 3)}, r"\[2, 24\] and .* \[72, 3\] differ in rank"),
        ({f"{QKV}.lora_up.weight": (72,)}, "differ in rank"),
        ({f"{QKV}.lora_down.weight": ()}, "differ in rank"),
        ({f"{QKV}.lora_mid.weight": (2, 2)}, "is not for a convolution"),
        ({f"{QKV}.lora_down.weight": (2, 8)}, r"make \[72, 8\], but \[72, 24\] is needed"),
        (
            {"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": (2, 24)},
            r"to_k\.lora_A\.weight and lora_unet_double_blocks_0_img_attn_qkv.* for one layer",
        ),
        (
            {"double_blocks.0.processor.qkv_lora1.up.weight": (72, 2)},
            r"lora_up\.weight and double_blocks\.0\.processor\.qkv_lora1\..* are for one layer",
        ),
        (
            {"lora_unet_double_blocks_7_img_attn_qkv.lora_up.weight": (72, 2)},
            r"1 of its 3 keys fit no layer \(the first is lora_unet_double_blocks_7_img_attn_qkv",
        ),
        ({"lora_te2_text_model_encoder.alpha": ()}, "1 of its 3 keys fit no layer"),
        ({"vae.encoder.conv_in.lora_A.weight": (2, 2)}, "1 of its 3 keys fit no layer"),
        ({f"{QKV}.dora_scale": (72, 1)}, "is a DoRA"),
        ({"lycoris_x.lokr_w1": (2, 2)}, "is a LoKr"),
        ({f"{QKV}.hada_w1_a": (2, 2)}, "is a LoHa"),
        ({"double_blocks.0.img_attn.proj.lora_B.bias": (24,)}, "is a LoRA with biases"),
    ],
)
def test_files_that_do_not_fit_give_a_one_line_error(checkpoint, tmp_path, tensors, message):
    shapes = {f"{QKV}.lora_down.weight": (2, 24), f"{QKV}.lora_up.weight": (72, 2)} | tensors
    drawn_ones = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    file = saved(drawn_ones, tmp_path / "heart.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        lora.adapted(checkpoint("FLUX.1"), [file])
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_original_names_need_a_config_that_describes_the_transformer(checkpoint, tmp_path):
    plain = checkpoint("FLUX.1")
    file = saved(kohya(QKV, drawn((72, 24), "qkv"), ""), tmp_path / "flux.safetensors")
    config = plain.config("transformer")
    endless = replace(plain, configs={"transformer": config | {"num_layers": 10**9}})
    assert lora.adapted(endless, [file]).name == "small + flux:1"  # without 10**9 names
    wrong = replace(plain, configs={"transformer": config | {"num_layers": "two"}})
    with pytest.raises(InputError, match="does not describe a transformer; copy the checkpoint"):
        lora.adapted(wrong, [file])


def test_a_lora_for_another_family_does_not_fit(checkpoint, tiny_checkpoint, tmp_path):
    from jaxdiff.families import open_checkpoint

    plain = checkpoint("FLUX.1")
    halves = drawn((72, 24), "qkv")
    file = saved(kohya(QKV, halves, ""), tmp_path / "flux.safetensors")
    for other in (checkpoint("Z-Image"), open_checkpoint(tiny_checkpoint)):
        with pytest.raises(InputError, match="3 of its 3 keys fit no layer"):
            lora.adapted(other, [file])
    file = saved(peft("layers.0.attention.to_q", halves, ""), tmp_path / "z.safetensors")
    with pytest.raises(InputError, match="2 of its 2 keys fit no layer"):
        lora.adapted(plain, [file])
