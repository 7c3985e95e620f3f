"""Transformers in the naming of their original code, from diffusers' naming."""

import re
from collections.abc import Callable, Mapping

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.lora_names import Layer

XLABS = re.compile(r".*_lora[12]|single_blocks\.\d+\.(qkv|proj)")  # their names of layers
PARTS = ["q", "k", "v", "proj_mlp"]  # in the order of the original's fused layers
P = r"(?P<p>weight|bias)"
I = r"(?P<i>\d+)"  # noqa: E741

# A pattern for diffusers' keys, and the original key. A pattern with `part` is for a part of a
# fused layer; "~" marks layers whose halves have the other order.
FLUX_BLOCKS = {
    rf"transformer_blocks\.{I}\.attn\.to_(?P<part>[qkv])\.{P}": (
        "double_blocks.{i}.img_attn.qkv.{p}"
    ),
    rf"transformer_blocks\.{I}\.attn\.add_(?P<part>[qkv])_proj\.{P}": (
        "double_blocks.{i}.txt_attn.qkv.{p}"
    ),
    rf"transformer_blocks\.{I}\.attn\.to_out\.0\.{P}": "double_blocks.{i}.img_attn.proj.{p}",
    rf"transformer_blocks\.{I}\.attn\.to_add_out\.{P}": "double_blocks.{i}.txt_attn.proj.{p}",
    rf"transformer_blocks\.{I}\.attn\.norm_q\.weight": (
        "double_blocks.{i}.img_attn.norm.query_norm.scale"
    ),
    rf"transformer_blocks\.{I}\.attn\.norm_k\.weight": (
        "double_blocks.{i}.img_attn.norm.key_norm.scale"
    ),
    rf"transformer_blocks\.{I}\.attn\.norm_added_q\.weight": (
        "double_blocks.{i}.txt_attn.norm.query_norm.scale"
    ),
    rf"transformer_blocks\.{I}\.attn\.norm_added_k\.weight": (
        "double_blocks.{i}.txt_attn.norm.key_norm.scale"
    ),
    rf"single_transformer_blocks\.{I}\.attn\.norm_q\.weight": (
        "single_blocks.{i}.norm.query_norm.scale"
    ),
    rf"single_transformer_blocks\.{I}\.attn\.norm_k\.weight": (
        "single_blocks.{i}.norm.key_norm.scale"
    ),
    rf"x_embedder\.{P}": "img_in.{p}",
    rf"context_embedder\.{P}": "txt_in.{p}",
    rf"proj_out\.{P}": "final_layer.linear.{p}",
    rf"norm_out\.linear\.{P}": "~final_layer.adaLN_modulation.1.{p}",
}
FLUX = FLUX_BLOCKS | {
    rf"time_text_embed\.timestep_embedder\.linear_1\.{P}": "time_in.in_layer.{p}",
    rf"time_text_embed\.timestep_embedder\.linear_2\.{P}": "time_in.out_layer.{p}",
    rf"time_text_embed\.guidance_embedder\.linear_1\.{P}": "guidance_in.in_layer.{p}",
    rf"time_text_embed\.guidance_embedder\.linear_2\.{P}": "guidance_in.out_layer.{p}",
    rf"time_text_embed\.text_embedder\.linear_1\.{P}": "vector_in.in_layer.{p}",
    rf"time_text_embed\.text_embedder\.linear_2\.{P}": "vector_in.out_layer.{p}",
    rf"transformer_blocks\.{I}\.norm1\.linear\.{P}": "double_blocks.{i}.img_mod.lin.{p}",
    rf"transformer_blocks\.{I}\.norm1_context\.linear\.{P}": "double_blocks.{i}.txt_mod.lin.{p}",
    rf"transformer_blocks\.{I}\.ff\.net\.0\.proj\.{P}": "double_blocks.{i}.img_mlp.0.{p}",
    rf"transformer_blocks\.{I}\.ff\.net\.2\.{P}": "double_blocks.{i}.img_mlp.2.{p}",
    rf"transformer_blocks\.{I}\.ff_context\.net\.0\.proj\.{P}": "double_blocks.{i}.txt_mlp.0.{p}",
    rf"transformer_blocks\.{I}\.ff_context\.net\.2\.{P}": "double_blocks.{i}.txt_mlp.2.{p}",
    rf"single_transformer_blocks\.{I}\.norm\.linear\.{P}": "single_blocks.{i}.modulation.lin.{p}",
    rf"single_transformer_blocks\.{I}\.attn\.to_(?P<part>[qkv])\.{P}": (
        "single_blocks.{i}.linear1.{p}"
    ),
    rf"single_transformer_blocks\.{I}\.(?P<part>proj_mlp)\.{P}": "single_blocks.{i}.linear1.{p}",
    rf"single_transformer_blocks\.{I}\.proj_out\.{P}": "single_blocks.{i}.linear2.{p}",
}
FLUX_2 = FLUX_BLOCKS | {
    r"time_guidance_embed\.timestep_embedder\.linear_1\.weight": "time_in.in_layer.weight",
    r"time_guidance_embed\.timestep_embedder\.linear_2\.weight": "time_in.out_layer.weight",
    r"time_guidance_embed\.guidance_embedder\.linear_1\.weight": "guidance_in.in_layer.weight",
    r"time_guidance_embed\.guidance_embedder\.linear_2\.weight": "guidance_in.out_layer.weight",
    r"(?P<i>(double|single)_stream_modulation(_img|_txt)?)\.linear\.weight": "{i}.lin.weight",
    rf"transformer_blocks\.{I}\.ff\.linear_in\.weight": "double_blocks.{i}.img_mlp.0.weight",
    rf"transformer_blocks\.{I}\.ff\.linear_out\.weight": "double_blocks.{i}.img_mlp.2.weight",
    rf"transformer_blocks\.{I}\.ff_context\.linear_in\.weight": (
        "double_blocks.{i}.txt_mlp.0.weight"
    ),
    rf"transformer_blocks\.{I}\.ff_context\.linear_out\.weight": (
        "double_blocks.{i}.txt_mlp.2.weight"
    ),
    rf"single_transformer_blocks\.{I}\.attn\.to_qkv_mlp_proj\.weight": (
        "single_blocks.{i}.linear1.weight"
    ),
    rf"single_transformer_blocks\.{I}\.attn\.to_out\.weight": "single_blocks.{i}.linear2.weight",
}
X, CONTEXT = "joint_blocks.{i}.x_block", "joint_blocks.{i}.context_block"
SD3 = {
    r"pos_embed\.pos_embed": "pos_embed",
    rf"pos_embed\.proj\.{P}": "x_embedder.proj.{p}",
    rf"time_text_embed\.timestep_embedder\.linear_1\.{P}": "t_embedder.mlp.0.{p}",
    rf"time_text_embed\.timestep_embedder\.linear_2\.{P}": "t_embedder.mlp.2.{p}",
    rf"time_text_embed\.text_embedder\.linear_1\.{P}": "y_embedder.mlp.0.{p}",
    rf"time_text_embed\.text_embedder\.linear_2\.{P}": "y_embedder.mlp.2.{p}",
    rf"context_embedder\.{P}": "context_embedder.{p}",
    rf"proj_out\.{P}": "final_layer.linear.{p}",
    rf"norm_out\.linear\.{P}": "~final_layer.adaLN_modulation.1.{p}",
    rf"transformer_blocks\.{I}\.norm1\.linear\.{P}": X + ".adaLN_modulation.1.{p}",
    rf"transformer_blocks\.{I}\.norm1_context\.linear\.{P}": CONTEXT + ".adaLN_modulation.1.{p}",
    rf"transformer_blocks\.{I}\.(?P<a>attn2?)\.to_(?P<part>[qkv])\.{P}": X + ".{a}.qkv.{p}",
    rf"transformer_blocks\.{I}\.attn\.add_(?P<part>[qkv])_proj\.{P}": CONTEXT + ".attn.qkv.{p}",
    rf"transformer_blocks\.{I}\.(?P<a>attn2?)\.to_out\.0\.{P}": X + ".{a}.proj.{p}",
    rf"transformer_blocks\.{I}\.attn\.to_add_out\.{P}": CONTEXT + ".attn.proj.{p}",
    rf"transformer_blocks\.{I}\.(?P<a>attn2?)\.norm_(?P<n>[qk])\.{P}": X + ".{a}.ln_{n}.{p}",
    rf"transformer_blocks\.{I}\.attn\.norm_added_(?P<n>[qk])\.{P}": CONTEXT + ".attn.ln_{n}.{p}",
    rf"transformer_blocks\.{I}\.ff\.net\.0\.proj\.{P}": X + ".mlp.fc1.{p}",
    rf"transformer_blocks\.{I}\.ff\.net\.2\.{P}": X + ".mlp.fc2.{p}",
    rf"transformer_blocks\.{I}\.ff_context\.net\.0\.proj\.{P}": CONTEXT + ".mlp.fc1.{p}",
    rf"transformer_blocks\.{I}\.ff_context\.net\.2\.{P}": CONTEXT + ".mlp.fc2.{p}",
}
B = r"(?P<i>(layers|noise_refiner|context_refiner)\.\d+)"
Z_IMAGE = {
    rf"all_x_embedder\.2-1\.{P}": "x_embedder.{p}",
    rf"all_final_layer\.2-1\.(?P<i>linear|adaLN_modulation\.1)\.{P}": "final_layer.{i}.{p}",
    rf"{B}\.attention\.to_(?P<part>[qkv])\.weight": "{i}.attention.qkv.weight",
    rf"{B}\.attention\.to_out\.0\.weight": "{i}.attention.out.weight",
    rf"{B}\.attention\.norm_(?P<n>[qk])\.weight": "{i}.attention.{n}_norm.weight",
    r"(?P<i>(layers|noise_refiner|context_refiner)\.\d+\.(feed|ffn|attention_norm|ada).+)": "{i}",
    r"(?P<i>(t_embedder|cap_embedder|x_pad_token|cap_pad_token).*)": "{i}",
}


