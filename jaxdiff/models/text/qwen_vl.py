"""Qwen2.5-VL for prompts with an image (arXiv:2502.13923)."""

from dataclasses import dataclass
from typing import ClassVar, Self

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.checks import shown
from jaxdiff.errors import InputError
from jaxdiff.models.embeddings import constant_angles, rotary_angles
from jaxdiff.models.text import qwen_vision
from jaxdiff.models.text.qwen import Qwen2_5_VLConfig, Qwen2_5_VLTextModel
from jaxdiff.models.text.qwen_vision import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel

IMAGE_TOKEN_ID = 151655  # in published files
SHARDING = qwen_vision.SHARDING  # which has those of the language model, too


@dataclass(frozen=True)
class Qwen2_5_VLImageConfig:
    """The fields of Qwen2.5-VL's `config.json` that shape both networks.

    Attributes:
      text: of the language model.
      vision: of the vision tower.
      image_token_id: the token that stands for an image.
    """

    component: ClassVar = Qwen2_5_VLConfig.component
    fixed: ClassVar = Qwen2_5_VLConfig.fixed

    text: Qwen2_5_VLConfig
    vision: Qwen2_5_VLVisionConfig
    image_token_id: int = IMAGE_TOKEN_ID

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads a parsed `config.json`; raises InputError for what is not supported."""
        file = f"{cls.component}/config.json"
        said, token = data.get("vision_config"), data.get("image_token_id", IMAGE_TOKEN_ID)
        if not isinstance(said, dict):
            raise InputError(f"{file}: vision_config = {shown(said)} is not supported")
        text, vision = Qwen2_5_VLConfig.from_json(data), Qwen2_5_VLVisionConfig.from_json(said)
        if type(token) is not int or not 0 <= token < text.vocab_size:
            raise InputError(f"{file}: image_token_id = {shown(token)} is no token")
        if vision.out_hidden_size != text.hidden_size:
            raise InputError(
                f"{file}: out_hidden_size = {vision.out_hidden_size} of vision_config must be "
                f"hidden_size = {text.hidden_size}"
            )
        return cls(text, vision, token)

    def to_json(self) -> dict:
        """Returns the `config.json` that transformers reads."""
        vision = {"vision_config": self.vision.to_json(), "image_token_id": self.image_token_id}
        return self.text.to_json() | vision


class Qwen2_5_VLModel(Qwen2_5_VLTextModel):
    """The language model of Qwen2.5-VL with its vision tower."""

    def __init__(self, config: Qwen2_5_VLImageConfig, *, rngs: nnx.Rngs):
        super().__init__(config.text, rngs=rngs)
        self.config = config
        self.visual = Qwen2_5_VLVisionModel(config.vision, rngs=rngs)

    def with_images(
        self, token_ids: Array, mask: Array, images: Array, *, layers: tuple[int, ...]
    ) -> tuple[list[Array], Array]:
        """Encodes prompts, in each of which one token is replaced by those of an image.

        Tokens of the image are at rows and columns, and those after it go on behind the larger of
        both (Wang et al., 2024, arXiv:2409.12191, section 2.1, M-RoPE).

        Args:
          token_ids: int32 [batch, tokens]; the first `image_token_id` of a row is replaced.
          mask: bool [batch, tokens]: which tokens are the prompt's; the others are on the right.
          images: as for `Qwen2_5_VLVisionModel`.
          layers: as for `Decoder`.

        Returns:
          the hidden states, each [batch, tokens - 1 + image's tokens, hidden size], and the mask of
          their tokens.
        """
        rows, columns = (side // qwen_vision.FACTOR for side in images.shape[1:3])
        count = rows * columns
        total = token_ids.shape[1] - 1 + count
        first = jnp.argmax(token_ids == self.config.image_token_id, axis=1)[:, None]
        place = jnp.arange(total) - first  # in the image; negative before it
        is_after = place >= count
        source = first + jnp.where(is_after, place - count + 1, jnp.minimum(place, 0))
        inside = jnp.clip(place, 0, count - 1)
        x = self.embedded(jnp.take_along_axis(token_ids, source, axis=1))
        seen = jnp.take_along_axis(self.visual(images), inside[..., None], axis=1)
        is_image = (place >= 0) & ~is_after
        x = jnp.where(is_image[..., None], seen.astype(x.dtype), x)
        of_text = jnp.where(is_after, place - count + max(rows, columns), place)
        grid = jnp.stack([0 * inside, inside // columns, inside % columns], axis=-1)
        where = jnp.where(is_image[..., None], grid, of_text[..., None]) + first[..., None]
        mask = jnp.take_along_axis(mask, source, axis=1)
        return self.states(x, mask, self._angles(where, total), layers=layers), mask

    def _angles(self, where: Array, total: int) -> Array:
        """Returns the angles of positions below `total`, [batch, tokens, axes]; see `states`."""
        table = rotary_angles(
            np.arange(total)[:, None], [self.head_dim], self.rope_theta, dtype=np.float32
        )
        axes = np.repeat(np.arange(3), self.config.text.mrope_section)
        return constant_angles(table)[where[..., axes], np.arange(len(axes))]
