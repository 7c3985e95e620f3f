"""Makes the denoiser's training batches from captioned images of any source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax import Array

from jaxdiff.engine.program import to_float
from jaxdiff.errors import InputError
from jaxdiff.training import data, inpainting
from jaxdiff.training.components import Components
from jaxdiff.training.recipe import Data, Lora, Prior, TextToImageRecipe
from jaxdiff.training.shapes import places, scenes
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.scene import CANVAS

VALIDATION_BATCHES = 4
PRIOR = "prior"  # the folder of the class images in a run's directory
IMAGES = "images"  # the folder of their dataset in that folder
ClassImages = Callable[[str, Prior, Path], None]  # makes them: (model, prior, folder)
# Combined with the seed, so that dropping captions and holding out examples use other random
# numbers than drawing rows does.
DROPOUT, HELD_OUT, MASKS = 1, 2, 3
SAMPLES_PX = 48 * 64 * 64  # the most pixels of a sample grid, unless it has only four images
IMAGES_IN = ("control", "pixels", "masks")  # what images are made from
ONLY_SCENES = ("scenes", "composed", "templates", "held_out")  # settings of the shapes world only
# Settings of other data only.
ONLY_IMAGES = ("captions", "control", "size", "aspect_ratios", "flip")


@dataclass(frozen=True)
class Batches:
    """The data of a run.

    Attributes:
      batch: maps a batch's number to "latents" [b, h, w, c] or "pixels" uint8 [b, h, w, 3];
        "token_ids", what each text encoder's tokenizer returns, or "context" [b, tokens, width]
        and perhaps "pooled" and "mask"; and perhaps "weights" [b], or "places" as in `places.maps`;
        for a ControlNet "control", uint8 [b, h, w, 3]; for inpainting "masks", bool [b, h, w].
        Thread-safe.
      validation: batches of held-out examples, without caption dropout.
      samples: what the sample grids show: "captions", and those of `IMAGES_IN` that the method has.
    """

    batch: Callable[[int], dict]
    validation: Sequence[dict]
    samples: dict


@dataclass(frozen=True)
class _Source:
    """Batches with captions instead of conditioning.

    Attributes:
      train, held_out: map a number to a batch with "captions"; the latter may be None.
      samples: as in `Batches`, without masks.
      empty: the embedding of the empty caption if the captions are embedded.
    """

    train: Callable[[int], dict]
    held_out: Callable[[int], dict] | None
    samples: dict
    empty: dict[str, np.ndarray] = field(default_factory=dict)


def prepare(recipe: TextToImageRecipe, output: Path, class_images: ClassImages | None) -> None:
    """Checks the data settings and generates the class images of the recipe's prior.

    This must happen before this process takes the accelerator's memory, because other processes
    generate the images.

    Args:
      recipe: the recipe.
      output: the run's directory.
      class_images: generates the class images; None if they exist already.

    Raises:
      InputError: if the settings do not fit the data, or the images cannot be generated.
    """
    if recipe.loss.places and recipe.data.path != scenes.PIXELS:
        raise InputError("loss.places requires the shapes world as data; leave it out")
    _refuse_unused(recipe)
    if not recipe.prior:
        return
    if recipe.data.path == scenes.PIXELS or recipe.data.aspect_ratios > 1:
        raise InputError("prior requires a folder of images and data.aspect_ratios = 1")
    if isinstance(data.open_examples(recipe.data), data.EncodedExamples):
        raise InputError(f"{recipe.data.path} contains latents, but prior requires images")
    if class_images:
        class_images(recipe.model, recipe.prior, output / PRIOR)


def _refuse_unused(recipe: TextToImageRecipe) -> None:
    """Raises InputError for a setting that has no effect in this recipe."""
    of_scenes = recipe.data.path == scenes.PIXELS
    unused = {
        "lora": recipe.method != "lora" and recipe.lora != Lora(),
        "controlnet": recipe.method != "controlnet" and recipe.controlnet != {},
        "data.control": recipe.method != "controlnet" and recipe.data.control != Data().control,
        "prior": recipe.method == "controlnet" and recipe.prior is not None,
    }
    of_method = f'method = "{recipe.method}"'
    _refuse(unused, of_method)
    names = ONLY_IMAGES if of_scenes else ONLY_SCENES
    of_data = {f"data.{n}": getattr(recipe.data, n) != getattr(Data(), n) for n in names}
    _refuse(of_data, f'data.path = "{recipe.data.path}"')


def _refuse(unused: Mapping[str, bool], where: str) -> None:
    for name, is_set in unused.items():
        if is_set:
            raise InputError(f"{name} has no effect with {where}; leave it out")


def of(parts: Components, recipe: TextToImageRecipe, output: Path) -> Batches:
    """Makes the batches of a recipe, after `prepare`; encoded scenes are cached in `output`.

    Raises:
      InputError: if the data cannot be read or do not fit the recipe.
    """
    if recipe.data.path == scenes.PIXELS:
        source = _of_scenes(parts, recipe, output)
    else:
        source = _of_examples(parts, recipe)
    inpaints = parts.model.denoiser.inpainting is not None
    train = _with_prior(source, parts, recipe, output) if recipe.prior else source.train
    dropout = recipe.caption_dropout if parts.classifier_free else 0.0
    empty = parts.tokenized([""], negative=True)  # as the prompts that guidance steers away from

    def conditioned(number: int, make: Callable[[int], dict], dropout: float) -> dict:
        made = make(number)
        if inpaints:
            made["masks"] = _masks([recipe.seed, MASKS, number], made["pixels"])
        captions = made.pop("captions")
        rng = np.random.default_rng([recipe.seed, DROPOUT, number])
        dropped = rng.random(len(captions)) < dropout

        def without_dropped(nothing: np.ndarray, each: np.ndarray) -> np.ndarray:
            return np.where(dropped.reshape(-1, *[1] * (each.ndim - 1)), nothing, each)

        for name, nothing in source.empty.items():
            made[name] = without_dropped(nothing, made[name])
        if "context" not in made:
            made["token_ids"] = jax.tree.map(without_dropped, empty, parts.tokenized(captions))
        return made

    samples = source.samples
    if prompts := recipe.checkpoints.prompts:
        most = sample_count(size_of(parts, recipe.data))
        if samples.keys() & {*IMAGES_IN}:
            raise InputError("checkpoints.prompts: samples of this model begin with images")
        if len(prompts) > most:
            raise InputError(
                f"checkpoints.prompts: at most {most} images of this size fit in a grid"
            )
        samples = {"captions": [*prompts]}
    if inpaints:
        samples = {**samples, "masks": _masks([recipe.seed, MASKS], samples["pixels"])}
    validation = range(VALIDATION_BATCHES) if source.held_out else ()
    return Batches(
        batch=partial(conditioned, make=train, dropout=dropout),
        validation=[conditioned(number, source.held_out, 0.0) for number in validation],
        samples=samples,
    )


def _masks(seed: list[int], pixels: np.ndarray) -> np.ndarray:
    return inpainting.masks(np.random.default_rng(seed), *pixels.shape[:3])


def sample_count(size: int) -> int:
    """Returns the number of images in a sample grid, for a side of `size` pixels."""
    return max(4, SAMPLES_PX // size**2)


def size_of(parts: Components, source: Data) -> int:
    """Returns the side in pixels of a square that has the area to which images are scaled."""
    return source.size or parts.model.denoiser.sample_size * parts.model.codec.factor


def _of_scenes(parts: Components, recipe: TextToImageRecipe, output: Path) -> _Source:
    codec = parts.model.codec
    config, params = parts.model.configs[codec.component], parts.params[codec.component]

    def encode(pixels: Array) -> Array:
        return codec.scale(codec.encode(params, to_float(pixels))[0])

    inpaints = parts.model.denoiser.inpainting is not None
    if inpaints:  # images are encoded with their masks
        captions = scenes.captions(recipe.data, recipe.seed)
    else:
        digest = data.latents_digest(config, params)
        latents, captions = scenes.encoded(recipe.data, recipe.seed, encode, digest, output)
    count = len(captions)
    split = max(count - VALIDATION_BATCHES * recipe.batch_size, count // 2)
    drawings = {}
    if inpaints:
        drawings["pixels"] = shapes.render
    if parts.control is not None:
        drawings["control"] = shapes.outlines

    def drawn(rows: Sequence[int]) -> dict:
        """Draws scenes again, which is much faster than a step, and saves memory."""
        made = {"captions": [captions[row] for row in rows]}
        if not drawings and not recipe.loss.places:
            return made
        again = [scenes.draw(recipe.data, recipe.seed, row)[0] for row in rows]
        for name, draw in drawings.items():
            made[name] = np.stack([draw(scene) for scene in again])
        if recipe.loss.places:
            made["places"] = places.maps(again, CANVAS // codec.factor)
        return made

    def among(first: int, stop: int, number: int) -> dict:
        rng = np.random.default_rng([recipe.seed, number])
        rows = rng.integers(first, stop, size=recipe.batch_size)
        return drawn(rows) if inpaints else {"latents": latents[rows], **drawn(rows)}

    samples = drawn(range(split, min(split + scenes.PREVIEW_IMAGES, count)))
    if not drawings:
        of_recipe = recipe.data.templates and captions[: scenes.PREVIEW_IMAGES]
        samples = {"captions": of_recipe or scenes.preview_captions()}
    return _Source(partial(among, 0, split), partial(among, split, count), samples)


def _of_examples(parts: Components, recipe: TextToImageRecipe) -> _Source:
    """Makes batches of the user's images; holds out a random fiftieth if it fills a batch."""
    needs_pixels = parts.control is not None or parts.model.denoiser.inpainting is not None
    control = recipe.data.control if parts.control else ""
    examples = data.open_examples(recipe.data, control)
    is_encoded = isinstance(examples, data.EncodedExamples)
    if is_encoded and needs_pixels:
        raise InputError(f"{examples.path} contains latents; give the images themselves")
    if is_encoded:
        _refuse_encoded(examples, parts, recipe)
    sizes = data.buckets(
        size_of(parts, recipe.data), recipe.data.aspect_ratios, parts.size_multiple
    )
    make = partial(
        data.batches, examples, batch_size=recipe.batch_size, seed=recipe.seed, sizes=sizes
    )
    count = len(examples) // 50
    order = np.random.default_rng([recipe.seed, HELD_OUT]).permutation(len(examples))
    held_out, trained = np.split(order, [count if count >= recipe.batch_size else 0])
    trained.sort()
    size, shown = size_of(parts, recipe.data), trained[: scenes.PREVIEW_IMAGES]
    samples = {"captions": [examples.captions[i] for i in shown]}
    if needs_pixels:
        samples = data.fitted(examples, shown[: sample_count(size)], (size, size))
    return _Source(
        train=make(flip=recipe.data.flip, among=trained),
        held_out=make(random_crop=False, among=np.sort(held_out)) if len(held_out) else None,
        samples=samples,
        empty=examples.empty if is_encoded else {},
    )


