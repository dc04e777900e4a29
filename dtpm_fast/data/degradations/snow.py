"""Falling snow in layers of depth: fine flakes far away, larger, faster and less sharp ones near."""

import numpy as np

from dtpm_fast.data.degradations.fields import grainy_noise, line_spectrum, scattered_drops, spectrum_frequencies
from dtpm_fast.data.degradations.light import to_linear, to_srgb

# Per layer: flakes' radius in pixels, part of the picture that they cover, opacity; (low, high), far to near.
_LAYERS = (
    ((0.5, 0.9), (0.005, 0.04), (0.4, 0.9)),
    ((0.9, 1.8), (0.005, 0.04), (0.6, 1.2)),
    ((2.0, 4.0), (0.00, 0.03), (0.5, 1.2)),
    ((4.0, 9.0), (0.00, 0.025), (0.2, 0.7)),
)


def snow(image: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """HxWx3 float32 sRGB in [0, 1] behind falling snow, composed in linear light.

    Four layers, their flakes streaked by the shutter along one direction up to 60 degrees from the vertical, ragged,
    and more or less opaque. `strength` multiplies the number of flakes.
    """
    height, width = image.shape[:2]
    angle = np.deg2rad(rng.uniform(-60, 60))
    speed = rng.uniform(0.5, 5.0)  # pixels that a flake of radius 1 falls while the shutter is open
    colour = to_linear(np.clip(rng.uniform(0.85, 1.0) + rng.normal(0, 0.01, 3), 0, 1))
    frequencies = spectrum_frequencies(height, width)
    light = to_linear(image)
    if strength == 0:
        return image.copy()
    for radii, covers, opacities in _LAYERS:
        radius, cover, opacity = rng.uniform(*radii), rng.uniform(*covers), rng.uniform(*opacities)
        layer = np.random.default_rng(rng.integers(2**63))
        length = max(speed * radius, 0.5)
        fall = angle + np.deg2rad(layer.normal(0, 5))
        area = 2 * np.pi * radius**2 + 2.5 * radius * length
        flakes = scattered_drops(height, width, layer, strength * cover / area, 2.0) * np.float32(opacity * area)
        spectrum = np.fft.rfft2(flakes) * line_spectrum(frequencies, length, radius, fall)
        spectrum *= np.exp(-(np.pi**2) * float(radius) ** 2 * (frequencies[0] ** 2 + frequencies[1] ** 2))  # round ends
        field = np.maximum(np.fft.irfft2(spectrum, s=(height, width)) - 0.02, 0)
        if radius > 0.9:  # a flake of a pixel has no outline
            ragged = grainy_noise(frequencies, layer, (height, width), 0.8 * radius, 0.8 * radius)
            field *= np.clip(1 + 0.5 * ragged, 0, 2)
        opaque = (1 - np.exp(-2 * field)).astype(np.float32)[..., None]
        light += (colour - light) * opaque
    return to_srgb(light)
