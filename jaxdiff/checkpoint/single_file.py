"""Single-file checkpoints: a whole pipeline in the naming of its original code. Imports no JAX.

The names of Stable Diffusion 1 come from CompVis's latent-diffusion, those of XL from Stability
AI's generative-models. A file states neither its family nor its configs: the family is recognised
by its keys and shapes, and the configs are the family's on the Hub, which diffusers'
`from_single_file` uses, too.

Only the names differ, and the layout of a few weights. The functions `*_names` pair every key that
a network has in diffusers or transformers with its key in the file, so missing and unknown keys are
always found.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jaxdiff.checkpoint.prediction import prediction_type
from jaxdiff.checkpoint.safetensors_header import read_header, read_metadata
from jaxdiff.checkpoint.single_file_configs import CONTENTS, UNET, Contents
from jaxdiff.checkpoint.tensors import FLOATS, StoredTensor, describe_misfits
from jaxdiff.errors import InputError

# The key in diffusers or transformers, the key in the file, and the function that converts the
# file's tensor (None: no conversion). Neither key has the network's prefix.
Names = Iterator[tuple[str, str, Callable[[StoredTensor], StoredTensor] | None]]

PARAMETERS = ("weight", "bias")
TRANSFORMER_BLOCK = (
    *("norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("norm2", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("norm3", "ff.net.0.proj", "ff.net.2"),
)
CLIP_LAYER = (
    *("layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"),
)
# Keys that are not weights of the networks.
IGNORED = re.compile(
    r"""model_ema\. .*                         # a running mean of the U-Net; diffusers ignores it
    | (\w+_)?alphas_cumprod(_prev)? | betas    # the noise schedule: the scheduler computes it
    | posterior_\w+ | lvlb_weights | logvar | scale_factor | denoiser\. .*
    | first_stage_model\.(loss|model_ema)\. .* # the autoencoder's discriminator
    | .* \.position_ids                        # 0, 1, 2, ...
    | .* \.logit_scale                         # the temperature of CLIP's training
    | (cond_stage_model | conditioner\.embedders\.0)
      (\.transformer)?\.text_projection(\.weight)?  # CLIP-L's projection to its image space
    | v_pred | ztsnr                           # flags: `_scheduler` reads them
    | global_step | epoch""",
    re.VERBOSE,
)
# Other kinds of single safetensors files, by the start of one of their keys.
FOREIGN = {
    r"(model\.diffusion_model\.)?joint_blocks\.": "a Stable Diffusion 3 checkpoint",
    r"(model\.diffusion_model\.)?double_blocks\.": "a FLUX checkpoint",
    r"(model\.diffusion_model\.)?double_stream_modulation": "a FLUX.2 checkpoint",
    r"(control_model|controlnet_cond_embedding)\.": "a ControlNet",
    r"lora_|.*\.lora_": "a LoRA, which --lora adds to a model",
    r"edm_mean|edm_vpred\.": "a checkpoint with EDM's noise levels (Playground 2.5, CosXL)",
    r"(down_blocks|text_model|encoder|decoder)\.": "a single network",
}
# The place where early files of Stable Diffusion 1 lack "text_model.".
BARE_CLIP = re.compile(
    r"(?<=^cond_stage_model\.transformer\.)(?=embeddings|encoder|final_layer_norm)"
)
INPUTS = {5: "depth maps", 7: "upscaling", 8: "image editing", 9: "inpainting"}  # by channels


@dataclass(frozen=True)
class SingleFile:
    """The contents of an equivalent diffusers directory, as `read` returns them.

    Attributes:
      index: the contents of `model_index.json`.
      configs: each network's config, and the scheduler's.
      weights: for each network, the location of each weight by its key in diffusers or
        transformers (without "text_model.").
      tokenizers: for each text encoder, the Hub repository and folder of its tokenizer.
    """

    index: dict
    configs: dict[str, dict]
    weights: dict[str, dict[str, StoredTensor]]
    tokenizers: dict[str, tuple[str, str]]


def read(path: Path) -> SingleFile:
    """Reads the contents of a single-file checkpoint from its header alone.

    Raises:
      InputError: if it is not a whole safetensors file, is not Stable Diffusion 1 or XL, or its
        keys are not exactly those of its family.
    """
    tensors = read_header(path)
    contents = _recognise(path, tensors)
    scheduler = _scheduler(path, contents.configs["scheduler"], tensors)
    configs = contents.configs | {"scheduler": scheduler}
    found = weights(path, tensors, contents)
    return SingleFile(contents.index, configs, found, contents.tokenizers)


def _recognise(path: Path, tensors: Mapping[str, StoredTensor]) -> Contents:
    for pattern, what in FOREIGN.items():
        if any(re.match(pattern, key) for key in tensors):
            raise InputError(
                f"{path} is {what}; use a single file of a whole Stable Diffusion 1 or XL model, "
                "or a diffusers directory"
            )
    widths = {
        tensor.shape[-1]
        for key, tensor in tensors.items()
        if key.startswith(UNET) and key.endswith(".attn2.to_k.weight") and tensor.shape
    }
    width = widths.pop() if len(widths) == 1 else None
    first = tensors.get(f"{UNET}input_blocks.0.0.weight")
    channels = first.shape[1] if first and len(first.shape) == 4 else 4
    if channels != 4:
        raise InputError(
            f"{path} is for {INPUTS.get(channels, 'something else')} (its U-Net takes {channels} "
            "channels, not 4); use a model that makes images from text alone"
        )
    if width == 1024:
        raise InputError(
            f"{path} is Stable Diffusion 2, which can only be read from a directory: make one with "
            "diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(...)"
        )
    if width not in CONTENTS:
        raise InputError(
            f"{path} is not a Stable Diffusion model in the original naming; use a single file of "
            "Stable Diffusion 1 or XL, or a diffusers directory"
        )
    return CONTENTS[width]


def _scheduler(path: Path, config: dict, tensors: Mapping[str, StoredTensor]) -> dict:
    """Updates the scheduler's config with what the model was trained for."""
    predicted = prediction_type(path, tensors, read_metadata(path))
    if predicted != "epsilon":
        config = config | {"prediction_type": predicted}
    if "ztsnr" in tensors:
        config = config | {"rescale_betas_zero_snr": True}
    return config


