"""Makes small, damaged images of large ones: blurred, resized, noisy and compressed, several times.

This is the second-order chain of Real-ESRGAN (Wang et al., 2021, arXiv:2107.10833, section 3.2),
with round kernels and without the overshoot of sharpening filters.
"""

import io

import numpy as np
from PIL import Image
from scipy import ndimage

from jaxdiff.training.recipe import Degradation

FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
LARGEST = 1.5  # how much a round may enlarge the image


def degraded(
    image: np.ndarray, height: int, width: int, how: Degradation, rng: np.random.Generator
) -> np.ndarray:
    """Returns an image in another size after `how.rounds` rounds of damage.

    Each round blurs, resizes, adds noise and compresses as JPEG, each of them with a probability of
    one half and to a random degree.

    Args:
      image: uint8 [h, w, 3].
      height, width: of the result, in pixels.

    Returns:
      uint8 [height, width, 3].
    """
    shrinks = image.shape[0] / height
    for left in reversed(range(how.rounds)):
        if rng.random() < 0.5:
            sigma = rng.uniform(0, how.blur) * image.shape[0] / height
            image = ndimage.gaussian_filter(image, (sigma, sigma, 0))
        sides = np.array([height, width])
        if left:  # the last round resizes to the size that is wanted
            scale = rng.uniform(how.resize, LARGEST) if rng.random() < 0.5 else 1.0
            sides = np.maximum(1, np.round(sides * scale * shrinks ** (left / how.rounds)))
        image = resized(image, *map(int, sides), FILTERS[rng.integers(len(FILTERS))])
        if rng.random() < 0.5:
            noise = rng.normal(0, rng.uniform(0, how.noise), image.shape)
            image = np.clip(np.round(image + noise), 0, 255).astype(np.uint8)
        if rng.random() < 0.5:
            image = compressed(image, int(rng.integers(how.jpeg, 95, endpoint=True)))
    if not how.rounds:
        image = resized(image, height, width, Image.Resampling.BOX)
    return image


def resized(image: np.ndarray, height: int, width: int, by: Image.Resampling) -> np.ndarray:
    """Resizes uint8 [h, w, 3] to [height, width, 3], antialiased when shrinking."""
    return np.asarray(Image.fromarray(image).resize((width, height), by))


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    """Returns uint8 [h, w, 3] as a JPEG of this quality shows it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))
