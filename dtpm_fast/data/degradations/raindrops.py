"""Raindrops on a window or lens: small wide-angle lenses, out of focus, that show the scene upside down."""

import numpy as np
import torch
from torch.nn import functional

from dtpm_fast.data.degradations.light import to_linear, to_srgb

_DROPS_PER_PIXEL = 60 / 256**2


def raindrops(image: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """HxWx3 float32 sRGB in [0, 1] seen through drops on glass.

    A drop is a rounded, irregular cap of 3 to 24 pixels' radius, a little longer than wide. Inside it the scene appears
    inverted and shrunk (the drop refracts a wide angle into its small area), blurred because the camera is focused on
    what is behind, darker toward one edge and brightened by the sky; its own edge is soft for the same reason.
    `strength` multiplies the number of drops, which is 15 to 105 on 256x256 pixels at 1.
    """
    height, width = image.shape[:2]
    amount = rng.uniform(1 / 4, 7 / 4)
    largest = rng.uniform(6, 24)
    opacity, glow = rng.uniform(0.6, 1), rng.uniform(0, 0.35)
    softness = rng.uniform(0.15, 1.1)  # of the edge, as a part of the radius: how far the glass is out of focus
    shrinking = rng.uniform(2, 5)
    shade = rng.uniform(0.05, 0.4)
    drops = np.random.default_rng(rng.integers(2**63))
    count = int(amount * strength * _DROPS_PER_PIXEL * height * width + rng.random())
    if strength == 0 or count == 0:
        return image.copy()
    cover = np.zeros((height, width), dtype=np.float32)
    rows, columns = np.meshgrid(*(np.arange(size, dtype=np.float32) for size in (height, width)), indexing="ij")
    source_rows, source_columns, brightness = rows.copy(), columns.copy(), np.ones((height, width), dtype=np.float32)
    for _ in range(count):
        drop = _Drop(drops, height, width, largest)
        place = drop.window(height, width, 1 + softness / 2)
        down, right = rows[place] - drop.row, columns[place] - drop.column
        level = drop.level(down, right)
        alpha = np.clip((1 - level) / softness + 0.5, 0, 1).astype(np.float32)
        alpha = opacity * alpha * alpha * (3 - 2 * alpha)
        on_top = alpha > cover[place]
        cover[place] = np.where(on_top, alpha, cover[place])
        # Upside down, and stronger bent toward the edge of the cap.
        bending = -shrinking * (1 + 0.5 * np.minimum(level, 1) ** 2)
        source_rows[place] = np.where(on_top, drop.row + bending * down, source_rows[place])
        source_columns[place] = np.where(on_top, drop.column + bending * right, source_columns[place])
        shading = 1 + shade * (down / drop.radius - 0.5 * np.minimum(level, 1.2) ** 4)
        brightness[place] = np.where(on_top, shading, brightness[place])
    light = to_linear(image)
    seen = _sample(light, source_rows, source_columns, int(np.ceil(shrinking + 6 * softness)))
    # A drop also gathers the light of the sky, from above and outside the picture.
    sky = np.percentile(light, 95, axis=(0, 1)).astype(np.float32)
    seen = np.clip((seen + np.float32(glow) * sky) * np.maximum(brightness, 0.2)[..., None], 0, 1)
    cover = cover[..., None]
    return to_srgb(light * (1 - cover) + seen * cover)


class _Drop:
    """One drop: its middle, radius and outline, the radius as a function of the direction."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, largest: float) -> None:
        self.row, self.column = rng.uniform(0, height), rng.uniform(0, width)
        self.radius = 3 + (largest - 3) * rng.random() ** 2  # small ones are more frequent
        self.stretch = rng.uniform(1.0, 1.4)  # gravity
        # Harmonics of the outline: (order, amplitude, phase), Python's numbers to keep the fields float32.
        sizes, phases = rng.normal(0, 0.12, 3).tolist(), rng.uniform(0, 2 * np.pi, 3).tolist()
        self.harmonics = [
            (order, size / order, phase) for order, size, phase in zip((2, 3, 4), sizes, phases, strict=True)
        ]

    def window(self, height: int, width: int, level: float) -> tuple[slice, slice]:
        """The place of all pixels up to that level."""
        reach = 1.4 * level * self.radius * self.stretch  # the outline is rarely 1.4 times the radius away
        top, left = max(int(self.row - reach), 0), max(int(self.column - reach), 0)
        return slice(top, min(int(self.row + reach) + 1, height)), slice(left, min(int(self.column + reach) + 1, width))

    def level(self, down: np.ndarray, right: np.ndarray) -> np.ndarray:
        """0 at the middle, 1 at the outline."""
        down = down / self.stretch
        direction = np.arctan2(down, right)
        outline = 1 + sum(a * np.cos(k * direction + p) for k, a, p in self.harmonics)
        return np.hypot(down, right) / (self.radius * np.maximum(outline, 0.4))


def _sample(light: np.ndarray, rows: np.ndarray, columns: np.ndarray, blur_side: int) -> np.ndarray:
    """The light at the given places, averaged over a square (what shrinks is averaged, and out of focus), mirrored
    beyond the picture's edges."""
    height, width = light.shape[:2]
    reach = min(blur_side, height - 1, width - 1)
    planes = torch.from_numpy(light.transpose(2, 0, 1).copy())[None]
    padded = functional.pad(planes, (reach, reach, reach, reach), mode="reflect")
    averaged = functional.avg_pool2d(functional.avg_pool2d(padded, (1, 2 * reach + 1), 1), (2 * reach + 1, 1), 1)
    grid = np.stack([columns * 2 / max(width - 1, 1) - 1, rows * 2 / max(height - 1, 1) - 1], axis=-1)
    sampled = functional.grid_sample(
        averaged,
        torch.from_numpy(grid.astype(np.float32))[None],
        padding_mode="reflection",
        align_corners=True,
    )
    return sampled[0].permute(1, 2, 0).numpy()
