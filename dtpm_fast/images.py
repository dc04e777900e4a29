"""Reading and writing of photos: every format that Pillow knows, in 8 bits, with a clear error for a broken file."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from dtpm_fast.atomic import atomic_path
from dtpm_fast.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {  # what undoes each of its values but 1
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SRGB = ImageCms.createProfile("sRGB")
_BROKEN = (  # what Pillow raises, the last for AVIF
    OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError, RuntimeError,
)  # fmt: skip


def read_image(path: Path | str) -> np.ndarray:
    """HxWx3 uint8 RGB of any picture: grey, palette and 16-bit ones are converted, EXIF orientation is applied, an
    alpha channel is composed over white, colours of another profile are converted to sRGB. Raises `UserError` naming
    the file when it is missing, truncated or no picture."""
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb8(image)
    except MemoryError as error:
        raise UserError(f"{path}: not enough memory to read it") from error
    except _BROKEN as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: no such file") from error
        raise UserError(f"{path}: not a readable picture ({error})") from error


def image_size(path: Path | str) -> tuple[int, int]:
    """(height, width) as `read_image` will give it, from the header where that is enough. Raises `UserError`."""
    try:
        with Image.open(path) as image:
            if image.format == "TIFF":
                image.load()  # newer Pillows turn a TIFF while they load it
            turned = _orientation(image) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except MemoryError as error:  # JPEG 2000 reads its header whole
        raise UserError(f"{path}: not enough memory to read it") from error
    except _BROKEN as error:
        raise UserError(f"{path}: not a readable picture ({error})") from error


def _orientation(image: Image.Image) -> int:
    """The one EXIF tag that counts. Pillow's exif_transpose writes all of them again, and fails on any odd one."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:  # EXIF that is none says nothing of the pixels
        return 1


def to_rgb8(image: Image.Image) -> np.ndarray:
    """HxWx3 uint8 RGB of a Pillow image of any mode. Floating-point greys are in [0, 1], [0, 255] or [0, 65535], the
    smallest that holds them all. Raises `ValueError` for ones that are not finite."""
    image.load()  # newer Pillows turn a TIFF while they load it
    turn = _TURNS.get(_orientation(image))
    image = image if turn is None else image.transpose(turn)
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # Pillow's own convert("RGB") clips these at 255
        wide = np.asarray(image, dtype=np.float64)
        if not np.isfinite(wide).all():
            raise ValueError("has pixels that are not finite")
        brightest = wide.max(initial=0.0)
        scale = 255.0 / 65535.0
        if image.mode in ("I", "F") and brightest <= 255:
            scale = 255.0 if image.mode == "F" and brightest <= 1 else 1.0
        grey = Image.fromarray(np.clip(np.rint(wide * scale), 0, 255).astype(np.uint8))
        grey.info["icc_profile"] = image.info.get("icc_profile")
        image = grey
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    colours = _in_srgb(image)
    if image.has_transparency_data:
        colours.putalpha(image.convert("RGBA").getchannel("A"))
        colours = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return np.array(colours)


def _in_srgb(image: Image.Image) -> Image.Image:
    """The picture's colours, without alpha, in sRGB: converted where it brings a profile of other ones, as phones'
    Display P3. A profile that is none, or of another kind of picture, is ignored."""
    profile = image.info.get("icc_profile")
    try:
        if not profile:
            return image.convert("RGB")
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _is_srgb(given):
            return image.convert("RGB")
        own = {"GRAY": "L", "CMYK": "CMYK"}.get(given.profile.xcolor_space.strip(), "RGB")
        if own != "RGB" and own != image.mode.removesuffix("A"):
            return image.convert("RGB")
        colours = ImageCms.profileToProfile(image.convert(own), given, _SRGB, outputMode="RGB")
        return colours or image.convert("RGB")
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    """By its name and by what it makes of a middle grey: linear sRGB, as editors write it, has the name too."""
    if "sRGB" not in ImageCms.getProfileDescription(profile):
        return False
    grey = Image.new("RGB", (1, 1), (128, 128, 128))
    shown = ImageCms.profileToProfile(grey, profile, _SRGB, flags=ImageCms.Flags.NOOPTIMIZE)  # tables take longer
    return shown is not None and bool(np.abs(np.asarray(shown, dtype=int) - 128).max() <= 8)


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
        try:
            Image.fromarray(rgb).save(temporary, **options)
        except ValueError as error:
            raise UserError(f"{path}: cannot be stored as {suffix} ({error}); use .png") from error
