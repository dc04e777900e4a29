"""Synthetic degradations of clean photos, seeded and physically reasoned, one file each.

Every one maps HxWx3 float32 sRGB in [0, 1] to the same: `degradation(image, rng, strength=1.0)`. Strength 0 changes
nothing, 1 covers what the data sets of the task show, more is worse.
"""

from collections.abc import Callable

import numpy as np

from dtpm_fast.data.degradations.rain import rain
from dtpm_fast.errors import UserError
from dtpm_fast.tasks import check_task

DEGRADATIONS: dict[str, Callable[[np.ndarray, np.random.Generator, float], np.ndarray]] = {
    "derain": rain,
}

# Pixels at the picture's edge that a degradation computes from what lies beyond it, at strength 1.
_REACH = {"derain": 0}


def degrade(task: str, image: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """HxWx3 float32 in [0, 1]: the synthetic degradation of `task` on a clean HxWx3 float32 sRGB picture in [0, 1].

    Equal arguments and generator states give equal bytes. Raises `UserError` for an unknown task.
    """
    check_task(task)
    if task not in DEGRADATIONS:
        raise UserError(f"no synthetic degradation for {task}")
    return DEGRADATIONS[task](image, rng, strength)


def border(task: str, strength: float = 1.0) -> int:
    """Pixels to cut from each side of a degraded piece of a photo, so that none depends on what the piece left out."""
    return int(np.ceil(_REACH[check_task(task)] * max(strength, 1.0)))
