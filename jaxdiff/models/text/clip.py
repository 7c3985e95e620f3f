"""CLIP's text and image encoders (Radford et al., 2021, arXiv:2103.00020).

Evaluation uses both together: `CLIPModel`. IP-Adapters use the second alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.attention import attention
from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.linear import Linear
from jaxdiff.models.sharding import COLUMNS, ROWS

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
FIXED = {"model_type": "clip_text_model"}
IMAGE_ENCODER_FIXED = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
}
# The end token in configs from before transformers 4.31, even if the vocabulary has another.
OLD_EOS = 2
# Keys that transformers also writes, but that do not change the hidden states.
IGNORED = {
    "attention_dropout",
    "dropout",
    "dtype",
    "initializer_factor",
    "initializer_range",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


SHARDING = (
    (r"\.([qkv]_proj|fc1)\.kernel$", COLUMNS),
    (r"\.(out_proj|fc2)\.kernel$|^text_projection\.kernel$", ROWS),
    (r"_embedding\.embedding$", COLUMNS),
)


@dataclass(frozen=True)
class CLIPTextConfig(ComponentConfig):
    """The fields of `text_encoder/config.json` that shape the network."""

    component = "text_encoder"
    fixed = FIXED
    ignored = IGNORED

    architectures: tuple[str, ...] = ("CLIPTextModel",)
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 1

    def __post_init__(self):
        if self.architectures not in {(name,) for name in NETWORKS}:
            raise ValueError(f"architectures = {list(self.architectures)} is not supported")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act = {self.hidden_act!r} is not supported")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size = {self.hidden_size} cannot be split into heads")


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The fields of a `vision_config` that shape the network."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act = {self.hidden_act!r} is not supported")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size = {self.hidden_size} cannot be split into heads")
        if self.num_channels != 3:
            raise ValueError(f"num_channels = {self.num_channels} is not supported (only 3 is)")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size = {self.patch_size} is larger than the image")


@dataclass(frozen=True)
class CLIPImageEncoderConfig(CLIPVisionConfig, ComponentConfig):
    """The fields of `image_encoder/config.json` that shape the network."""

    component = "image_encoder"
    fixed = IMAGE_ENCODER_FIXED
    ignored = IGNORED

    projection_dim: int = 512


@dataclass(frozen=True)
class CLIPConfig:
    """The configs of both encoders and the width of their shared space."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: int = 512


class _Embeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.token_embedding = nnx.Embed(
            config.vocab_size, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings,
            width,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )

    def __call__(self, token_ids: Array) -> Array:
        positions = jnp.arange(token_ids.shape[1])
        embedded = self.token_embedding(token_ids) + self.position_embedding(positions)
        # nnx.Embed returns the dtype that it was built with, not that of its weights.
        return embedded.astype(self.token_embedding.embedding.dtype)


class _SelfAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.is_causal = isinstance(config, CLIPTextConfig)
        self.num_heads = config.num_attention_heads
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        mixed = attention(query, key, value, self.num_heads, is_causal=self.is_causal)
        return self.out_proj(mixed)


