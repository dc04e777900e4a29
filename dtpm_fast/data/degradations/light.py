"""sRGB values and linear light (IEC 61966-2-1). Blur, haze and translucency add up in linear light only."""

import numpy as np


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """float32 linear light in [0, 1] of sRGB values in [0, 1], by the exact formula."""
    srgb = np.asarray(srgb, dtype=np.float32)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((np.maximum(srgb, 0.04045) + 0.055) / 1.055) ** 2.4).astype(
        np.float32
    )


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """float32 sRGB values in [0, 1] of linear light; values outside [0, 1] are clipped."""
    linear = np.clip(np.asarray(linear, dtype=np.float32), 0, 1)
    return np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055
    ).astype(np.float32)