def original(names: Mapping[str, str], state: Mapping, concatenate: Callable) -> dict:
    """Returns a transformer's tensors in its original naming.

    Args:
      names: FLUX, FLUX_2, SD3 or Z_IMAGE.
      state: the tensors by their keys in diffusers.
      concatenate: of the tensors' library, along the first axis.
    """
    blocks = [int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks.")]
    last = f"transformer_blocks.{max(blocks, default=0)}.norm1_context."
    found, fused = {}, {}
    for key, tensor in state.items():
        matches = [
            (match, name)
            for pattern, name in names.items()
            if (match := re.fullmatch(pattern, key))
        ]
        ((match, name),) = matches  # exactly one
        groups = match.groupdict()
        name = name.format(**groups)
        if "part" in groups:
            fused.setdefault(name, {})[PARTS.index(groups["part"])] = tensor
            continue
        # In Stable Diffusion 3, the last block modulates the text as final layers do.
        if name.startswith("~") or (names is SD3 and key.startswith(last)):
            half = len(tensor) // 2
            tensor = concatenate([tensor[half:], tensor[:half]])
        found[name.removeprefix("~")] = tensor
    return found | {
        name: concatenate([parts[place] for place in sorted(parts)])
        for name, parts in fused.items()
    }


def lora_layers(checkpoint: Checkpoint) -> dict[str, Layer]:
    """Returns the layers that LoRAs can adapt by their original names, leaving out XLabs'."""
    weights, layers = checkpoint.weights("transformer"), {}
    for key, layer in checkpoint.family.kohya_names(checkpoint, "transformer").items():
        name = key.removesuffix(".weight")
        matrices = all(len(weights[ours].shape) in (2, 4) for ours in layer.keys)
        if name != key and matrices and not XLABS.fullmatch(name):
            layers[name] = layer
    return layers


def autoencoder(state: Mapping, prefix: str, levels: int) -> dict:
    """Returns an autoencoder's tensors in its original naming, with a prefix."""

    def up(match: re.Match) -> str:
        return f"up.{levels - 1 - int(match[1])}."

    found = {}
    for key, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d+)\.", up, key)
        name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
        name = re.sub(r"mid_block\.resnets\.0", "mid.block_1", name)
        name = re.sub(r"mid_block\.resnets\.1", "mid.block_2", name)
        name = re.sub(r"(up|down)samplers\.0", r"\1sample", name)
        name = name.replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("conv_norm_out", "norm_out")
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        name = re.sub(r"attn_1\.to_([qkv])", r"attn_1.\1", name)
        name = name.replace("attn_1.to_out.0", "attn_1.proj_out")
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        found[prefix + name] = tensor
    return found
