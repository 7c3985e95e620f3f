"""Describes how a pipeline's networks are stored: their folders, files and keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxdiff.checkpoint.tensors import StoredTensor

CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler_config.json"
INDEX = "model_index.json"
CONFIG_ONLY = ("scheduler", "low_res_scheduler")  # folders with a config and no weights
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "spiece.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


@dataclass(frozen=True, kw_only=True)
class Component:
    """A network of a pipeline in the diffusers layout.

    Attributes:
      library, class_name: as in `model_index.json`.
      other_class_names: those that checkpoints may have instead.
      tokenizer: the folder of its tokenizer; None for a network that reads no text.
      optional: whether a pipeline may lack it.
      prefix: the prefix of the keys in most files, which our keys do not have.
      plain_key: converts a key in an older naming to the current one; returns None for a buffer,
        which is ignored.
      plain_tensor: converts the location of a weight to that of the part that we use.
      tied: keys under which files may hold another key's weight, with or without that one.
    """

    library: Literal["diffusers", "transformers"]
    class_name: str
    other_class_names: tuple[str, ...] = ()
    tokenizer: str | None = None
    optional: bool = False
    prefix: str = ""
    plain_key: Callable[[str], str | None] = str
    plain_tensor: Callable[[StoredTensor], StoredTensor] = lambda tensor: tensor
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """The name of its weights file, without the variant and the suffix."""
        return STEMS[self.library]

    @property
    def weights_file(self) -> str:
        """The name of its weights file, if it has only one and no variant."""
        return f"{self.stem}.safetensors"


def config_file(component: str) -> str:
    """Returns the name of a component's config file within its folder."""
    return SCHEDULER_CONFIG if component.endswith("scheduler") else CONFIG