def weights(
    path: Path, tensors: Mapping[str, StoredTensor], contents: Contents
) -> dict[str, dict[str, StoredTensor]]:
    """Returns the weights of each network; raises InputError unless the file has exactly these."""
    stored = {BARE_CLIP.sub("text_model.", key): tensor for key, tensor in tensors.items()}
    if len(stored) < len(tensors):
        raise InputError(f"{path} contains its text encoder twice; copy it again")
    used, missing, found = set(), [], {}
    for network, prefix in contents.prefixes.items():
        if not any(key.startswith(prefix) for key in stored):
            raise InputError(
                f"{path} has no {network} (no key begins with {prefix}); use a file with the whole "
                "model, or a diffusers directory"
            )
        found[network] = {}
        for ours, theirs, cut in names(contents.configs[network]):
            key = prefix + theirs
            used.add(key)
            if key in stored:
                found[network][ours] = _cut(stored[key], cut)
            else:
                missing.append(key)
    unknown = [key for key in stored if key not in used and not IGNORED.fullmatch(key)]
    if misfits := describe_misfits({"missing": set(missing), "unknown": unknown}):
        raise InputError(f"{path} does not match {contents.name}: of its weights, {misfits}")
    return found


def _cut(tensor: StoredTensor, cut: Callable[[StoredTensor], StoredTensor] | None) -> StoredTensor:
    if tensor.dtype not in FLOATS:
        raise InputError(
            f"{tensor.file}: {tensor.key} is stored as {tensor.dtype}; use a file whose weights "
            f"are stored as one of {', '.join(FLOATS)}"
        )
    try:
        return cut(tensor) if cut else tensor
    except (IndexError, ValueError) as error:
        raise InputError(
            f"{tensor.file}: {tensor.key} has the wrong shape {list(tensor.shape)}; copy it again"
        ) from error


