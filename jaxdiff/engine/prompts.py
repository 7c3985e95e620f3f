"""Tokenizes and encodes prompts on the devices, with an LRU cache of embeddings."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import jax

from jaxdiff.devices import compilation, parallel
from jaxdiff.engine.embeddings import EmbeddingCache
from jaxdiff.errors import InputError
from jaxdiff.families.model import Model, Text
from jaxdiff.families.tokenizers.tokenizer import Tokenizer
from jaxdiff.weights.load import StoredNetwork

# Prompts are encoded in batches of this size, independent of the size of the image batches, so that
# a prompt's embedding never depends on it.
TEXT_BATCH = 8


class PromptEncoder:
    """A checkpoint's tokenizers and text encoders, with an LRU cache of embeddings.

    Attributes:
      params: the text encoders' parameters, once `load` has read them.
    """

    def __init__(
        self,
        model: Model,
        tokenizers: Mapping[str, Tokenizer],
        stored: Mapping[str, StoredNetwork],
        mesh: jax.sharding.Mesh,
        *,
        clip_skip: int,
        chunks: int,
    ):
        """Prepares the text encoders; `load` reads their weights.

        Args:
          model: the checkpoint's networks.
          tokenizers: each text encoder's tokenizer.
          stored: each text encoder's weights in their files.
          mesh: the devices.
          clip_skip, chunks: `clip_skip` and `prompt_chunks` of `Options`.

        Raises:
          InputError: if a text encoder has too few layers for `clip_skip`.
        """
        self.mesh, self.chunks = mesh, chunks
        self._stored, self._tokenizers = stored, tokenizers
        for name, layers in model.skippable.items():
            if clip_skip > layers:
                raise InputError(
                    f"--clip-skip {clip_skip}: {name} has only {layers} layers to skip; skip fewer"
                )
        # By the number of layers skipped; negative prompts skip none.
        self._encode = {
            skip: compilation.jit(
                parallel.over_data(partial(model.encode_text, clip_skip=skip), mesh, (None, None)),
            )
            for skip in (0, clip_skip)
        }
        self._clip_skip = clip_skip
        self._cache = {False: EmbeddingCache(mesh), True: EmbeddingCache(mesh)}  # by `negative`
        self._programs: dict[int, Future[jax.stages.Compiled]] = {}

    def load(self) -> None:
        """Reads the weights; after that, prompts can be encoded."""
        self.params = {name: stored.load() for name, stored in self._stored.items()}

    def compile(self) -> None:
        """Starts compiling the encoders for all prompts; returns at once."""
        for clip_skip in self._encode.keys() - self._programs.keys():
            self._programs[clip_skip] = compilation.ahead(
                self._encode[clip_skip], *self._abstract_arguments()
            )

    def abstract(self) -> Text:
        """Returns the shapes of one prompt's embedding."""
        batch = jax.eval_shape(self._encode[0], *self._abstract_arguments())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)

    def _abstract_arguments(self) -> tuple[dict, dict]:
        params = {name: stored.places for name, stored in self._stored.items()}
        tokens = self._tokens([""] * TEXT_BATCH, negative=False)
        return params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tokens)

    def _tokens(self, texts: Sequence[str], *, negative: bool) -> dict:
        return {
            name: tokenizer(texts, self.chunks, negative=negative)
            for name, tokenizer in self._tokenizers.items()
        }

    def __call__(self, prompts: Iterable[str], *, negative: bool = False) -> dict[str, Text]:
        """Returns each prompt's embedding; as in diffusers, negative ones ignore `clip_skip`."""
        self.compile()
        clip_skip = 0 if negative else self._clip_skip

        def encode(texts: list[str]) -> Text:
            padded = texts + [""] * (TEXT_BATCH - len(texts))
            tokens = self._tokens(padded, negative=negative)
            return compilation.wait(self._programs, clip_skip)(self.params, tokens)

        return self._cache[negative]({p: p for p in sorted(set(prompts))}, TEXT_BATCH, encode)
