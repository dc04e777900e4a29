"""Synthetic degradations of clean photos, seeded and physically reasoned, one file each.

Every one maps HxWx3 float32 sRGB in [0, 1] to the same: `degradation(image, rng, strength=1.0)`. Strength 0 changes
nothing, 1 covers what the data sets of the task show, more is worse.
"""

from collections.abc import Callable

import numpy as np

from dtpm_fast.data.degradations.defocus import REACH as DEFOCUS_REACH
from dtpm_fast.data.degradations.defocus import defocus
from dtpm_fast.data.degradations.haze import haze
from dtpm_fast.data.degradations.motion_blur import REACH as MOTION_REACH
from dtpm_fast.data.degradations.motion_blur import motion_blur
from dtpm_fast.data.degradations.rain import rain
from dtpm_fast.data.degradations.rain_haze import rain_haze
from dtpm_fast.data.degradations.raindrops import raindrops
from dtpm_fast.data.degradations.snow import snow
from dtpm_fast.errors import UserError
from dtpm_fast.tasks import check_task

DEGRADATIONS: dict[str, Callable[[np.ndarray, np.random.Generator, float], np.ndarray]] = {
    "deblur": motion_blur,
    "defocus": defocus,
    "desnow": snow,
    "raindrop": raindrops,
    "rainhaze": rain_haze,
    "derain": rain,
    "dehaze": haze,
}

# Pixels at the edge of a piece that depend on what lies beyond it, at strength 1.
_REACH = {"deblur": MOTION_REACH, "defocus": DEFOCUS_REACH + 1}


def degrade(task: str, image: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """HxWx3 float32 in [0, 1]: the synthetic degradation of `task` on a clean HxWx3 float32 sRGB picture in [0, 1].

    Equal arguments and generator states give equal bytes. Raises `UserError` for an unknown task or a bad strength.
    """
    return DEGRADATIONS[check_task(task)](image, rng, check_strength(strength))


def border(task: str, strength: float = 1.0) -> int:
    """Pixels to cut from each side of a degraded piece of a photo, so that none depends on what the piece left out.
    Raises `UserError` for an unknown task or a bad strength."""
    return int(np.ceil(_REACH.get(check_task(task), 0) * check_strength(strength)))


def check_strength(strength: float) -> float:
    """`strength` itself. Raises `UserError` where it is below 0, infinite or NaN."""
    if not 0 <= strength < float("inf"):
        raise UserError(f"strength {strength}: must be 0 or more, and finite")
    return strength
