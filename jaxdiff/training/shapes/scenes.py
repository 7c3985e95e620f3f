"""The shapes world as training data: draws and encodes its scenes once, and caches them."""

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
PREVIEW_SEED, PREVIEW_IMAGES = 2**31, 48
PIXELS = "shapes"  # the value of `Data.path` for this data
VERSION = 2  # of `draw`; raise it when the same indices give other scenes


def draw(data: Data, seed: int, index: int) -> tuple[shapes.Scene, str]:
    """Draws the scene with this index and its caption, within the recipe's templates and pairs."""
    rng = np.random.default_rng([seed, index])
    while True:
        caption = draw_caption(rng, data.templates or TEMPLATES)
        scene = shapes.scene_for(caption, rng, data.composed)
        if not any(f"{thing.color} {thing.shape}" in data.held_out for thing in scene.objects):
            return scene, caption.text()


def check(data: Data) -> None:
    """Raises InputError for a template or held-out pair that the shapes world does not have."""
    pairs = [f"{color} {shape}" for color in shapes.COLORS for shape in shapes.SHAPES]
    for name, said, known in (
        ("templates", data.templates, tuple(TEMPLATES)),
        ("held_out", data.held_out, pairs),
    ):
        for value in said:
            if value not in known:
                raise InputError(f"data.{name}: unknown value {value!r}; known: {', '.join(known)}")
    if not set(pairs) - set(data.held_out):
        raise InputError("data.held_out excludes every pair of color and shape; remove a pair")


def encoded(
    data: Data, seed: int, encode: Callable[[Array], Array], digest: str, output: Path
) -> tuple[np.ndarray, list[str]]:
    """Returns latents, float16 [scenes, h, w, c], and captions; caches them in `output`.

    Args:
      encode: maps uint8 pixels [batch, 64, 64, 3] to latents.
      digest: a digest of everything that `encode` depends on.

    Raises:
      InputError: if `output` contains scenes of another autoencoder or of other data.
    """
    check(data)
    whole = hashlib.sha256(f"{digest} {seed} {data} {VERSION}".encode()).hexdigest()[:16]
    path = output / f"scenes-{whole}.npz"
    if any(other != path for other in output.glob("scenes-*.npz")):
        raise InputError(
            f"{output} was started with another autoencoder or other data; choose another --output"
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


def captions(data: Data, seed: int) -> list[str]:
    """Returns the captions of all scenes, without encoding any."""
    check(data)
    return [draw(data, seed, number)[1] for number in range(data.scenes)]


def preview_captions() -> list[str]:
    """Returns the captions of the sample grids, the same at every step of every run."""
    rng = np.random.default_rng(PREVIEW_SEED)
    return [shapes.sample(rng)[1] for _ in range(PREVIEW_IMAGES)]
