"""Rain streaks, as motion-blurred drops in layers of depth.

A raindrop that falls while the shutter is open leaves a streak: long with the exposure, thin, brighter than what is
behind it because the drop gathers light from the whole sky (Garg and Nayar, "Vision and rain", 2007). One wind and one
shutter give one angle per picture; nearer drops leave longer, wider, brighter and fewer streaks.

The ranges are fitted to the residuals of Rain100L's rain (Yang et al., CVPR 2017): see docs/degradations.md for the
comparison and the command that prints it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtpm_fast.data.degradations.fields import (
    grainy_noise,
    line_spectrum,
    scattered_drops,
    spectrum_frequencies,
)
from dtpm_fast.data.degradations.light import to_linear, to_srgb

COMPOSITIONS = ("additive", "screen", "physical")


@dataclass(frozen=True)
class Kind:
    """Ranges of one kind of rain, per picture; each is (low, high), drawn uniformly."""

    coverage: tuple[float, float]  # drops per pixel times the area of a streak
    length: tuple[float, float]  # pixels
    brightness: tuple[float, float]  # mean of a streak's peak, in [0, 1]
    spread: float  # of the drops' brightness, shape of a gamma distribution: large is even
    ceiling: tuple[float, float]  # no streak is brighter, in [0, 1]
    probability: float


KINDS = (
    Kind((0.11, 0.18), (30, 62), (0.070, 0.105), 0.9, (0.40, 0.55), 0.25),  # drizzle
    Kind((0.22, 0.36), (42, 104), (0.088, 0.125), 0.9, (0.45, 0.70), 0.40),  # even rain
    Kind((0.10, 0.18), (26, 76), (0.220, 0.450), 1.5, (0.65, 0.85), 0.30),  # coarse bright drops
    Kind((0.27, 0.46), (76, 120), (0.110, 0.220), 0.9, (0.50, 0.75), 0.05),  # downpour
)
# Outdoor-Rain's: many thin faint streaks.
DENSE = (Kind((0.7, 1.8), (24, 70), (0.03, 0.10), 0.9, (0.45, 0.70), 1.0),)


def rain(
    image: np.ndarray,
    rng: np.random.Generator,
    strength: float = 1.0,
    composition: str | None = None,
    kinds: Sequence[Kind] = KINDS,
) -> np.ndarray:
    """HxWx3 float32 sRGB in [0, 1] with rain on HxWx3 float32 sRGB in [0, 1].

    Up to 30 degrees from the vertical, to either side. `strength` multiplies the number of drops, and their brightness
    by its square root: 0 is no rain. `composition` is "additive" (a grey streak added to the sRGB values, as Rain100L's
    and most synthetic sets do), "screen" (x + r (1 - x)) or "physical" (in linear light, a streak lets a part of the
    background through and adds the light of the surroundings); by default it is drawn, with 0.75, 0.125 and 0.125.
    """
    if strength == 0:
        return image.copy()
    chosen = COMPOSITIONS[int(np.searchsorted([0.75, 0.875], rng.random(), side="right"))]
    composition = chosen if composition is None else composition
    if composition not in COMPOSITIONS:
        raise ValueError(f"composition {composition!r}: must be one of {', '.join(COMPOSITIONS)}")
    streaks = rain_streaks(image.shape[0], image.shape[1], rng, strength, kinds)[..., None]
    if composition == "additive":
        return np.clip(image + streaks, 0, 1)
    if composition == "screen":
        return np.clip(image + streaks * (1 - image), 0, 1)
    return _physical(image, streaks)


def rain_streaks(
    height: int, width: int, rng: np.random.Generator, strength: float = 1.0, kinds: Sequence[Kind] = KINDS
) -> np.ndarray:
    """Brightness of the rain alone, HxW float32 in [0, 1]. Periodic in both directions."""
    kind = kinds[int(rng.choice(len(kinds), p=[kind.probability for kind in kinds]))]
    coverage, length, brightness, ceiling = (
        rng.uniform(*limits) for limits in (kind.coverage, kind.length, kind.brightness, kind.ceiling)
    )
    angle = np.deg2rad(rng.uniform(-30, 30))
    thickness = rng.uniform(0.48, 0.72)  # standard deviation across the streak, pixels
    raggedness, wobble = rng.uniform(0, 0.8), rng.uniform(0, 0.5)
    shares = rng.dirichlet((1.0, 3.0, 4.0, 1.5))  # of the layers in the coverage: stubs, then far to near
    noise = np.random.default_rng(rng.integers(2**63))  # generators of their own: the layers' number of draws varies
    frequencies = spectrum_frequencies(height, width)
    spectrum = np.zeros((height, width // 2 + 1), dtype=np.complex64)
    for share, nearness, extent in zip(shares, (1.0, 0.6, 1.0, 1.6), (0.25, 0.6, 1.0, 1.6), strict=True):
        # A stronger rain has more drops in each layer, and the same ones first.
        layer = np.random.default_rng(rng.integers(2**63))
        layer_length = length * extent * layer.uniform(0.85, 1.15)
        layer_thickness = max(thickness * nearness**0.4, 0.45)
        layer_angle = angle + np.deg2rad(layer.normal(0, 1.2))
        drops_per_pixel = coverage * share * strength / (2.5 * layer_thickness * layer_length)
        drops = scattered_drops(height, width, layer, drops_per_pixel, kind.spread)
        drops *= np.float32(brightness * nearness**0.5 * np.sqrt(2 * np.pi) * layer_thickness * layer_length)
        spectrum += np.fft.rfft2(drops) * line_spectrum(frequencies, layer_length, layer_thickness, layer_angle)
    # The threshold removes the faint ripples that a thin line has on a pixel grid.
    field = np.maximum(np.fft.irfft2(spectrum, s=(height, width)) - 0.01, 0) * np.sqrt(strength)
    field *= np.maximum(1 + raggedness * grainy_noise(frequencies, noise, (height, width), 3.0, 1.0, angle), 0)
    field = _shifted_sideways(field, wobble * grainy_noise(frequencies, noise, (height, width), 6.0, 6.0))
    return (ceiling * (1 - np.exp(-field / ceiling))).astype(np.float32)


def _shifted_sideways(field: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """HxW with each pixel taken from `shift` pixels to its right, linearly interpolated, periodic."""
    width = field.shape[1]
    whole = np.floor(shift)
    part = shift - whole
    source = np.arange(width) + whole.astype(np.int64)
    left = np.take_along_axis(field, source % width, axis=1)
    return left * (1 - part) + np.take_along_axis(field, (source + 1) % width, axis=1) * part


def _physical(image: np.ndarray, streaks: np.ndarray) -> np.ndarray:
    background = to_linear(image)
    surroundings = np.percentile(background, 95, axis=(0, 1)).astype(np.float32)  # the sky, or the brightest there is
    surroundings = 0.5 * surroundings + 0.5 * max(float(surroundings.mean()), 0.3)
    opacity = np.minimum(0.8 * streaks, 1)
    return np.clip(to_srgb(background * (1 - opacity) + surroundings * opacity), 0, 1)
