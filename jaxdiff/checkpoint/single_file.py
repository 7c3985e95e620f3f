"""Single-file checkpoints: a whole pipeline in the naming of its original code. Imports no JAX.

A file states neither its family nor its configs: the family is recognised by its keys and shapes.
The configs of Stable Diffusion 1 and XL are those on the Hub, which diffusers' `from_single_file`
uses, too; those of later models follow from the shapes (see `transformer_files`).

Only the names differ, and the layout of a few weights: see the tables in `original`.

A file may also hold a GAN upscaler (see `upscaler`), which is a network and nothing more.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jaxdiff.checkpoint import gguf_file, transformer_files, upscaler
from jaxdiff.checkpoint.original import ldm
from jaxdiff.checkpoint.prediction import prediction_type
from jaxdiff.checkpoint.safetensors_header import read_header, read_metadata
from jaxdiff.checkpoint.scaled_weights import with_scales
from jaxdiff.checkpoint.single_file_configs import CONTENTS, UNET, Contents
from jaxdiff.checkpoint.tensors import FLOATS, StoredTensor, describe_misfits
from jaxdiff.errors import InputError

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
    | text_encoders\.clip_l\.transformer\.text_projection\.weight  # not used by any family
    | text_encoders\.t5xxl\.transformer\.encoder\.embed_tokens\.weight  # a second shared.weight
    | (model\.diffusion_model\.)?norm_final\.weight  # of Z-Image, which does not use it
    | v_pred | ztsnr                           # flags: `_scheduler` reads them
    | global_step | epoch""",
    re.VERBOSE,
)
# Other kinds of single safetensors files, by the start of one of their keys.
FOREIGN = {
    r"(model\.diffusion_model\.)?distilled_guidance_layer\.": "a Chroma checkpoint",
    r"(control_model|controlnet_cond_embedding)\.": "a ControlNet",
    r"lora_|.*\.lora_": "a LoRA, which --lora adds to a model",
    r"edm_mean|edm_vpred\.": "a checkpoint with EDM's noise levels (Playground 2.5, CosXL)",
    r"(down_blocks|transformer_blocks|text_model|encoder|decoder)\.": "a single network",
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
      name: of the family, for messages.
      base: a model on the Hub that has what the file may lack; None if nothing may be lacking.
    """

    index: dict
    configs: dict[str, dict]
    weights: dict[str, dict[str, StoredTensor]]
    tokenizers: dict[str, tuple[str, str]]
    name: str
    base: str | None


def read(path: Path) -> SingleFile:
    """Reads the contents of a single-file checkpoint from its header alone.

    Raises:
      InputError: if it is not a whole safetensors or GGUF file, its family is not supported, or
        its keys are not exactly those of its family.
    """
    is_gguf = path.suffix == gguf_file.SUFFIX
    tensors = gguf_file.read_tensors(path) if is_gguf else with_scales(read_header(path))
    _refuse_foreign(path, tensors)
    contents = upscaler.contents(path, tensors) or transformer_files.contents(path, tensors)
    if contents is None and is_gguf:
        raise InputError(
            f"{path} is not a GGUF file of a supported transformer (FLUX.1, FLUX.2, Stable "
            "Diffusion 3, Z-Image); use a .safetensors file or a diffusers directory"
        )
    if contents is None:
        contents = _recognise(path, tensors)
        scheduler = _scheduler(path, contents.configs["scheduler"], tensors)
        contents = replace(contents, configs=contents.configs | {"scheduler": scheduler})
    return SingleFile(
        index=contents.index,
        configs=contents.configs,
        weights=weights(path, tensors, contents),
        tokenizers=contents.tokenizers,
        name=contents.name,
        base=contents.base,
    )


def _refuse_foreign(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    for pattern, what in FOREIGN.items():
        if any(re.match(pattern, key) for key in tensors):
            raise InputError(
                f"{path} is {what}; use a single file of a supported model in the original naming, "
                "or a diffusers directory"
            )


def _recognise(path: Path, tensors: Mapping[str, StoredTensor]) -> Contents:
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
            f"{path} is not a Stable Diffusion model in the original naming, nor another supported "
            "one; use a diffusers directory"
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
        table = contents.names.get(network, ldm.names)
        for ours, theirs, cut in table(contents.configs[network]):
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
    if not tensor.is_float:
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
