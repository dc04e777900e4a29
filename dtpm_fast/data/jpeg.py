"""Pictures as they come back from a JPEG file: what most photos were that anyone wants restored."""

import io

import numpy as np
from PIL import Image

QUALITIES = (60, 98)  # lowest and highest of training's: from what the web keeps to what a camera writes
LARGEST_SIDE = 65500  # pixels, libjpeg's limit
_UNIT = 16  # pixels a side of what is coded together where the colours have half the size
_FULL, _HALVED = 0, 2  # Pillow's numbers for the colours' size


def through_jpeg(picture: np.ndarray, quality: int, halved_colours: bool = True) -> np.ndarray:
    """HxWx3 uint8 RGB as a JPEG file of this quality (1 to 100) gives it back; `halved_colours` is 4:2:0, what cameras
    and most programs write, else 4:4:4."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=_HALVED if halved_colours else _FULL)
    return np.asarray(Image.open(file))


def through_any_jpeg(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """HxWx3 uint8 RGB out of a JPEG file of random quality, colours and place in the file's grid of blocks."""
    quality, halved = int(rng.integers(QUALITIES[0], QUALITIES[1] + 1)), bool(rng.random() < 0.5)
    down, right = (int(start) for start in rng.integers(_UNIT, size=2))
    larger = np.pad(picture, ((down, 0), (right, 0), (0, 0)), mode="reflect")
    return np.ascontiguousarray(through_jpeg(larger, quality, halved)[down:, right:])
