"""Tokenizes and encodes prompts on the devices, with an LRU cache of embeddings."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import jax
import numpy as np

from jaxdiff.devices import parallel
from jaxdiff.devices.programs import Program, wait
from jaxdiff.engine.embeddings import EmbeddingCache, digest
from jaxdiff.errors import InputError
from jaxdiff.families.model import Model, Text
from jaxdiff.families.tokenizers.tokenizer import Tokenizer
from jaxdiff.images.clip_pixels import resized
from jaxdiff.weights.load import StoredNetwork
from jaxdiff.weights.quantization import restored

# Prompts are encoded in batches of this size, independent of the size of the image batches, so that
# a prompt's embedding never depends on it. With an image, a prompt is long enough to be alone on a
# device.
TEXT_BATCH = 8


class PromptEncoder:
    """A checkpoint's tokenizers and text encoders, with an LRU cache of embeddings.

    If a text encoder also sees the image of a request, embeddings are of prompts with images.

    Attributes:
      mesh: the devices that encode.
      unloads: whether the weights are on them only while prompts are encoded.
      params: the text encoders' parameters, once `load` has read them.
    """

    def __init__(
        self,
        model: Model,
        tokenizers: Mapping[str, Tokenizer],
        stored: Mapping[str, StoredNetwork],
        dtype,
        mesh: jax.sharding.Mesh,
        *,
        clip_skip: int,
        chunks: int,
        unloads: bool = False,
    ):
        """Prepares the text encoders; `load` reads their weights.

        Args:
          model: the checkpoint's networks.
          tokenizers: each text encoder's tokenizer.
          stored: each text encoder's weights in their files.
          dtype: of the networks' arithmetic.
          mesh: the devices.
          clip_skip, chunks: `clip_skip` and `prompt_chunks` of `Options`.
          unloads: whether weights and embeddings stay in the host's memory. The weights come to the
            devices to encode new prompts, so many prompts should be encoded at once.

        Raises:
          InputError: if a text encoder has too few layers for `clip_skip`, or sees images and is to
            be unloaded.
        """
        self.mesh, self.chunks, self.unloads = mesh, chunks, unloads
        self._stored, self._tokenizers = stored, tokenizers
        for name, layers in model.skippable.items():
            if clip_skip > layers:
                raise InputError(
                    f"--clip-skip {clip_skip}: {name} has only {layers} layers to skip; skip fewer"
                )
        if unloads and model.image_size is not None:
            raise InputError(
                "--text-encoders unload: the text encoder of this model sees the images of each "
                "batch; use --text-encoders host"
            )
        axes = (None, None) if model.image_size is None else (None, 0)

        def encode(params: dict, tokens: dict, *, clip_skip: int) -> Text:
            return model.encode_text(restored(params, dtype), tokens, clip_skip=clip_skip)

        self._encode = Program(encode, mesh, axes)
        self._slots = TEXT_BATCH if model.image_size is None else mesh.shape["data"]
        self._image_size, self._clip_skip = model.image_size, clip_skip
        self._cache = {  # by `negative`
            negative: EmbeddingCache(mesh, on_host=unloads) for negative in (False, True)
        }
        self._programs: dict[tuple, Future[jax.stages.Compiled]] = {}

    @property
    def device_bytes(self) -> int:
        """How much memory the weights take on each device."""
        return sum(stored.device_bytes for stored in self._stored.values())

    def load(self) -> None:
        """Reads the weights; after that, prompts can be encoded."""
        self.params = {
            name: stored.load(on_host=self.unloads) for name, stored in self._stored.items()
        }

    def compile(self, *size: int) -> "list[Future[jax.stages.Compiled]]":
        """Starts compiling the encoders for all prompts; returns their programs at once.

        Args:
          size: the height and width of images, if prompts have any; others ignore them.
        """
        keys = {skip: (skip, self._seen(size)) for skip in (0, self._clip_skip)}
        for skip, key in keys.items():
            if key not in self._programs:
                arguments = self._abstract_arguments(size)
                self._programs[key] = self._encode.compile(*arguments, clip_skip=skip)
        return [self._programs[key] for key in keys.values()]

    def abstract(self, *size: int) -> Text:
        """Returns the shapes of one prompt's embedding; the arguments are those of `compile`."""
        batch = self._encode.result(*self._abstract_arguments(size), clip_skip=self._clip_skip)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)

    @property
    def at_once(self) -> int:
        """How many prompts fit in half of the cache, so that it keeps older ones, too."""
        return max(1, self._cache[False].most(self.abstract()) // 2)

    def visiting_bytes(self) -> int:
        """Returns how much memory of each device encoding takes, if the weights do not stay there.

        Raises:
          jax.errors.JaxRuntimeError: if the programs cannot be compiled.
        """
        if not self.unloads:
            return 0
        accounts = [program.result().memory_analysis() for program in self.compile()]
        return self.device_bytes + max(
            each.temp_size_in_bytes + each.output_size_in_bytes for each in accounts
        )

    def _seen(self, size: tuple[int, ...]) -> tuple[int, int] | None:
        """Returns the height and width in which images of a size are seen; None if none are."""
        return None if self._image_size is None else self._image_size(*size)

    def _abstract_arguments(self, size: tuple[int, ...]) -> tuple[dict, dict]:
        tokens = self._tokens([""] * self._slots, negative=False)
        sharding = None
        if self._image_size is not None:
            tokens["image"] = np.empty((self._slots, *self._seen(size), 3), np.uint8)
            sharding = parallel.batch_sharding(self.mesh)
        return self._places, jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tokens
        )

    @property
    def _places(self) -> dict:
        return {name: stored.places for name, stored in self._stored.items()}

    @contextlib.contextmanager
    def _on_devices(self) -> Iterator[dict]:
        """Yields the weights on the devices, and takes them off again if they do not stay."""
        if not self.unloads:
            yield self.params
            return
        placed = jax.device_put(self.params, jax.tree.map(lambda x: x.sharding, self._places))
        try:
            yield placed
        finally:
            for leaf in jax.tree.leaves(placed):
                leaf.delete()

    def _tokens(self, texts: Sequence[str], *, negative: bool) -> dict:
        return {
            name: tokenizer(texts, self.chunks, negative=negative)
            for name, tokenizer in self._tokenizers.items()
        }

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        images: Sequence[np.ndarray] | None = None,
        negative: bool = False,
    ) -> list[Text]:
        """Returns each prompt's embedding; as in diffusers, negative ones ignore `clip_skip`.

        Args:
          prompts: any number of them.
          images: the image of each prompt, uint8 [height, width, 3], all of one size, if a text
            encoder sees them.
          negative: whether they are negative prompts.
        """
        size = () if images is None else images[0].shape[:2]
        self.compile(*size)
        program = 0 if negative else self._clip_skip, self._seen(size)

        def encode(params: dict, items: list[tuple]) -> Text:
            padded = items + items[-1:] * (self._slots - len(items))
            tokens = self._tokens([text for text, _ in padded], negative=negative)
            if images is not None:
                seen = [resized(image, *self._seen(size)) for _, image in padded]
                tokens["image"] = np.stack(seen)
            return wait(self._programs, program)(params, tokens)

        shown = [None] * len(prompts) if images is None else images
        pairs = [*zip(prompts, shown, strict=True)]
        names = [(prompt, None if image is None else digest(image)) for prompt, image in pairs]
        cache, items = self._cache[negative], dict(zip(names, pairs, strict=True))
        nothing_new = contextlib.nullcontext()
        with nothing_new if cache.knows(items) else self._on_devices() as params:
            found = cache(items, self._slots, partial(encode, params))
        return [found[name] for name in names]
