"""Camera shake: the picture averaged, in linear light, over the camera's path while the shutter is open."""

import numpy as np

from dtpm_fast.data.degradations.fields import blur, smooth_field
from dtpm_fast.data.degradations.light import to_linear, to_srgb

REACH = 12  # pixels from the middle that a path may leave, at strength 1
_SAMPLES = 64


def motion_blur(image: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """HxWx3 float32 sRGB in [0, 1] blurred by a random path of 4 to 24 pixels' extent, times `strength`.

    Every third picture has a part that moves on its own, its edge blurred by its own path (alpha matte). Highlights are
    let exceed the sensor's range before the blur, so that they leave bright trails.
    """
    own_motion = rng.random() < 1 / 3
    excess = rng.uniform(0, 1.5)
    extents = rng.uniform(2, REACH, 2)
    paths = [camera_path(rng), camera_path(rng)]
    matte = smooth_field(image.shape[0], image.shape[1], rng, cells=2)[..., None]
    if strength == 0:
        return image.copy()
    light = to_linear(image)
    white = np.minimum(np.minimum(light[..., 0], light[..., 1]), light[..., 2])[..., None]
    light = light * (1 + np.float32(excess) * np.clip((white - 0.9) * 10, 0, 1))
    side = int(np.ceil(REACH * strength))
    camera, own = (path_kernel(path * extent * strength, side) for path, extent in zip(paths, extents, strict=True))
    if not own_motion:
        return to_srgb(blur(light, [camera])[0])
    matte = np.clip((matte - 0.55) * 20 + 0.5, 0, 1)
    moved = blur(np.concatenate([light * matte, matte], axis=2), [own])[0]
    return to_srgb(moved[..., :3] + blur(light, [camera])[0] * (1 - moved[..., 3:]))


def camera_path(rng: np.random.Generator) -> np.ndarray:
    """(64, 2) points (down, right) of a smooth random path, its middle at 0, at most 1 away from it.

    A velocity that turns slowly and is pulled back, with a few sudden jerks (after Boracchi and Foi, "Modeling the
    performance of image restoration from motion blur", 2012)."""
    heading = rng.uniform(0, 2 * np.pi)
    turning = rng.normal(0, rng.uniform(0.0, 0.15), _SAMPLES)
    jerks = np.where(rng.random(_SAMPLES) < rng.uniform(0, 0.05), rng.normal(0, 1.2, _SAMPLES), 0)
    angle = heading + np.cumsum(turning + jerks)
    speed = np.exp(rng.normal(0, 0.2, _SAMPLES).cumsum() * 0.3)
    points = np.cumsum(np.stack([np.sin(angle), np.cos(angle)], axis=1) * speed[:, None], axis=0)
    points -= (points.max(axis=0) + points.min(axis=0)) / 2
    return points / max(float(np.hypot(points[:, 0], points[:, 1]).max()), 1e-9)


def path_kernel(points: np.ndarray, reach: int) -> np.ndarray:
    """(2 reach + 1)² float32 of sum 1: the time spent at each pixel along a path of (down, right) points, in pixels
    from the middle; linear between pixels and between points."""
    step = np.linspace(0, len(points) - 1, 8 * len(points))
    down, right = (np.interp(step, np.arange(len(points)), points[:, axis]) + reach for axis in (0, 1))
    down, right = np.clip(down, 0, 2 * reach), np.clip(right, 0, 2 * reach)
    top, left = np.minimum(down.astype(np.int64), 2 * reach - 1), np.minimum(right.astype(np.int64), 2 * reach - 1)
    below, beside = down - top, right - left
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    np.add.at(kernel, (top, left), (1 - below) * (1 - beside))
    np.add.at(kernel, (top + 1, left), below * (1 - beside))
    np.add.at(kernel, (top, left + 1), (1 - below) * beside)
    np.add.at(kernel, (top + 1, left + 1), below * beside)
    return (kernel / kernel.sum()).astype(np.float32)
