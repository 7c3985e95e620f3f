"""Trains a text encoder to understand captions before it is used with images.

Trained only through a denoiser, an encoder learns late which attribute belongs to which object: the
gradient for this is small compared with that for appearance. Training on captions takes minutes.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.checkpoint.component import CONFIG
from jaxdiff.checkpoint.json_files import write_json
from jaxdiff.families.components import CLIP_TEXT
from jaxdiff.families.stable_diffusion import STABLE_DIFFUSION
from jaxdiff.families.tokenizers.clip import ClipTokenizer
from jaxdiff.training.components import component
from jaxdiff.training.loop import Params, Task
from jaxdiff.training.recipe import TextEncoderRecipe
from jaxdiff.training.shapes.scenes import preview_captions
from jaxdiff.weights.save import save_params
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.captions import NUMBERS, Caption

VALIDATION_SEED = 2**31

# Questions about a caption: shape, color and number of each of two groups; the relation; the
# background. None is the answer if the caption does not specify it.
_GROUP = (
    (None, *shapes.SHAPES),
    (None, *shapes.COLORS),
    (None, 1, *NUMBERS),
)
QUESTIONS = (*_GROUP, *_GROUP, (None, *shapes.RELATIONS), (None, *shapes.BACKGROUNDS))


def answers(caption: Caption) -> list[int]:
    """Returns the index of the correct answer to each of `QUESTIONS`."""
    first, second = (*caption.groups, None)[:2]
    said = [
        value
        for group in (first, second)
        for value in ((group.shape, group.color, group.count) if group else (None,) * 3)
    ]
    said += [caption.relation, caption.background]
    return [options.index(value) for options, value in zip(QUESTIONS, said, strict=True)]


def task(recipe: TextEncoderRecipe) -> Task:
    """Builds the task that trains the encoder and a linear layer that answers `QUESTIONS`.

    The linear layer reads the encoder's last hidden states. A `CLIPTextModelWithProjection` is read
    as Stable Diffusion 3 reads it: its penultimate states without the final norm and, by a linear
    layer of their own, its pooled vectors.

    Raises:
      InputError: if the tokenizer or the encoder cannot be read.
    """
    rngs = nnx.Rngs(recipe.seed)
    config, graph, params = component(STABLE_DIFFUSION, "text_encoder", recipe.text_encoder, rngs)
    tokenize = ClipTokenizer(Path(recipe.tokenizer), config.max_position_embeddings)
    sizes = [len(options) for options in QUESTIONS]
    is_projected = config.architectures == ("CLIPTextModelWithProjection",)
    widths = {"head": config.hidden_size}
    if is_projected:
        widths["pooled_head"] = config.projection_dim
    heads = {
        name: jax.random.normal(rngs.params(), (width, sum(sizes))) * 0.02
        for name, width in widths.items()
    }

    def batch(seed: int, step: int) -> dict:
        rng = np.random.default_rng([seed, step])
        drawn = [shapes.draw_caption(rng) for _ in range(recipe.batch_size)]
        return {
            "token_ids": tokenize([caption.text() for caption in drawn])[:, 0],
            "answers": np.array([answers(caption) for caption in drawn], np.int32),
        }

    def answered(logits: Array, wanted: Array) -> tuple[Array, Array]:
        """Returns the cross-entropy of all answers at each token, and whether all are right."""
        logits = jnp.split(logits, np.cumsum(sizes)[:-1], axis=-1)
        right = jnp.moveaxis(wanted, 1, 0)[..., None]
        entropies = jnp.stack(
            [
                -jnp.take_along_axis(jax.nn.log_softmax(one), answer[..., None], axis=-1)[..., 0]
                for one, answer in zip(logits, right, strict=True)
            ]
        )
        all_right = jnp.all(jnp.stack([one.argmax(-1) for one in logits]) == right, axis=0)
        return entropies.sum(axis=0), all_right

    def loss(params: Params, frozen: Params, batch: dict, key: Array) -> tuple[Array, dict]:
        states, pooled = nnx.merge(graph, params["text_encoder"])(
            batch["token_ids"], layers_skipped=int(is_projected), final_norm=not is_projected
        )
        is_end = batch["token_ids"] == config.eos_token_id  # padding too: the denoiser sees it
        share = is_end / is_end.sum(axis=1, keepdims=True) / len(is_end)
        entropies, all_right = answered(states @ params["head"], batch["answers"])
        total, logged = (entropies * share).sum(), {"understood": (all_right * share).sum()}
        if is_projected:
            entropies, all_right = answered(
                (pooled @ params["pooled_head"])[:, None], batch["answers"]
            )
            total += entropies.mean()
            logged["pooled_understood"] = all_right.mean()
        return total, logged

    preview_ids = tokenize(preview_captions())[:, 0]

    def preview(params: Params, frozen: Params) -> np.ndarray:
        return _similarities(graph, params["text_encoder"], preview_ids)

    def export(params: Params, frozen: Params, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        write_json(directory / CONFIG, config.to_json())
        file = directory / CLIP_TEXT.weights_file
        save_params(params["text_encoder"], file, np.float32, CLIP_TEXT.prefix)

    return Task(
        params={"text_encoder": params, **heads},
        frozen={},
        loss=loss,
        batch=lambda step: batch(recipe.seed, step),
        validation=[batch(VALIDATION_SEED, 0)],
        preview=preview,
        export=export,
    )


def _similarities(graph: nnx.GraphDef, params: Params, token_ids: np.ndarray) -> np.ndarray:
    """Draws the cosine similarities between captions: white for 1, black for -1."""
    _, pooled = nnx.merge(graph, params)(token_ids)
    unit = np.asarray(pooled / jnp.linalg.norm(pooled, axis=1, keepdims=True))
    shades = np.uint8(np.rint(127.5 + 127.5 * unit @ unit.T))
    return np.kron(shades, np.ones((8, 8), np.uint8))[..., None].repeat(3, axis=2)
