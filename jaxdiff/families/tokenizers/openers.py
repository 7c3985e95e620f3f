"""Opens the tokenizers of the families' text encoders. Imports transformers only when called."""

from collections.abc import Callable, Mapping
from pathlib import Path

from jaxdiff.checks import shown
from jaxdiff.errors import InputError
from jaxdiff.families.tokenizers.tokenizer import Tokenizer, fitting

CLIP_TOKENS, CLIP_VOCABULARY = 77, 49408  # if the text encoder's config gives no number
IMAGE_TOKEN_ID = 151655  # Qwen's, if the text encoder's config gives none
T5_VOCABULARY, QWEN_VOCABULARY, GEMMA_VOCABULARY = 32128, 151936, 256000


def by_encoder(openers: Mapping[str, Callable]) -> Callable[[str, Path, Mapping], Tokenizer]:
    """Returns `Family.tokenizer` of a family whose text encoders have different tokenizers."""
    return lambda name, folder, config: openers[name](name, folder, config)


def chat_tokenizer(
    tokens: int, before: str, after: str, name: str, folder: Path, config: Mapping
) -> Tokenizer:
    """Reads a language model's tokenizer; see `Family.tokenizer` and `ChatTokenizer`."""
    from jaxdiff.families.tokenizers.chat import ChatTokenizer

    tokenizer = ChatTokenizer(folder, tokens, before, after)
    nested = config.get("text_config")  # of models that also see images
    config = nested if isinstance(nested, Mapping) else config
    return fitting(tokenizer, folder, name, config.get("vocab_size", QWEN_VOCABULARY))


def chat_about_image_tokenizer(
    tokens: int, before: str, after: str, name: str, folder: Path, config: Mapping
) -> Tokenizer:
    """Reads the tokenizer of a language model that sees an image in the place of a token.

    It is as `chat_tokenizer`, and the token is one of `before`.
    """
    tokenizer = chat_tokenizer(tokens, before, after, name, folder, config)
    ids, _ = tokenizer([""])
    token = config.get("image_token_id", IMAGE_TOKEN_ID)
    if type(token) is not int or (ids == token).sum() != 1:
        raise InputError(
            f"{folder} makes no token {shown(token)}, in whose place {name} sees an image; it "
            "belongs to another model; copy the checkpoint again"
        )
    return tokenizer


def instructed_tokenizer(
    tokens: int, instruction: str, name: str, folder: Path, config: Mapping
) -> Tokenizer:
    """Reads Gemma's tokenizer; see `Family.tokenizer` and `InstructedTokenizer`."""
    from jaxdiff.families.tokenizers.instructed import InstructedTokenizer

    tokenizer = InstructedTokenizer(folder, tokens, instruction)
    return fitting(tokenizer, folder, name, config.get("vocab_size", GEMMA_VOCABULARY))


def clip_tokenizer(name: str, folder: Path, config: Mapping) -> Tokenizer:
    """Reads CLIP's tokenizer; see `Family.tokenizer`."""
    from jaxdiff.families.tokenizers.clip import ClipTokenizer

    positions = config.get("max_position_embeddings")
    tokenizer = ClipTokenizer(folder, positions if isinstance(positions, int) else CLIP_TOKENS)
    return fitting(tokenizer, folder, name, config.get("vocab_size", CLIP_VOCABULARY))


def t5_tokenizer(
    tokens: int, prepared: Callable[[str], str], name: str, folder: Path, config: Mapping
) -> Tokenizer:
    """Reads T5's tokenizer; see `Family.tokenizer` and, for the first two, `T5Tokenizer`."""
    from jaxdiff.families.tokenizers.t5 import T5Tokenizer

    tokenizer = T5Tokenizer(folder, tokens, prepared=prepared)
    return fitting(tokenizer, folder, name, config.get("vocab_size", T5_VOCABULARY))