def names(config: dict) -> Names:
    """Yields the names of the weights of the network with this config."""
    if config.get("_class_name") == "UNet2DConditionModel":
        return unet_names(config)
    if config.get("_class_name") == "AutoencoderKL":
        return vae_names(config)
    if config["architectures"] == ["CLIPTextModelWithProjection"]:
        return openclip_names(config)
    return clip_names(config)


def unet_names(config: dict) -> Names:
    """Yields the U-Net's names; its modules are numbered consecutively on the way down and up."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    depths = config.get("transformer_layers_per_block", 1)
    depths = depths if isinstance(depths, list) else [depths] * len(widths)
    last = len(widths) - 1
    yield from _module("conv_in", "input_blocks.0.0")
    yield from _module("time_embedding.linear_1", "time_embed.0")
    yield from _module("time_embedding.linear_2", "time_embed.2")
    if config.get("addition_embed_type"):
        yield from _module("add_embedding.linear_1", "label_emb.0.0")
        yield from _module("add_embedding.linear_2", "label_emb.0.2")
    for i, kind in enumerate(config["down_block_types"]):
        ours = f"down_blocks.{i}"
        for j in range(layers):
            theirs = f"input_blocks.{1 + i * (layers + 1) + j}"
            widens = j == 0 and widths[i] != widths[max(i - 1, 0)]
            yield from _unet_resnet(f"{ours}.resnets.{j}", f"{theirs}.0", shortcut=widens)
            if kind.startswith("CrossAttn"):
                yield from _transformer(f"{ours}.attentions.{j}", f"{theirs}.1", depths[i])
        if i < last:
            yield from _module(
                f"{ours}.downsamplers.0.conv", f"input_blocks.{(i + 1) * (layers + 1)}.0.op"
            )
    yield from _unet_resnet("mid_block.resnets.0", "middle_block.0", shortcut=False)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", depths[-1])
    yield from _unet_resnet("mid_block.resnets.1", "middle_block.2", shortcut=False)
    for i, kind in enumerate(config["up_block_types"]):
        ours, attends = f"up_blocks.{i}", kind.startswith("CrossAttn")
        for j in range(layers + 1):
            theirs = f"output_blocks.{i * (layers + 1) + j}"
            yield from _unet_resnet(f"{ours}.resnets.{j}", f"{theirs}.0", shortcut=True)
            if attends:
                yield from _transformer(f"{ours}.attentions.{j}", f"{theirs}.1", depths[last - i])
        if i < last:
            yield from _module(f"{ours}.upsamplers.0.conv", f"{theirs}.{1 + attends}.conv")
    yield from _module("conv_norm_out", "out.0")
    yield from _module("conv_out", "out.2")


def _unet_resnet(ours: str, theirs: str, shortcut: bool) -> Names:
    yield from _module(f"{ours}.norm1", f"{theirs}.in_layers.0")
    yield from _module(f"{ours}.conv1", f"{theirs}.in_layers.2")
    yield from _module(f"{ours}.time_emb_proj", f"{theirs}.emb_layers.1")
    yield from _module(f"{ours}.norm2", f"{theirs}.out_layers.0")
    yield from _module(f"{ours}.conv2", f"{theirs}.out_layers.3")
    if shortcut:
        yield from _module(f"{ours}.conv_shortcut", f"{theirs}.skip_connection")


def _transformer(ours: str, theirs: str, depth: int) -> Names:
    """Yields a transformer's names, which diffusers kept from the original."""
    for part in ("norm", "proj_in", "proj_out"):
        yield from _module(f"{ours}.{part}", f"{theirs}.{part}")
    for k in range(depth):
        for part in TRANSFORMER_BLOCK:
            block = f"transformer_blocks.{k}.{part}"
            parameters = ("weight",) if part.endswith(("to_q", "to_k", "to_v")) else PARAMETERS
            yield from _module(f"{ours}.{block}", f"{theirs}.{block}", parameters)


