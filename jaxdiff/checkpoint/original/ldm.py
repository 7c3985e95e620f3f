"""The names of Stable Diffusion 1 and XL in their original code. Imports no JAX.

Those of Stable Diffusion 1 come from CompVis's latent-diffusion, those of XL from Stability AI's
generative-models. Later models kept the autoencoder's; Stable Diffusion 3 also the CLIPs' names.
"""

from jaxdiff.checkpoint.original.naming import PARAMETERS, WEIGHT, Names, module, thirds
from jaxdiff.checkpoint.tensors import StoredTensor

TRANSFORMER_BLOCK = (
    *("norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("norm2", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("norm3", "ff.net.0.proj", "ff.net.2"),
)
CLIP_LAYER = (
    *("layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"),
)


def names(config: dict) -> Names:
    """Yields the names of the network with this config."""
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
    yield from module("conv_in", "input_blocks.0.0")
    yield from module("time_embedding.linear_1", "time_embed.0")
    yield from module("time_embedding.linear_2", "time_embed.2")
    if config.get("addition_embed_type"):
        yield from module("add_embedding.linear_1", "label_emb.0.0")
        yield from module("add_embedding.linear_2", "label_emb.0.2")
    for i, kind in enumerate(config["down_block_types"]):
        ours = f"down_blocks.{i}"
        for j in range(layers):
            theirs = f"input_blocks.{1 + i * (layers + 1) + j}"
            widens = j == 0 and widths[i] != widths[max(i - 1, 0)]
            yield from _unet_resnet(f"{ours}.resnets.{j}", f"{theirs}.0", shortcut=widens)
            if kind.startswith("CrossAttn"):
                yield from _transformer(f"{ours}.attentions.{j}", f"{theirs}.1", depths[i])
        if i < last:
            yield from module(
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
            yield from module(f"{ours}.upsamplers.0.conv", f"{theirs}.{1 + attends}.conv")
    yield from module("conv_norm_out", "out.0")
    yield from module("conv_out", "out.2")


def _unet_resnet(ours: str, theirs: str, shortcut: bool) -> Names:
    yield from module(f"{ours}.norm1", f"{theirs}.in_layers.0")
    yield from module(f"{ours}.conv1", f"{theirs}.in_layers.2")
    yield from module(f"{ours}.time_emb_proj", f"{theirs}.emb_layers.1")
    yield from module(f"{ours}.norm2", f"{theirs}.out_layers.0")
    yield from module(f"{ours}.conv2", f"{theirs}.out_layers.3")
    if shortcut:
        yield from module(f"{ours}.conv_shortcut", f"{theirs}.skip_connection")


def _transformer(ours: str, theirs: str, depth: int) -> Names:
    """Yields a transformer's names, which diffusers kept from the original."""
    for part in ("norm", "proj_in", "proj_out"):
        yield from module(f"{ours}.{part}", f"{theirs}.{part}")
    for k in range(depth):
        for part in TRANSFORMER_BLOCK:
            block = f"transformer_blocks.{k}.{part}"
            parameters = WEIGHT if part.endswith(("to_q", "to_k", "to_v")) else PARAMETERS
            yield from module(f"{ours}.{block}", f"{theirs}.{block}", parameters)


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
            yield from module(f"{ours}.downsamplers.0.conv", f"{theirs}.downsample.conv")
        ours, theirs = f"decoder.up_blocks.{last - i}", f"decoder.up.{i}"
        for j in range(layers + 1):
            narrows = j == 0 and width != widths[min(i + 1, last)]
            yield from _vae_resnet(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", shortcut=narrows)
        if i > 0:
            yield from module(f"{ours}.upsamplers.0.conv", f"{theirs}.upsample.conv")
    for half in ("encoder", "decoder"):
        yield from module(f"{half}.conv_in", f"{half}.conv_in")
        for j in (0, 1):
            ours, theirs = f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}"
            yield from _vae_resnet(ours, theirs, shortcut=False)
        yield from _vae_attention(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
        yield from module(f"{half}.conv_norm_out", f"{half}.norm_out")
        yield from module(f"{half}.conv_out", f"{half}.conv_out")
    for part in ("quant_conv", "post_quant_conv"):
        if config.get(f"use_{part}", True):
            yield from module(part, part)


def _vae_resnet(ours: str, theirs: str, shortcut: bool) -> Names:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield from module(f"{ours}.{part}", f"{theirs}.{part}")
    if shortcut:
        yield from module(f"{ours}.conv_shortcut", f"{theirs}.nin_shortcut")


def _vae_attention(ours: str, theirs: str) -> Names:
    yield from module(f"{ours}.group_norm", f"{theirs}.norm")
    for part, original in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        yield f"{ours}.{part}.weight", f"{theirs}.{original}.weight", _linear
        yield f"{ours}.{part}.bias", f"{theirs}.{original}.bias", None


def clip_names(config: dict) -> Names:
    """Yields the names of CLIP's text encoder, which are transformers' own."""
    for part in ("token_embedding", "position_embedding"):
        yield f"embeddings.{part}.weight", f"text_model.embeddings.{part}.weight", None
    for i in range(config["num_hidden_layers"]):
        for part in CLIP_LAYER:
            layer = f"encoder.layers.{i}.{part}"
            yield from module(layer, f"text_model.{layer}")
    yield from module("final_layer_norm", "text_model.final_layer_norm")


def openclip_names(config: dict) -> Names:
    """Yields the names of OpenCLIP's text encoder.

    Queries, keys and values are one matrix, and the last projection multiplies from the right.
    """
    yield "embeddings.token_embedding.weight", "token_embedding.weight", None
    yield "embeddings.position_embedding.weight", "positional_embedding", None
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for parameter in PARAMETERS:
            yield from thirds(
                f"{ours}.self_attn.*_proj.{parameter}", f"{theirs}.attn.in_proj_{parameter}"
            )
        yield from module(f"{ours}.self_attn.out_proj", f"{theirs}.attn.out_proj")
        yield from module(f"{ours}.layer_norm1", f"{theirs}.ln_1")
        yield from module(f"{ours}.layer_norm2", f"{theirs}.ln_2")
        yield from module(f"{ours}.mlp.fc1", f"{theirs}.mlp.c_fc")
        yield from module(f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj")
    yield from module("final_layer_norm", "ln_final")
    yield "text_projection.weight", "text_projection", StoredTensor.transpose


def _linear(tensor: StoredTensor) -> StoredTensor:
    """Converts a 1x1 convolution to the equivalent matrix."""
    return tensor.reshape(*tensor.shape[:2])
