"""Figure 1 of the paper: how the texture of a photo, taken away bit by bit, shows in NIQE."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dtpm_fast.images import read_image
from dtpm_fast.metrics.niqe import Niqe
from dtpm_fast.metrics.protocols import PROTOCOLS
from dtpm_fast.report import Case, Picture
from dtpm_fast.smoothing import rtv_smooth

ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 11))


def remove_texture(photo: np.ndarray, alphas: Sequence[float] = ALPHAS) -> dict[float, np.ndarray]:
    """y_s + alpha (x - y_s), HxWx3 uint8 by alpha, y_s being the photo smoothed by RTV as stage I trains on it; alpha 1
    is the photo itself."""
    x = photo.astype(np.float32) / 255
    y_s = rtv_smooth(x)
    return {alpha: np.rint(np.clip(y_s + alpha * (x - y_s), 0, 1) * 255).astype(np.uint8) for alpha in alphas}


def measure_texture(photos: Sequence[Path], niqe: Niqe) -> tuple[dict[float, dict[str, float]], list[Case]]:
    """Mean "niqe" of the photos by alpha, and "ssim_y" against the photos themselves; and cases for a report.

    Raises `UserError` for a broken photo, or one too small for NIQE.
    """
    sums = {alpha: {"niqe": 0.0, "ssim_y": 0.0} for alpha in ALPHAS}
    cases = []
    for path in tqdm(photos, unit="photo", disable=None):
        photo = read_image(path)
        target = _tensor(photo)
        versions = []
        for alpha, image in remove_texture(photo).items():
            tensor = _tensor(image)
            found = {"niqe": niqe(tensor), "ssim_y": PROTOCOLS["native"].compare(tensor, target)["ssim_y"]}
            versions.append(Picture(f"α = {alpha}", image, found))
            for name, value in found.items():
                sums[alpha][name] += value / len(photos)
        cases.append(Case(path.name, versions[::3]))  # alpha 0.1, 0.4, 0.7 and 1
    return sums, cases


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] / 255
