"""Rain with the haze of its far drops: streaks first, haze over them (Li et al., "Heavy Rain Image Restoration")."""

import numpy as np

from dtpm_fast.data.degradations.haze import haze
from dtpm_fast.data.degradations.rain import DENSE, rain


def rain_haze(image: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """HxWx3 float32 sRGB in [0, 1] with dense rain (a quarter: the rain of `rain`), seen through the haze of `haze`."""
    dense = rng.random() < 0.75
    rainy = rain(image, rng, strength, "additive", DENSE) if dense else rain(image, rng, strength)
    return haze(rainy, rng, strength)
