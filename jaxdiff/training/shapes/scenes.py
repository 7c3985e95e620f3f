"""The shapes world as training data: its scenes are drawn and encoded once, and kept."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.training.recipe import Data
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.captions import TEMPLATES, draw_caption

ENCODE_BATCH = 64
PIXELS = "shapes"  # what `Data.path` says
VERSION = 2  # of `draw`: raised when the same numbers come to mean other scenes


def draw(data: Data, seed: int, index: int) -> tuple[shapes.Scene, str]:
    """The scene of this number and its caption, as the recipe's templates and pairs allow."""
    rng = np.random.default_rng([seed, index])
    while True:
        caption = draw_caption(rng, data.templates or TEMPLATES)
        scene = shapes.scene_for(caption, rng, data.composed)
        if not any(f"{thing.color} {thing.shape}" in data.held_out for thing in scene.objects):
            return scene, caption.text()


def check(data: Data) -> None:
    """Raises InputError for a template or a held-out pair that the world does not have."""
    pairs = [f"{color} {shape}" for color in shapes.COLORS for shape in shapes.SHAPES]
    for name, said, known in (
        ("templates", data.templates, tuple(TEMPLATES)),
        ("held_out", data.held_out, pairs),
    ):
        for value in said:
            if value not in known:
                raise InputError(f"data.{name}: {value!r} is none of {', '.join(known)}")
    if not set(pairs) - set(data.held_out):
        raise InputError("data.held_out: leaves no pair of color and shape to train on")


def encoded(
    data: Data, seed: int, encode: Callable[[Array], Array], digest: str, output: Path
) -> tuple[np.ndarray, list[str]]:
    """Latents float16 [scenes, h, w, c] and the captions, made once and kept in `output`.

    Args:
      encode: uint8 pixels [batch, 64, 64, 3] to latents.
      digest: of all that `encode` depends on.

    Raises:
      InputError: if `output` holds those of another autoencoder, or of other data.
    """
    check(data)
    whole = hashlib.sha256(f"{digest} {seed} {data} {VERSION}".encode()).hexdigest()[:16]
    path = output / f"scenes-{whole}.npz"
    if any(other != path for other in output.glob("scenes-*.npz")):
        raise InputError(
            f"{output} was begun with another autoencoder or other data; name another --output"
        )
    if not path.exists():
        encode = compilation.jit(encode)
        latents, captions = [], []
        for start in tqdm(range(0, data.scenes, ENCODE_BATCH), desc="encoding scenes"):
            numbers = range(start, start + ENCODE_BATCH)
            scenes, texts = zip(*(draw(data, seed, number) for number in numbers), strict=True)
            pixels = np.stack([shapes.render(scene) for scene in scenes])
            latents.append(np.asarray(encode(pixels).astype(jnp.float16)))
            captions += texts
        unfinished = output / "scenes.unfinished.npz"
        np.savez(
            unfinished,
            latents=np.concatenate(latents)[: data.scenes],
            captions=np.array(captions[: data.scenes]),
        )
        os.replace(unfinished, path)
    with np.load(path, allow_pickle=False) as scenes:
        return scenes["latents"], scenes["captions"].tolist()
