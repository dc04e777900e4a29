"""Reading and writing of photos: every format that Pillow knows, in 8 bits, with a clear error for a broken file."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dtpm_fast.atomic import atomic_path
from dtpm_fast.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})


def read_image(path: Path | str) -> np.ndarray:
    """HxWx3 uint8 RGB of any picture: grey, palette and 16-bit ones are converted, EXIF orientation is applied, an
    alpha channel is composed over white. Raises `UserError` naming the file when it is missing, truncated or no
    picture."""
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb8(image)
    except MemoryError as error:
        raise UserError(f"{path}: not enough memory to read it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: no such file") from error
        raise UserError(f"{path}: not a readable picture ({error})") from error


def to_rgb8(image: Image.Image) -> np.ndarray:
    """HxWx3 uint8 RGB of a Pillow image of any mode."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # Pillow's own convert("RGB") clips these at 255
        wide = np.asarray(image, dtype=np.float64)
        scale = 1.0 if wide.max(initial=0.0) <= 255 and image.mode in ("I", "F") else 255.0 / 65535.0
        grey = np.clip(np.rint(wide * scale), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def write_image(path: Path | str, rgb: np.ndarray) -> None:
    """Write HxWx3 uint8 RGB; the suffix chooses the format (JPEG at quality 95, others lossless). Whole or not at all.
    Raises `UserError` when the suffix is unknown or the disk is full."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown picture format {suffix!r}; use one of {', '.join(sorted(SUFFIXES))}")
    options: dict[str, Any] = {}
    if suffix in (".jpg", ".jpeg"):
        options = {"quality": 95, "subsampling": 0}
    elif suffix == ".webp":
        options = {"lossless": True}
    with atomic_path(path) as temporary:
        Image.fromarray(rgb).save(temporary, **options)


def list_images(folder: Path | str) -> list[Path]:
    """The pictures directly inside a folder, by name. Raises `UserError` when there is no such folder or no picture."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not found:
        raise UserError(f"{folder}: no pictures in it (looked for {', '.join(sorted(SUFFIXES))})")
    return found
