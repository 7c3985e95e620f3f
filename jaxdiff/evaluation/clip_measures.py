"""CLIP embeddings of images and prompts, and the measures computed from them.

Scores of different CLIP models cannot be compared, so a report names the model it used.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.devices import compilation, parallel
from jaxdiff.errors import InputError
from jaxdiff.evaluation import clip_checkpoint
from jaxdiff.families.tokenizers.clip import chunked_tokens, read_tokenizer
from jaxdiff.families.tokenizers.fast import FastTokenizer
from jaxdiff.images.clip_pixels import centre_of_resized
from jaxdiff.models.text.clip import OLD_EOS, SHARDING, CLIPModel
from jaxdiff.weights.load import open_network
from jaxdiff.weights.network import abstract_network

TEMPLATES = ("a photo of a {}.",)  # the CLIP paper's first template (section 3.1.4)
NEAR_DUPLICATE = 0.95  # cosine of two images that differ only in details: our choice
PRECISION = "float32"  # by default, GPUs and TPUs multiply with fewer bits
_device = threading.RLock()  # one program at a time, as everywhere in jaxdiff


class Clip:
    """A CLIP model on this host's devices.

    Attributes:
      name: a Hub id, or the name of its directory.
      fingerprint: SHA-256 (hex) over the files that determine an embedding.
      size: the side of its square input image, in pixels.
      width: the width of an embedding.
      logit_scale: the factor on cosines before a softmax.
    """

    def __init__(self, stored: clip_checkpoint.StoredClip, batch_size: int):
        config, mesh = stored.config, parallel.make_mesh()
        self.name, self.fingerprint = stored.name, stored.fingerprint
        self.size, self.width = stored.pixels.size, config.projection_dim
        self._tokenizer = read_tokenizer(stored.tokenizer)
        self._tokens = min(self._tokenizer.max_length, config.text.max_position_embeddings)
        _check_tokenizer(stored, self._tokenizer)
        graph, shapes = abstract_network(CLIPModel, config)
        self._params = open_network(shapes, SHARDING, stored.tensors, np.float32, mesh).load()
        self.logit_scale = float(np.exp(self._params["logit_scale"]))
        self._labels: dict[tuple, np.ndarray] = {}
        devices = mesh.shape["data"]
        self._batch = -(-batch_size // devices) * devices

        def program(function: Callable) -> Callable:
            return compilation.jit(parallel.over_data(partial(function, graph), mesh, (None, 0)))

        rule = stored.pixels
        self._embed_pixels = program(partial(image_embeddings, rule.mean, rule.std))
        self._embed_tokens = program(text_embeddings)

    def embed_images(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Returns embeddings of images, float32 [images, width], each of length 1.

        Args:
          images: uint8 [height, width, 3], of any sizes; read one batch at a time.
        """
        return self._embedded(
            self._embed_pixels, (centre_of_resized(image, self.size) for image in images)
        )

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns embeddings of texts, float32 [texts, width], each of length 1.

        Texts longer than the encoder's positions (77 tokens, with the start and end tokens) are
        truncated. Equal texts are encoded once.
        """
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        tokens = (chunked_tokens(self._tokenizer, [text], self._tokens, 1)[0, 0] for text in places)
        found = self._embedded(self._embed_tokens, tokens)
        return found[[places[text] for text in texts]]

    def embed_labels(
        self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> np.ndarray:
        """Returns embeddings of zero-shot labels, float32 [labels, width], each of length 1.

        A label's embedding is the mean over the templates, in which "{}" is replaced by the label
        (CLIP, section 3.1.4).
        """
        asked = tuple(labels), tuple(templates)
        if asked not in self._labels:
            texts = [template.replace("{}", label) for label in labels for template in templates]
            each = self.embed_texts(texts).reshape(len(labels), len(templates), self.width)
            self._labels[asked] = _of_length_1(each.mean(axis=1))
        return self._labels[asked]

    def _embedded(self, program: Callable, rows: Iterable[np.ndarray]) -> np.ndarray:
        """Returns the program's result for each row, in batches of equal size; pads the last."""
        found = [np.zeros((0, self.width), np.float32)]
        for batch in _batches(rows, self._batch):
            padded = np.zeros((self._batch, *batch.shape[1:]), batch.dtype)
            padded[: len(batch)] = batch
            with _device:
                found.append(np.asarray(program(self._params, padded))[: len(batch)])
        if not all(np.isfinite(each).all() for each in found):
            raise InputError(
                f"CLIP {self.name!r} returns values that are not finite; copy its weights again"
            )
        return np.concatenate(found)


