"""Defocus: each point spreads over a circle of confusion, of the lens opening's shape, the larger the less in focus."""

import numpy as np

from dtpm_fast.data.degradations.fields import blur, smooth_field
from dtpm_fast.data.degradations.light import to_linear, to_srgb

REACH = 9  # pixels: the largest radius of the circle of confusion, at strength 1
_LEVELS = 5


def defocus(image: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """HxWx3 float32 sRGB in [0, 1] with a blur, in linear light, whose radius follows a random depth: up to 9 pixels
    times `strength`. The opening is a disc or a polygon of 5 to 8 blades.

    Radii between the five levels that are computed are interpolated.
    """
    blades = int(rng.choice([0, 0, 5, 6, 7, 8]))  # 0 is a disc
    turn = rng.uniform(0, 2 * np.pi)
    largest = rng.uniform(2.5, REACH) * strength
    radius = np.float32(largest) * confusion(image.shape[0], image.shape[1], rng)
    if strength == 0:
        return image.copy()
    light = to_linear(image)
    side = int(np.ceil(largest)) + 1
    radii = np.linspace(0, largest, _LEVELS)
    levels = [light, *blur(light, [opening_kernel(each, side, blades, turn) for each in radii[1:]])]
    place = np.clip(radius / np.float32(largest) * (_LEVELS - 1), 0, _LEVELS - 1)
    result = np.zeros_like(light)
    for level, blurred in enumerate(levels):
        result += blurred * np.maximum(1 - np.abs(place - level), 0)[..., None]
    return to_srgb(result)


def confusion(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """HxW float32 in [0, 1]: the circle of confusion's radius as a part of the largest one.

    Depth is a smooth field with, in every second picture, a step (an object before its background); the radius grows
    with the distance from the plane in focus."""
    depth = smooth_field(height, width, rng, cells=2)
    has_step, near, focus = rng.random() < 0.5, rng.uniform(0.3, 1), rng.uniform(0, 1)
    shape = smooth_field(height, width, rng, cells=3)
    # The radii on both sides are blended, not the depths: a step in depth does not pass through the plane in focus.
    radius = np.abs(depth - focus)
    if has_step:
        matte = np.clip((shape - 0.5) * 12 + 0.5, 0, 1)
        radius = radius * (1 - matte) + np.abs(depth - focus + near) * matte
    return np.minimum(radius / (0.7 * max(focus, 1 - focus)), 1).astype(np.float32)


def opening_kernel(radius: float, reach: int, blades: int, turn: float) -> np.ndarray:
    """(2 reach + 1)² float32 of sum 1: a disc (`blades` 0) or a regular polygon within `radius` pixels, turned by
    `turn` radians, its edge antialiased over 4x4 points a pixel."""
    fine = 4
    offset = (np.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    down, right = np.meshgrid(offset, offset, indexing="ij")
    away = np.hypot(down, right)
    if blades:
        # To the side of the polygon: the distance along the normal of the sector's side.
        sector = np.pi / blades
        toward = (np.arctan2(down, right) + turn) % (2 * sector) - sector
        away = away * np.cos(toward) / np.cos(sector)
    inside = (away <= max(radius, 0.5 / fine * 1.5)).astype(np.float64)
    kernel = inside.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).sum(axis=(1, 3))
    return (kernel / kernel.sum()).astype(np.float32)
