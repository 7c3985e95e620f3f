"""The Beam job behind `jaxdiff encode`: images to latents, captions to embeddings, once.

    plan      sizes of the images -> buckets -> shards
    encode    Create(missing shards) | Reshuffle | ParDo(EncodeShard)
    finish    all shards exist -> encoded.json

As in `generate`, the graph is linear, its elements are shard numbers, and only files prove what is
done. A shard is one file here, so renaming the file commits it: it exists whole or not at all, and
attempts on equal hardware write equal bytes. Unlike in `generate`, the model runs in Beam's own
process, as one instance behind a lock. Image decoding is the only risk that the input brings, so
when the process dies there is no row to single out: run the same command to continue.

    python -m pipelines.encode --data photos --model shapes64 --output out/encoded
"""

import hashlib
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np
from tqdm import tqdm

from jaxdiff.dataset import names, paths
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset.local import LocalStore
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint
from jaxdiff.families.model import networks_of
from jaxdiff.images import fitting
from jaxdiff.training.data import Examples, assign, buckets, encoded, open_examples
from jaxdiff.training.data.encoder import Encoder
from jaxdiff.training.recipe import Data
from pipelines import command_line, encode_options, jobs, runners
from pipelines.encode_options import Encoding
from pipelines.jobs import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, StoppedError, stopped_by_signals

DECODERS = 4  # threads for image decoding
AHEAD = 2  # batches decoded while one is encoded


class EncodeShard(beam.DoFn):
    """Encodes shards by their numbers."""

    def __init__(self, encoding: Encoding):
        self.encoding = encoding

    def process(self, number: int) -> Iterator[int]:
        """Encodes a shard; yields its number."""
        with jobs.failures_kept(), _lock:
            if not jobs.has_failed():
                encode_shard(self.encoding, number)
        yield number


_lock = threading.Lock()  # one model per process, and one device call at a time


def run(encoding: Encoding, beam_arguments: list[str]) -> int:
    """Encodes the images, or continues an encoding; returns the exit code.

    Raises:
      InputError: if the command or its input cannot be used; nothing has been written.
      OSError: if the disk is full or a write fails; running the same command again continues.
    """
    beam_runner = runners.choose(beam_arguments, 1)
    output = Path(encoding.output)
    opened.cache_clear()  # the images may have changed since an earlier job
    examples, shards, _ = opened(encoding)
    new = not (output / encoded.SETTINGS).exists()
    _begin(encoding, examples, output)
    LocalStore(output).sweep()
    todo = [n for n, shard in enumerate(shards) if not (output / shard.file).exists()]
    if not todo and (output / encoded.INDEX).exists():
        print(f"{output} is already encoded: {len(examples)} images")
        return EXIT_OK
    print(f"jaxdiff: {len(todo)} of {len(shards)} shards to encode", file=sys.stderr)
    try:
        with stopped_by_signals():
            _encode(encoding, todo, beam_runner)
            _finish(encoding, shards, output)
    except StoppedError:
        print(f"jaxdiff: stopped; run the same command to continue {output}", file=sys.stderr)
        return EXIT_STOPPED
    except InputError as problem:
        if not new or any(output.glob("data/*")):
            mend = "fix this, then run the same command again"
            print(f"jaxdiff: {problem}; {mend}", file=sys.stderr)
            return EXIT_FAILED
        (output / encoded.SETTINGS).unlink()
        LocalStore(output).tidy()
        raise
    print(f"encoded {len(examples)} images in {output}")
    return EXIT_OK


def _begin(encoding: Encoding, examples: Examples, output: Path) -> None:
    """Records the settings in the directory; raises InputError if it holds something else."""
    ours = (encoded.SETTINGS, names.WORK)  # another process may have just written the first
    if output.is_file() or (
        output.exists()
        and not (output / encoded.SETTINGS).exists()
        and any(path.name not in ours for path in output.iterdir())
    ):
        raise InputError(f"--output {output} holds other files; name a new directory")
    settings = asdict(encoding) | {
        "model": open_checkpoint(encoding.model).fingerprint,
        "images": _digest(examples),
    }
    del settings["output"]
    output.mkdir(parents=True, exist_ok=True)
    said = LocalStore(output).claim(encoded.SETTINGS, json.dumps(settings, indent=1))
    try:
        old = json.loads(said)
        changed = plans.differences(old, settings)
    except (AttributeError, ValueError):
        changed = f"{encoded.SETTINGS} is damaged"
    if changed:
        raise InputError(
            f"--output {output} holds another encoding ({changed}); name another directory"
        )


def _digest(examples: Examples) -> str:
    """Returns the SHA-256 (hex) of the images' sizes and captions, in order."""
    digest = hashlib.sha256(examples.sizes.astype("<i4").tobytes())
    for caption in examples.captions:
        digest.update(caption.encode() + b"\0")
    return digest.hexdigest()


def _encode(encoding: Encoding, todo: list[int], beam_runner: tuple) -> None:
    """Runs the Beam job; raises its first error."""
    if not todo:
        return
    runner, options = beam_runner
    with jobs.failures_raised(), beam.Pipeline(runner=runner, options=options) as pipeline:
        shards = pipeline | "Shards" >> beam.Create(todo, reshuffle=False)
        _ = shards | beam.Reshuffle() | "EncodeShard" >> beam.ParDo(EncodeShard(encoding))


