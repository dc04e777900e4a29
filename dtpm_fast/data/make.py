"""Test sets of synthetic degradations, on photos that ship with scikit-image or on one's own."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dtpm_fast.atomic import whole_folder
from dtpm_fast.data.degradations import check_strength, degrade
from dtpm_fast.data.jpeg import LARGEST_SIDE, through_jpeg
from dtpm_fast.data.noise import with_noise
from dtpm_fast.data.pictures import named_photos
from dtpm_fast.data.sheet import sample_photo
from dtpm_fast.errors import UserError
from dtpm_fast.images import read_image, write_image
from dtpm_fast.tasks import check_task

SAMPLES = ("astronaut", "chelsea", "coffee", "motorcycle_left", "rocket")


def make_pairs(
    task: str, output: Path, photos: Sequence[Path] = (), strengths: Sequence[float] = (1.0,), seed: int = 0,
    noise: float = 0.0, jpeg: int | None = None,
) -> int:  # fmt: skip
    """Write `output`/input and `output`/target, PNGs of equal names: every photo at every strength. Returns the number
    of pairs.

    `photos` are files and folders; none stands for scikit-image's colour photos. A picture's generator follows from
    `seed`, its name and its strength: more photos change no other's. Strength 0 gives the clean photo. An input has
    normal noise of standard deviation `noise` (8-bit levels), and then, with `jpeg`, has been a JPEG file of that
    quality (1 to 100, 4:2:0). The folder is written whole or not at all.

    Raises `UserError` for an unknown task, a strength below 0, another noise or quality, a broken photo, two photos
    of one name, an output that holds something already, and, without photos, when scikit-image is not installed.
    """
    check_task(task)
    for number, strength in enumerate(strengths):
        if f"{check_strength(strength):g}" in [f"{other:g}" for other in strengths[:number]]:
            raise UserError(f"strength {strength:g}: is given twice")
    if seed < 0:
        raise UserError(f"seed {seed}: must be 0 or more")
    if not 0 <= noise <= 255:
        raise UserError(f"noise {noise:g}: must lie between 0 and 255")
    if jpeg is not None and not 1 <= jpeg <= 100:
        raise UserError(f"JPEG quality {jpeg}: must lie between 1 and 100")
    found = named_photos(photos)
    names = [path.stem for path in found] or list(SAMPLES)
    if len(set(names)) < len(names):
        raise UserError(f"{next(n for n in names if names.count(n) > 1)}: two photos have this name; rename one")
    with whole_folder(output) as folder:
        for number, name in enumerate(tqdm(names, unit="photo", disable=None)):
            picture = read_image(found[number]) if found else sample_photo(name)
            if jpeg is not None and max(picture.shape) > LARGEST_SIDE:
                raise UserError(f"{name}: is too long for a JPEG file, which has at most {LARGEST_SIDE} pixels a side")
            for strength in strengths:
                rng = np.random.default_rng([seed, zlib.crc32(os.fsencode(f"{task} {name} {strength:g}"))])
                degraded = degrade(task, picture.astype(np.float32) / 255, rng, strength)
                degraded8 = np.rint(degraded * 255).astype(np.uint8)
                if noise:
                    degraded8 = with_noise(degraded8, noise, rng)
                file = f"{name}-{strength:g}.png" if len(strengths) > 1 else f"{name}.png"
                write_image(folder / "target" / file, picture)
                write_image(folder / "input" / file, degraded8 if jpeg is None else through_jpeg(degraded8, jpeg))
    return len(names) * len(strengths)
