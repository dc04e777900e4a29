"""Rain with the haze of its far drops: streaks first, haze over them (Li et al., "Heavy Rain Image Restoration")."""

import numpy as np

from dtpm_fast.data.degradations.haze import haze
from dtpm_fast.data.degradations.rain import rain


def rain_haze(image: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """HxWx3 float32 sRGB in [0, 1] with rain, seen through haze: the rain and the haze that `rain` and `haze` draw."""
    return haze(rain(image, rng, strength), rng, strength)
