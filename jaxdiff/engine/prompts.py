"""What a prompt becomes: token ids, and the vectors that the denoiser is told."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from transformers import CLIPTokenizer

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.devices import compilation, parallel
from jaxdiff.errors import InputError
from jaxdiff.models.text import clip
from jaxdiff.weights.load import open_network

# Text is encoded in batches of this size whatever the size of the image batches, so that a prompt's
# embedding never depends on it.
TEXT_BATCH = 8
REMEMBERED_BYTES = 2**28  # of embeddings, on every device
XL_LAYERS_SKIPPED = 1  # Stable Diffusion XL is told the last layer but one (arXiv:2307.01952, 2.1)


class Embedding(NamedTuple):
    """A prompt's vectors.

    Attributes:
      context: [tokens, width], the hidden states of all text encoders side by side.
      pooled: [width], the whole prompt in one vector; None where the denoiser takes none.
    """

    context: Array
    pooled: Array | None


class PromptEncoder:
    """A checkpoint's tokenizers and text encoders; it remembers the prompts that it met lately."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        configs: dict,
        dtype,
        mesh: jax.sharding.Mesh,
        *,
        clip_skip: int,
        chunks: int,
    ):
        """Finds the text encoders of `checkpoint`, for `mesh`; `load` reads their weights.

        Args:
          configs: as `read_configs` gives them.
          clip_skip, chunks: as in `Options`.

        Raises:
          InputError: if the encoders cannot be read, or have no layer so early.
        """
        self.mesh, self.chunks = mesh, chunks
        self.tokenizers, self._stored = {}, {}
        xl = "text_encoder_2" in checkpoint.text_encoders
        for name in checkpoint.text_encoders:
            config = configs[name]
            tokenizer = CLIPTokenizer.from_pretrained(checkpoint.tokenizer(name))
            self.tokens = min(tokenizer.model_max_length, config.max_position_embeddings)
            self.tokenizers[name] = tokenizer
            words, layers = config.vocab_size, config.num_hidden_layers
            if len(tokenizer) > words:
                raise InputError(
                    f"{checkpoint.tokenizer(name)} has {len(tokenizer)} tokens, but {name} knows "
                    f"{words}: it is another model's; copy the checkpoint again"
                )
            if clip_skip + XL_LAYERS_SKIPPED * xl > layers:
                raise InputError(f"--clip-skip {clip_skip}: {name} has only {layers} layers")
            self._stored[name] = open_network(
                clip.network(config), config, checkpoint.weights(name), dtype, mesh
            )
        graphs = {name: stored.graph for name, stored in self._stored.items()}
        # By how many layers are skipped: a negative prompt skips none that it need not.
        self._encode = {
            clip_skip: compilation.jit(
                parallel.over_data(
                    partial(
                        encode_tokens,
                        graphs,
                        layers_skipped=clip_skip + XL_LAYERS_SKIPPED * xl,
                        final_norm=not xl,
                        pooled=xl,
                    ),
                    mesh,
                    (None, None),
                ),
            )
            for clip_skip in (0, clip_skip)
        }
        self._clip_skip = clip_skip
        self._remembered: dict[int, dict[str, Embedding]] = {skip: {} for skip in self._encode}
        self._programs: dict[int, Future[jax.stages.Compiled]] = {}

    def load(self) -> None:
        """Reads the weights, after which prompts can be encoded."""
        self.params = {name: stored.load() for name, stored in self._stored.items()}

    def compile(self) -> None:
        """Begins to compile the encoder, for all prompts; returns at once."""
        for clip_skip in self._encode.keys() - self._programs.keys():
            self._programs[clip_skip] = compilation.ahead(
                self._encode[clip_skip], *self._abstract_arguments()
            )

    def abstract(self) -> Embedding:
        """The shapes of one prompt's vectors."""
        batch = jax.eval_shape(self._encode[0], *self._abstract_arguments())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)

    def _abstract_arguments(self) -> tuple[dict, dict]:
        ids = jax.ShapeDtypeStruct((TEXT_BATCH, self.chunks, self.tokens), np.int32)
        params = {name: stored.params for name, stored in self._stored.items()}
        return params, dict.fromkeys(self._stored, ids)

    def __call__(self, prompts: Iterable[str], *, negative: bool = False) -> dict[str, Embedding]:
        """The embedding of each prompt; `clip_skip` is not for negative ones, as in diffusers."""
        self.compile()
        clip_skip = 0 if negative else self._clip_skip
        remembered = self._remembered[clip_skip]
        found = {p: remembered.pop(p) for p in set(prompts) if p in remembered}
        new = sorted(set(prompts) - found.keys())
        for start in range(0, len(new), TEXT_BATCH):
            texts = new[start : start + TEXT_BATCH]
            padded = texts + [""] * (TEXT_BATCH - len(texts))
            token_ids = {
                name: chunked_tokens(tokenizer, padded, self.tokens, self.chunks)
                for name, tokenizer in self.tokenizers.items()
            }
            encoded = compilation.wait(self._programs, clip_skip)(self.params, token_ids)
            if not parallel.may_run_ahead(self.mesh):
                jax.block_until_ready(encoded)
            for i, text in enumerate(texts):
                found[text] = jax.tree.map(lambda array, i=i: array[i], encoded)
        remembered |= found  # the newest last
        embedding = next(iter(found.values()))
        most = REMEMBERED_BYTES // sum(array.nbytes for array in jax.tree.leaves(embedding))
        while len(remembered) > most:
            del remembered[next(iter(remembered))]
        return found


