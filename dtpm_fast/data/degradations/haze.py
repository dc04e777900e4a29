"""Haze: light scattered into the line of sight, by the distance it travels (Koschmieder's law)."""

import numpy as np

from dtpm_fast.data.degradations.fields import smooth_field
from dtpm_fast.data.degradations.light import to_linear, to_srgb


def haze(image: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """HxWx3 float32 sRGB in [0, 1] seen through haze: J t + A (1 - t) in linear light, t = exp(-strength β d).

    The mean optical depth β d is 0.1 to 1.2, its course over the picture random and smooth, mostly farther at the top;
    the airlight A is nearly grey, 0.4 to 1 in sRGB.
    """
    height, width = image.shape[:2]
    mean_depth = rng.uniform(0.1, 1.2)
    variation = rng.uniform(0, 1)
    tilt = rng.uniform(-0.2, 1)
    airlight = to_linear(np.clip(rng.uniform(0.4, 1.0) + rng.normal(0, 0.012, 3), 0, 1))
    rising = np.linspace(1, 0, height, dtype=np.float32)[:, None] if height > 1 else np.full((1, 1), 0.5, np.float32)
    course = 1.5 * tilt * (rising - 0.5) + (smooth_field(height, width, rng, cells=3) - 0.5)
    depth = mean_depth * np.maximum(1 + variation * course, 0)
    if strength == 0:
        return image.copy()
    transmission = np.exp(-strength * depth)[..., None]
    return to_srgb(to_linear(image) * transmission + airlight * (1 - transmission))
