"""The networks that several families have, as files store them. Imports no JAX."""

import re
from dataclasses import replace
from functools import partial

from jaxdiff.checkpoint.component import Component

TEXT_PREFIX = "text_model."
BUFFER = "embeddings.position_ids"  # 0, 1, 2, ...: in old CLIP files
OLD_ATTENTION = re.compile(r"\b(attentions\.\d+)\.(query|key|value|proj_attn)\.")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _without_buffer(key: str) -> str | None:
    return None if key.endswith(BUFFER) else key


def _new_attention(key: str) -> str:
    return OLD_ATTENTION.sub(lambda found: f"{found[1]}.{NEW_ATTENTION[found[2]]}.", key)


_clip = partial(Component, library="transformers", prefix=TEXT_PREFIX, plain_key=_without_buffer)
CLIP_TEXT = _clip(class_name="CLIPTextModel", tokenizer="tokenizer")
CLIP_TEXT_PROJECTED = _clip(class_name="CLIPTextModelWithProjection", tokenizer="tokenizer")
T5 = Component(
    library="transformers",
    class_name="T5EncoderModel",
    tokenizer="tokenizer",
    tied={"encoder.embed_tokens.weight": "shared.weight"},
)


def _of_language_model(key: str) -> str | None:
    return None if key.startswith("lm_head.") else key


QWEN3 = Component(
    library="transformers",
    class_name="Qwen3ForCausalLM",
    other_class_names=("Qwen3Model",),
    tokenizer="tokenizer",
    prefix="model.",
    plain_key=_of_language_model,
)
GEMMA_2 = replace(QWEN3, class_name="Gemma2Model", other_class_names=("Gemma2ForCausalLM",))


def _of_both_towers(key: str) -> str | None:
    return None if key.startswith("lm_head.") else key.removeprefix("language_model.")


def _of_language_tower(key: str) -> str | None:
    return None if key.startswith("visual.") else _of_both_towers(key)


QWEN_2_5_VL = replace(
    QWEN3,
    class_name="Qwen2_5_VLForConditionalGeneration",
    other_class_names=(),
    plain_key=_of_language_tower,
)
QWEN_2_5_VL_WITH_VISION = replace(QWEN_2_5_VL, plain_key=_of_both_towers)
AUTOENCODER_KL = Component(
    library="diffusers", class_name="AutoencoderKL", plain_key=_new_attention
)
