"""Measures of a whole set of images: against a reference, a training set, or each other."""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial, reduce
from pathlib import Path

import numpy as np
import pyarrow as pa

from jaxdiff.errors import InputError
from jaxdiff.evaluation import clip_measures, distances, duplicates, statistics
from jaxdiff.evaluation.accumulators import Moments, Sample
from jaxdiff.evaluation.records import Prompt
from jaxdiff.training.data import EncodedExamples, open_examples
from jaxdiff.training.recipe import Data

SAMPLE = 10_000  # images compared in pairs
NO_FEATURES = np.zeros((0, 0))
AT_ONCE = 64  # reference images in memory
HOW_TO_GET_CLIP = (
    "needs --clip DIR with CLIP's weights, for example openai/clip-vit-large-patch14 or an "
    "OpenCLIP model from the Hugging Face Hub"
)


@dataclass(frozen=True)
class Summary:
    """A constant-size summary of the features of any number of images."""

    moments: Moments
    sample: Sample

    @classmethod
    def of(cls, keys: list[str], features: np.ndarray) -> "Summary":
        """Summarizes features, [n, d]; raises InputError if they are not a table."""
        return cls(Moments.of(features), Sample.of(keys, features, SAMPLE))

    def merge(self, other: "Summary") -> "Summary":
        """Combines two summaries; raises InputError if their numbers of features differ."""
        return Summary(self.moments.merge(other.moments), self.sample.merge(other.sample))

    def save(self, path: Path) -> None:
        """Writes the summary atomically."""
        unfinished = path.with_name(f".{path.name}")
        with unfinished.open("wb") as file:
            np.savez(file, **self.moments.arrays(), **self.sample.arrays())
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Summary":
        """Reads a summary that `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(Moments.from_arrays(arrays), Sample.from_arrays(arrays))


def summary_of_all(parts: Iterable[Summary]) -> Summary:
    """Merges summaries; works as a Beam combiner, which merges ten at a time in any order."""
    return reduce(Summary.merge, parts, Summary.of([], NO_FEATURES))


def read_reference(path: Path, clip_directory: str) -> Summary:
    """Summarizes the features of the reference images.

    Args:
      path: a folder of captioned images, of which CLIP embeddings or thumbnails are computed; or
        an .npz with `features`, [n, d], of the same kind as the features of the evaluated images.
      clip_directory: as in `features_of`.

    Raises:
      InputError: naming the file that cannot be used.
    """
    if path.suffix == ".npz":
        features = _read_features(path)
        return Summary.of([str(number) for number in range(len(features))], features)
    examples = open_examples(Data(str(path)))
    if isinstance(examples, EncodedExamples):
        raise InputError(f"{path} holds latents, not pixels; name the folder of images instead")
    summary = Summary.of([], NO_FEATURES)
    for start in range(0, len(examples), AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, len(examples)))
        pixels = [examples.pixels(number) for number in numbers]
        features = features_of(pixels, clip_directory)
        summary = summary.merge(Summary.of([examples.names[n] for n in numbers], features))
    return summary


def features_of(pixels: list[np.ndarray], clip_directory: str) -> np.ndarray:
    """Returns CLIP embeddings, or thumbnails if `clip_directory` is "": float32 [n, d]."""
    if clip_directory:
        return clip_measures.open_clip(clip_directory).embed_images(pixels)
    return np.stack([statistics.thumbnail_features(image) for image in pixels])


def _read_features(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["features"]
    except KeyError:
        raise InputError(f"{path} has no array `features`; save one in it, [n, d]") from None
    except (EOFError, OSError, ValueError, zipfile.BadZipFile) as problem:
        raise InputError(f"{path} cannot be read: {problem}") from None


def against_reference(
    ours: Summary, reference: Summary, with_clip: bool
) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yields each measure's name and the function that computes it, which may raise InputError."""
    mine, theirs = ours.sample.features, reference.sample.features
    yield "frechet", lambda: distances.frechet_distance(ours.moments, reference.moments)
    kernel = "cmmd" if with_clip else "kernel"
    how = "rbf" if with_clip else "polynomial"
    yield kernel, lambda: distances.kernel_distance(theirs, mine, how)
    covered = cache(partial(distances.precision_recall, theirs, mine))
    yield "precision", lambda: covered()[0]
    yield "recall", lambda: covered()[1]


def copies(tables: Iterable[pa.Table], training: str) -> dict[str, float]:
    """Returns the shares of images that are exact copies and near-copies of training images.

    Raises:
      InputError: if the training set cannot be read, or if the images differ in size.
    """
    known, exact, near, count = None, 0, 0, 0
    for table in tables:
        table = table.filter(table["made"])
        sizes = set(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True))
        if known is None and sizes:
            size = next(iter(sizes))
            known = duplicates.read_training_set(training, *size)
        if sizes - {size}:
            raise InputError("--training needs images of one size; leave it out for several sizes")
        hashes = duplicates.pixel_hashes(table["pixel_sha256"].to_pylist())
        exact += int(known.copied(hashes).sum())
        near += int(known.near.within(table["perceptual_hash"].to_numpy()).sum())
        count += len(table)
    return {"exact_copies": exact / count, "near_copies": near / count} if count else {}


def directions(tables: Iterable[pa.Table], prompts: list[Prompt], model: str) -> dict[str, float]:
    """Returns the mean CLIP directional similarity of prompts that edit another prompt.

    A prompt whose row has the id of another prompt as `source` is compared with that prompt. Images
    are paired by index; they are comparable if their seeds are equal.

    Args:
      model: the directory or Hub id of CLIP's weights.
    """
    sources = {p.id: p.row["source"] for p in prompts if p.row.get("source")}
    wanted = {*sources, *sources.values()}
    features = {}
    for table in tables:
        table = table.filter(table["made"])
        named = zip(*(table[name].to_pylist() for name in ("id", "index", "features")), strict=True)
        features |= {(id_, index): found for id_, index, found in named if id_ in wanted}
    texts = {p.id: p.text for p in prompts if p.id in wanted}
    tower = clip_measures.open_clip(model)
    embedded = dict(zip(texts, tower.embed_texts(list(texts.values())), strict=True))
    found = [
        clip_measures.directional_similarity(
            np.array(features[source, index]), np.array(after), embedded[source], embedded[id_]
        )
        for (id_, index), after in features.items()
        if (source := sources.get(id_)) and (source, index) in features
    ]
    return {"directional": float(np.mean(found))} if found else {}


def labels(prompts: list[Prompt]) -> tuple[str, ...]:
    """Returns the labels that CLIP chooses from: an audit's `labels`, or each row's `label`."""
    if prompts[0].row.get("labels"):
        return tuple(prompts[0].row["labels"])
    said = {prompt.row.get("label") for prompt in prompts}
    return tuple(sorted(label for label in said if isinstance(label, str)))