def vae_names(config: dict) -> Names:
    """Yields the autoencoder's names.

    The decoder's blocks are numbered from shallow to deep, the reverse of the order of their use.
    """
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    last = len(widths) - 1
    for i, width in enumerate(widths):
        ours, theirs = f"encoder.down_blocks.{i}", f"encoder.down.{i}"
        for j in range(layers):
            widens = j == 0 and width != widths[max(i - 1, 0)]
            yield from _vae_resnet(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", shortcut=widens)
        if i < last:
            yield from _module(f"{ours}.downsamplers.0.conv", f"{theirs}.downsample.conv")
        ours, theirs = f"decoder.up_blocks.{last - i}", f"decoder.up.{i}"
        for j in range(layers + 1):
            narrows = j == 0 and width != widths[min(i + 1, last)]
            yield from _vae_resnet(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", shortcut=narrows)
        if i > 0:
            yield from _module(f"{ours}.upsamplers.0.conv", f"{theirs}.upsample.conv")
    for half in ("encoder", "decoder"):
        yield from _module(f"{half}.conv_in", f"{half}.conv_in")
        for j in (0, 1):
            ours, theirs = f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}"
            yield from _vae_resnet(ours, theirs, shortcut=False)
        yield from _vae_attention(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
        yield from _module(f"{half}.conv_norm_out", f"{half}.norm_out")
        yield from _module(f"{half}.conv_out", f"{half}.conv_out")
    yield from _module("quant_conv", "quant_conv")
    yield from _module("post_quant_conv", "post_quant_conv")


def _vae_resnet(ours: str, theirs: str, shortcut: bool) -> Names:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield from _module(f"{ours}.{part}", f"{theirs}.{part}")
    if shortcut:
        yield from _module(f"{ours}.conv_shortcut", f"{theirs}.nin_shortcut")


def _vae_attention(ours: str, theirs: str) -> Names:
    yield from _module(f"{ours}.group_norm", f"{theirs}.norm")
    for part, original in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        yield f"{ours}.{part}.weight", f"{theirs}.{original}.weight", _linear
        yield f"{ours}.{part}.bias", f"{theirs}.{original}.bias", None


def clip_names(config: dict) -> Names:
    """Yields the names of CLIP's text encoder, which are transformers' own."""
    for part in ("token_embedding", "position_embedding"):
        yield f"embeddings.{part}.weight", f"text_model.embeddings.{part}.weight", None
    for i in range(config["num_hidden_layers"]):
        for part in CLIP_LAYER:
            module = f"encoder.layers.{i}.{part}"
            yield from _module(module, f"text_model.{module}")
    yield from _module("final_layer_norm", "text_model.final_layer_norm")


def openclip_names(config: dict) -> Names:
    """Yields the names of OpenCLIP's text encoder.

    Queries, keys and values are one matrix, and the last projection multiplies from the right.
    """
    yield "embeddings.token_embedding.weight", "token_embedding.weight", None
    yield "embeddings.position_embedding.weight", "positional_embedding", None
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for parameter in PARAMETERS:
            for third, part in enumerate(("q_proj", "k_proj", "v_proj")):
                key = f"{ours}.self_attn.{part}.{parameter}"
                yield key, f"{theirs}.attn.in_proj_{parameter}", partial(_third, third)
        yield from _module(f"{ours}.self_attn.out_proj", f"{theirs}.attn.out_proj")
        yield from _module(f"{ours}.layer_norm1", f"{theirs}.ln_1")
        yield from _module(f"{ours}.layer_norm2", f"{theirs}.ln_2")
        yield from _module(f"{ours}.mlp.fc1", f"{theirs}.mlp.c_fc")
        yield from _module(f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj")
    yield from _module("final_layer_norm", "ln_final")
    yield "text_projection.weight", "text_projection", StoredTensor.transpose


def _module(ours: str, theirs: str, parameters: tuple[str, ...] = PARAMETERS) -> Names:
    for parameter in parameters:
        yield f"{ours}.{parameter}", f"{theirs}.{parameter}", None


def _linear(tensor: StoredTensor) -> StoredTensor:
    """Converts a 1x1 convolution to the equivalent matrix."""
    return tensor.reshape(*tensor.shape[:2])


def _third(third: int, tensor: StoredTensor) -> StoredTensor:
    rows, rest = divmod(tensor.shape[0], 3)
    if rest:
        raise ValueError(f"{tensor.shape[0]} rows cannot be split into queries, keys and values")
    return tensor.rows(third * rows, (third + 1) * rows)