def _refuse_encoded(
    examples: data.EncodedExamples, parts: Components, recipe: TextToImageRecipe
) -> None:
    """Raises InputError if the latents or embeddings do not fit the recipe."""
    config = parts.model.configs[parts.model.codec.component]
    data.check_encoders(examples, config, parts.params)
    learns = recipe.lora.text_encoder or {*(recipe.train or ())} & {*parts.model.text_encoders}
    if examples.empty and learns:
        raise InputError(
            f"{examples.path} contains embedded captions, on which a text encoder cannot be "
            "trained; encode without --embed"
        )


def _with_prior(
    source: _Source, parts: Components, recipe: TextToImageRecipe, output: Path
) -> Callable[[int], dict]:
    """Doubles each batch with images of the class that the model itself has generated."""
    size = size_of(parts, recipe.data)
    prior = data.batches(
        data.open_examples(Data(path=str(output / PRIOR / IMAGES))),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        sizes=[(size, size)],
    )
    weights = np.repeat(np.float32([1.0, recipe.prior.weight]), recipe.batch_size)

    def both(number: int) -> dict:
        subject, of_class = source.train(number), prior(number)
        return {
            "pixels": np.concatenate([subject["pixels"], of_class["pixels"]]),
            "captions": [*subject["captions"], *of_class["captions"]],
            "weights": weights,
        }

    return both