def chunked_tokens(
    tokenizer: CLIPTokenizer, texts: Sequence[str], tokens: int, chunks: int
) -> np.ndarray:
    """Token ids, int32 [texts, chunks, tokens]; what does not fit is cut.

    Each chunk has its own start and end, as if it were a prompt by itself, so that prompts may be
    longer than the encoder's positions. Each prompt has all its chunks, the last perhaps empty: its
    embedding does not depend on the prompts beside it.
    """
    room = tokens - 2  # beside start and end
    most = chunks * room
    ids = np.full((len(texts), chunks, tokens), tokenizer.pad_token_id, np.int32)
    ids[:, :, 0] = tokenizer.bos_token_id
    for row, text in zip(ids, texts, strict=True):
        words = tokenizer(text, add_special_tokens=False, truncation=True, max_length=most)[
            "input_ids"
        ]
        for i, chunk in enumerate(row):
            part = words[i * room : (i + 1) * room]
            chunk[1 : len(part) + 1] = part
            chunk[len(part) + 1] = tokenizer.eos_token_id
    return ids


def encode_tokens(
    graphs: Mapping[str, nnx.GraphDef],
    params: dict,
    token_ids: dict[str, Array],
    *,
    layers_skipped: int,
    final_norm: bool,
    pooled: bool,
) -> Embedding:
    """The pure function behind `PromptEncoder`, for `jax.jit`.

    Args:
      graphs, params, token_ids: by text encoder; the ids int32 [batch, chunks, tokens].
      layers_skipped, final_norm: as in `CLIPTextModel`.
      pooled: whether to give the last encoder's pooled vector, of the first chunk.

    Returns:
      context [batch, chunks * tokens, width] and pooled [batch, width].
    """
    contexts = []
    for name, graph in graphs.items():
        batch, chunks, tokens = token_ids[name].shape
        hidden, vector = nnx.merge(graph, params[name])(
            token_ids[name].reshape(batch * chunks, tokens),
            layers_skipped=layers_skipped,
            final_norm=final_norm,
        )
        contexts.append(hidden.reshape(batch, chunks * tokens, -1))
    vector = vector.reshape(batch, chunks, -1)[:, 0]
    return Embedding(jnp.concatenate(contexts, axis=-1), vector if pooled else None)