class Work(NamedTuple):
    """The work to do: the images, the shards, and the indices of each shard's images."""

    examples: Examples
    shards: list[encoded.Shard]
    rows: list[np.ndarray]


@lru_cache(1)
def opened(encoding: Encoding) -> Work:
    """Finds the images and groups them into shards, each of one size, in the images' order.

    Raises:
      InputError: if they cannot be used.
    """
    checkpoint = open_checkpoint(encoding.model)
    model = networks_of(checkpoint)
    multiple = model.codec.factor * model.denoiser.size_multiple
    size = encoding.size or min(checkpoint.defaults.size)
    sizes = buckets(size, encoding.aspect_ratios, multiple)
    examples = open_examples(Data(path=encoding.data, captions=encoding.captions))
    if not isinstance(examples, Examples):
        raise InputError(f"--data {encoding.data} is already encoded; name a folder of images")
    of_size, step = assign(examples, sizes), encoding.images_per_shard
    shards, rows = [], []
    for number, (height, width) in enumerate(sizes):
        mine = np.flatnonzero(of_size == number)
        for start in range(0, len(mine), step):
            rows.append(mine[start : start + step])
            file = f"data/{len(shards):05d}.safetensors"
            shards.append(encoded.Shard(file, height, width, len(rows[-1])))
    return Work(examples, shards, rows)


@lru_cache(1)
def _encoder(model: str, embed: bool) -> Encoder:
    return Encoder(open_checkpoint(model), embed=embed)


def encode_shard(encoding: Encoding, number: int) -> None:
    """Writes one shard, unless it exists.

    Raises:
      InputError: for an image that cannot be decoded, or whose latents are not finite.
      StoppedError: if `jobs.stopping` is set.
    """
    examples, shards, rows = opened(encoding)
    shard, output = shards[number], Path(encoding.output)
    if (output / shard.file).exists():
        return
    encoder = _encoder(encoding.model, encoding.embeddings)
    indices = rows[number].tolist()
    captions = [examples.caption(index) for index in indices]
    means, stds = [], []
    at_once = encoder.at_once(shard.height, shard.width)
    progress = tqdm(total=len(indices), desc=f"shard {number + 1} of {len(shards)}", leave=False)
    with progress, ThreadPoolExecutor(DECODERS) as threads:
        for pixels in _batches(examples, shard, indices, at_once, threads):
            mean, std = encoder.posterior(pixels)
            means.append(mean.astype(np.float16))
            stds.append(std.astype(np.float16))
            progress.update(len(pixels))
    mean, std = np.concatenate(means), np.concatenate(stds)
    finite = np.isfinite(mean).all(axis=(1, 2, 3)) & np.isfinite(std).all(axis=(1, 2, 3))
    if not finite.all():
        name = examples.names[indices[int(np.argmin(finite))]]
        raise InputError(f"{name} has latents that are not finite; replace or remove it")
    content = encoded.shard_bytes(mean, std, captions, encoder.embeddings(captions))
    _commit(output, shard.file, content)


def _batches(
    examples: Examples,
    shard: encoded.Shard,
    indices: list[int],
    at_once: int,
    threads: ThreadPoolExecutor,
) -> Iterator[np.ndarray]:
    """Yields batches of images in the shard's size, uint8 [n, h, w, 3], decoded ahead of use."""

    def decoded(index: int) -> np.ndarray:
        return fitting.fitted(examples.pixels(index), shard.height, shard.width)

    waiting = deque()
    for start in [*range(0, len(indices), at_once), *[None] * AHEAD]:
        if jobs.stopping.is_set():
            threads.shutdown(cancel_futures=True)
            raise StoppedError
        if start is not None:
            group = indices[start : start + at_once]
            waiting.append([threads.submit(decoded, index) for index in group])
        if waiting and (start is None or len(waiting) > AHEAD):
            yield np.stack([image.result() for image in waiting.popleft()])


def _commit(output: Path, name: str, content: bytes) -> None:
    """Writes a file atomically: it gets its name once it is complete and on disk."""
    path = LocalStore(output).scratch("shard")
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        (output / name).parent.mkdir(exist_ok=True)
        os.replace(path, output / name)
        paths.sync_names((output / name).parent)
    except OSError as problem:
        problem.filename = problem.filename or str(output)  # a full disk names no file
        raise
    finally:
        path.unlink(missing_ok=True)


def _finish(encoding: Encoding, shards: list[encoded.Shard], output: Path) -> None:
    """Writes the index, which completes the encoding, and opens it once as a check."""
    if missing := [shard.file for shard in shards if not (output / shard.file).exists()]:
        raise InputError(
            f"{output}: {missing[0]} was not written, although the runner reported success"
        )
    encoder = _encoder(encoding.model, encoding.embeddings)
    if encoding.embeddings:
        empty = encoder.embeddings([""], negative=True)  # what guidance steers away from
        empty = {name: array[0] for name, array in empty.items()}
        _commit(output, encoded.EMPTY, encoded.empty_bytes(empty))
    LocalStore(output).swap(encoded.INDEX, encoded.index_text(shards, encoder.made_with))
    LocalStore(output).tidy()
    encoded.open_encoded(output)


if __name__ == "__main__":
    sys.exit(command_line.run(lambda said: run(*encode_options.parse(said)), sys.argv[1:]))