def open_clip(model: str | Path, batch_size: int = 32) -> Clip:
    """Loads a CLIP model onto this host's devices; caches the last one.

    Args:
      model: as in `clip_checkpoint.find`: a directory or a Hub id.
      batch_size: the number of images or texts embedded at once.

    Raises:
      InputError: if it is missing or invalid.
    """
    with _device:
        return _open(str(model), batch_size)


@lru_cache(maxsize=1)
def _open(model: str, batch_size: int) -> Clip:
    try:
        return Clip(clip_checkpoint.find(model), batch_size)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"CLIP {model!r} cannot be read ({reason})") from error


def _check_tokenizer(stored: clip_checkpoint.StoredClip, tokenizer: FastTokenizer) -> None:
    """Rejects another model's tokenizer: its tokens would be unknown, or lack the end token."""
    config = stored.config.text
    end = config.vocab_size - 1 if config.eos_token_id == OLD_EOS else config.eos_token_id
    if tokenizer.size > config.vocab_size or tokenizer.end != end:
        raise InputError(
            f"the tokenizer in {stored.tokenizer} belongs to another model: it has "
            f"{tokenizer.size} tokens and end token {tokenizer.end}, but the text encoder "
            f"has {config.vocab_size} and {end}; copy the checkpoint again"
        )


def image_embeddings(
    mean: Sequence[float], std: Sequence[float], graph: nnx.GraphDef, params: dict, pixels: Array
) -> Array:
    """Embeds uint8 [b, size, size, 3]: the pure function behind `Clip.embed_images`."""
    images = (pixels.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)
    with jax.default_matmul_precision(PRECISION):
        return _normalised(nnx.merge(graph, params).image_features(images))


def text_embeddings(graph: nnx.GraphDef, params: dict, token_ids: Array) -> Array:
    """Embeds int32 [b, tokens]: the pure function behind `Clip.embed_texts`."""
    with jax.default_matmul_precision(PRECISION):
        return _normalised(nnx.merge(graph, params).text_features(token_ids))


def _normalised(vectors: Array) -> Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _batches(rows: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield np.stack(batch)


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Returns CLIPScore (Hessel et al., 2021, arXiv:2104.08718), as torchmetrics defines it.

    That is 100 max(cosine, 0) with the unchanged prompt. The paper uses 2.5 instead of 100 and
    puts "A photo depicts" before the text.

    Args:
      images, texts: paired embeddings [..., width].

    Returns:
      float64 [...], 0 to 100.
    """
    return 100 * np.maximum(_cosine(images, texts), 0)


def directional_similarity(
    image_a: np.ndarray, image_b: np.ndarray, text_a: np.ndarray, text_b: np.ndarray
) -> np.ndarray:
    """Measures if images changed as their texts did (Gal et al., 2021, arXiv:2108.00946, 4.2).

    Args:
      image_a, image_b, text_a, text_b: embeddings [..., width], before and after.

    Returns:
      the cosine between the two changes, float64 [...]; 0 where either change is zero.
    """
    return _cosine(np.float64(image_b) - image_a, np.float64(text_b) - text_a)


def zero_shot(images: np.ndarray, labels: np.ndarray, logit_scale: float) -> np.ndarray:
    """Returns the probability of each label for each image (CLIP, section 3.1).

    Args:
      images: embeddings [images, width].
      labels: embeddings [labels, width], from `Clip.embed_labels`.
      logit_scale: that of the `Clip`.

    Returns:
      float64 [images, labels]; each row sums to 1.
    """
    logits = logit_scale * (np.float64(images) @ np.float64(labels).T)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def diversity(images: np.ndarray) -> float:
    """Returns the mean of 1 - cosine over all pairs of a prompt's images: 0 to 2.

    Args:
      images: embeddings [images, width], each of length 1; the result is NaN for fewer than two.
    """
    count, total = len(images), np.float64(images).sum(axis=0)
    if count < 2:
        return np.nan
    # The sum of all cosines is the squared length of the sum; each image's cosine with itself is 1.
    return float(1 - (total @ total - count) / (count * (count - 1)))


def near_duplicates(images: np.ndarray, threshold: float = NEAR_DUPLICATE) -> float:
    """Returns the share of a prompt's images that nearly equal another of its images.

    Args:
      images: embeddings [images, width], each of length 1; the result is NaN for fewer than two.
      threshold: the cosine above which two images count as nearly equal.
    """
    if len(images) < 2:
        return np.nan
    cosines = np.float64(images) @ np.float64(images).T
    np.fill_diagonal(cosines, -1)
    return float((cosines.max(axis=1) > threshold).mean())


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (_of_length_1(np.float64(a)) * _of_length_1(np.float64(b))).sum(axis=-1)


def _of_length_1(vectors: np.ndarray) -> np.ndarray:
    """Scales vectors to length 1; zero vectors stay zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)
