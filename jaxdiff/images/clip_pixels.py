"""Images as CLIP's image encoders see them. Imports no JAX."""

import numpy as np
from PIL import Image

# Of the channels in 0..1, in CLIP's training data.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes, crops and normalises an image for the image encoder of an IP-Adapter.

    Args:
      image: uint8 [height, width, 3].
      size: the side of the encoder's input.

    Returns:
      float32 [size, size, 3], of mean about 0 and deviation about 1.
    """
    pixels = centre_of_resized(image, size).astype(np.float32) / 255
    return (pixels - np.float32(MEAN)) / np.float32(STD)


def centre_of_resized(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes and center-crops uint8 [height, width, 3] to CLIP's input, uint8 [size, size, 3].

    Like `CLIPImageProcessor`, resizes the shortest side to `size` with Pillow's antialiased bicubic
    filter, then crops the center. OpenCLIP's torchvision differs by one pixel where an odd number
    of pixels is cropped.
    """
    height, width, _ = image.shape
    shortest = min(height, width)
    new_height, new_width = size * height // shortest, size * width // shortest
    pixels = resized(image, new_height, new_width)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [h, w, 3] to uint8 [height, width, 3] with Pillow's bicubic filter."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
