"""The networks of a pipeline: in which folders and files they lie, and under which keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler_config.json"
INDEX = "model_index.json"
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


@dataclass(frozen=True, kw_only=True)
class Component:
    """A network of a pipeline in the diffusers layout.

    Attributes:
      library, class_name: as `model_index.json` gives them.
      tokenizer: the folder of the tokenizer that feeds it; None for a network that reads no text.
      optional: whether a pipeline can do without it.
      prefix: what most files put before each key; our keys are without it.
      plain_key: turns a key of an older or another dialect into today's; None drops a buffer.
    """

    library: Literal["diffusers", "transformers"]
    class_name: str
    tokenizer: str | None = None
    optional: bool = False
    prefix: str = ""
    plain_key: Callable[[str], str | None] = str

    @property
    def stem(self) -> str:
        """The name of its file of weights, without its ending and its variant."""
        return STEMS[self.library]

    @property
    def weights_file(self) -> str:
        """The name of its one file of weights."""
        return f"{self.stem}.safetensors"


def config_file(component: str) -> str:
    """The name of a component's config within its folder."""
    return SCHEDULER_CONFIG if component == "scheduler" else CONFIG
