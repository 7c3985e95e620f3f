"""Small tokenizers of the real kinds, made offline."""

import string
from pathlib import Path

import tokenizers
import transformers

WORDS = [
    "a",
    "red",
    "circle",
    "two",
    "blue",
    "stars",
    "ring",
    "black",
    "on",
    "the",
    "left",
    "of",
    "green",
    "square",
]


# What Qwen3's template does with one message of the user.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
IMAGE_TOKEN_ID = 264
BUNDLED = Path(__file__).parents[1] / "jaxdiff" / "assets" / "shapes64" / "tokenizer"


def clip(pad: str = "<|endoftext|>") -> transformers.CLIPTokenizer:
    """The bundled model's, with a padding token."""
    return transformers.CLIPTokenizer.from_pretrained(BUNDLED, pad_token=pad)


def qwen() -> transformers.Qwen2Tokenizer:
    """Qwen's kind: bytes and their merges, the marks of a conversation, a chat template.

    `IMAGE_TOKEN_ID` is the id of the token that stands for an image.
    """
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "c"), ("r", "e"), ("re", "d")]
    pieces = letters + ["".join(pair) for pair in merges]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    marks += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return transformers.Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate([*pieces, *marks])},
        merges=merges,
        additional_special_tokens=marks,
        chat_template=CHAT_TEMPLATE,
    )


def gemma() -> transformers.GemmaTokenizer:
    """Gemma's kind: pieces with bytes for all else."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.printable[:94]]
    merges = [("▁", "a"), ("r", "e"), ("re", "d")]
    pieces += ["".join(pair) for pair in merges]
    found = transformers.GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges
    )
    found.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", special.index("<bos>"))]
    )
    return found


def t5() -> transformers.T5Tokenizer:
    """T5's kind: Unigram pieces with scores, then the sentinels."""
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0 - i / 100) for i, letter in enumerate(letters)]
    pieces += [(f"▁{word}", -1.0 - i / 100) for i, word in enumerate(WORDS)]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=100)