class _MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class _Layer(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, rngs: nnx.Rngs):
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.self_attn = _SelfAttention(config, rngs=rngs)
        self.layer_norm2 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = _MLP(config, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([_Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Array) -> list[Array]:
        """Returns the input of the first layer and the output of every layer."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class CLIPTextModel(nnx.Module):
    """A causal transformer over the prompt's tokens; padding tokens are attended to like others."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.eos_token_id = config.eos_token_id
        self.embeddings = _Embeddings(config, rngs=rngs)
        self.encoder = _Encoder(config, rngs=rngs)
        self.final_layer_norm = nnx.LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs
        )

    def __call__(
        self, token_ids: Array, *, layers_skipped: int = 0, final_norm: bool = True
    ) -> tuple[Array, Array]:
        """Encodes prompts.

        Args:
          token_ids: int32 [batch, tokens].
          layers_skipped: how many of the last layers the hidden states skip.
          final_norm: whether to apply the final layer norm to the hidden states: Stable Diffusion 1
            and 2 do, XL does not.

        Returns:
          the hidden states, [batch, tokens, hidden size], and the pooled vector, [batch, hidden
          size]: the end token's, always from the last layer and after its norm.
        """
        states = self.encoder(self.embeddings(token_ids))
        hidden = states[-1 - layers_skipped]
        if final_norm:
            hidden = self.final_layer_norm(hidden)
        # For old configs, the largest id is the end token: it is the last of CLIP's vocabulary.
        is_end = token_ids == self.eos_token_id
        end = jnp.argmax(token_ids if self.eos_token_id == OLD_EOS else is_end, axis=1)
        last = jnp.take_along_axis(states[-1], end[:, None, None], axis=1)[:, 0]
        return hidden, self.final_layer_norm(last)


class CLIPTextModelWithProjection(CLIPTextModel):
    """The same network with its pooled vector projected into the space shared with images."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.text_projection = Linear(
            config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs
        )

    def __call__(
        self, token_ids: Array, *, layers_skipped: int = 0, final_norm: bool = True
    ) -> tuple[Array, Array]:
        """Encodes prompts like `CLIPTextModel`, with a pooled vector [batch, projection dim]."""
        hidden, pooled = super().__call__(
            token_ids, layers_skipped=layers_skipped, final_norm=final_norm
        )
        return hidden, self.text_projection(pooled)


class _VisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        width, patch, draw = config.hidden_size, config.patch_size, nnx.initializers.normal(0.02)
        self.class_embedding = nnx.Param(draw(rngs.params(), (width,)))
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            width,
            (patch, patch),
            strides=patch,
            padding="VALID",
            use_bias=False,
            rngs=rngs,
        )
        positions = (config.image_size // patch) ** 2 + 1
        self.position_embedding = nnx.Embed(positions, width, embedding_init=draw, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        patches = self.patch_embedding(images)  # [b, rows, columns, width]
        batch, rows, columns, width = patches.shape
        first = jnp.broadcast_to(self.class_embedding[...], (batch, 1, width))
        tokens = jnp.concatenate([first, patches.reshape(batch, rows * columns, width)], axis=1)
        positions = self.position_embedding(jnp.arange(tokens.shape[1]))
        return tokens + positions.astype(tokens.dtype)


class CLIPVisionModel(nnx.Module):
    """A vision transformer over an image's patches (Dosovitskiy et al., 2020, arXiv:2010.11929)."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.embeddings = _VisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)  # the files' spelling
        self.encoder = _Encoder(config, rngs=rngs)
        self.post_layernorm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns the pooled vectors [batch, hidden size] of normalised images [batch, h, w, 3]."""
        return self.post_layernorm(self.states(images)[-1][:, 0])

    def states(self, images: Array) -> list[Array]:
        """Returns the input of the first layer and the output of every layer.

        Each is [batch, 1 + patches, hidden size]; the class token is the first.
        """
        return self.encoder(self.pre_layrnorm(self.embeddings(images)))


class CLIPVisionModelWithProjection(nnx.Module):
    """The image encoder of an IP-Adapter.

    With both methods, images are [batch, size, size, 3], `size` being the config's `image_size`:
    resized, cropped and normalised as `images/clip_pixels.py` does it.
    """

    def __init__(self, config: CLIPImageEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = CLIPVisionModel(config, rngs=rngs)
        self.visual_projection = Linear(
            config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs
        )

    def __call__(self, images: Array) -> Array:
        """Returns the vectors of images, [batch, projection dim], not normalised."""
        return self.visual_projection(self.vision_model(images))

    def penultimate(self, images: Array) -> Array:
        """Returns the last layer's input, [batch, 1 + patches, hidden size], without a norm."""
        return self.vision_model.states(images)[-2]


class CLIPModel(nnx.Module):
    """Maps texts and images to one space, in which a text is near the images that it describes.

    The vectors are not normalised.
    """

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        text, vision, shared = config.text, config.vision, config.projection_dim
        self.text_model = CLIPTextModel(text, rngs=rngs)
        self.vision_model = CLIPVisionModel(vision, rngs=rngs)
        self.text_projection = Linear(text.hidden_size, shared, use_bias=False, rngs=rngs)
        self.visual_projection = Linear(vision.hidden_size, shared, use_bias=False, rngs=rngs)
        # The logarithm of the factor by which cosines are multiplied before a softmax.
        self.logit_scale = nnx.Param(jnp.full((), 2.6592))

    def text_features(self, token_ids: Array) -> Array:
        """Returns the vectors [batch, projection dim] of prompts, int32 [batch, tokens]."""
        return self.text_projection(self.text_model(token_ids)[1])

    def image_features(self, images: Array) -> Array:
        """Returns the vectors [batch, projection dim] of normalised images [batch, h, w, 3]."""
        return self.visual_projection(self.vision_model(images))


NETWORKS = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}


def network(config: CLIPTextConfig) -> type[CLIPTextModel]:
    """Returns the network class for the config: with or without a projection."""
    return NETWORKS[config.architectures[0]]
