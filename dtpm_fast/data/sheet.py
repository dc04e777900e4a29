"""One picture that shows every degradation, on photos that ship with scikit-image or on one's own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dtpm_fast.atomic import atomic_path
from dtpm_fast.data.degradations import DEGRADATIONS
from dtpm_fast.data.pictures import named_photos
from dtpm_fast.errors import UserError
from dtpm_fast.images import SUFFIXES, read_image

TILE = 208
_SAMPLES = ("astronaut", "coffee", "chelsea", "rocket", "coffee", "astronaut", "chelsea")
_COLUMNS = ((0.0, 0), (0.5, 0), (1.0, 0), (1.0, 1), (1.0, 2), (2.0, 0))  # (strength, seed)


def write_sheet(target: Path | str, photos: Sequence[Path | str] = (), seed: int = 0, quality: int = 75) -> None:
    """A row for each task: the clean photo, then degraded with the strength that is written below each tile. Rows share
    out the photos, which are files and folders. JPEG or PNG by the target's suffix. Raises `UserError` for a broken
    photo, an unknown suffix and, without photos, when scikit-image is not installed."""
    target = Path(target)
    if target.suffix.lower() not in SUFFIXES:
        raise UserError(f"{target}: unknown picture format {target.suffix!r}; use .jpg or .png")
    pictures = [read_image(photo) for photo in named_photos(photos)[: len(DEGRADATIONS)]] or [
        sample_photo(name) for name in _SAMPLES
    ]
    label = 18
    sheet = Image.new("RGB", (len(_COLUMNS) * TILE, len(DEGRADATIONS) * (TILE + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (task, degradation) in enumerate(DEGRADATIONS.items()):
        clean = _tile(pictures[row % len(pictures)])
        for column, (strength, variant) in enumerate(_COLUMNS):
            degraded = degradation(clean, np.random.default_rng([seed, row, variant]), strength)
            place = column * TILE, row * (TILE + label)
            sheet.paste(Image.fromarray(np.rint(degraded * 255).astype(np.uint8)), place)
            text = f"{task}: clean" if strength == 0 else f"strength {strength:g}, seed {variant}"
            draw.text((place[0] + 4, place[1] + TILE + 3), text, fill="black")
    with atomic_path(target) as temporary:
        sheet.save(temporary, quality=quality)  # formats without a quality ignore it


def _tile(picture: np.ndarray) -> np.ndarray:
    """TILE x TILE x 3 float32 in [0, 1]: the middle of the picture its short side 1.25 times the tile's."""
    short = min(picture.shape[:2])
    scale = TILE * 1.25 / short
    size = max(round(picture.shape[1] * scale), TILE), max(round(picture.shape[0] * scale), TILE)
    small = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), dtype=np.float32) / 255
    top, left = (small.shape[0] - TILE) // 2, (small.shape[1] - TILE) // 2
    return np.ascontiguousarray(small[top : top + TILE, left : left + TILE])


def sample_photo(name: str) -> np.ndarray:
    """HxWx3 uint8: a colour photo that ships with scikit-image. Raises `UserError` when that is not installed."""
    try:
        from skimage import data  # a test dependency
    except ImportError as error:
        raise UserError("the sample photos need scikit-image: install it, or name photos of your own") from error
    path = Path(data.__file__).parent / f"{name}.png"
    return read_image(path if path.is_file() else path.with_suffix(".jpg"))
