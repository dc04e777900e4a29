"""NIQE, the natural image quality evaluator: how far a picture's statistics lie from those of undistorted photos.

Written from Mittal, Soundararajan and Bovik, "Making a 'completely blind' image quality analyzer", 2013; the numbers in
parentheses are its equations. Lower is better, and no ground truth is needed. The model of undistorted photos is its
authors' and comes as a file.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.metrics.distortion import luma
from dtpm_fast.pretrained import Backbone

PRISTINE = Backbone(
    "NIQE",
    "https://github.com/XPixelGroup/BasicSR/raw/master/basicsr/metrics/niqe_pris_params.npz",
    "2a7c182a",
    "DTPM_NIQE",
)
BLOCK = 96
WINDOW, SIGMA = 7, 7 / 6
SHAPES = torch.arange(0.2, 10.001, 0.001, dtype=torch.float64)  # candidates for alpha, the shape of a distribution
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # horizontal, vertical and both diagonal neighbours


class Niqe:
    """Raises as `Backbone.find` does, and `UserError` for a file of other content."""

    def __init__(self, file: Path | str | None = None, backbone: Backbone = PRISTINE) -> None:
        path = backbone.find(file)
        try:
            with np.load(path, allow_pickle=False) as stored:
                mean, covariance = (torch.from_numpy(stored[f"{name}_pris_param"]).double() for name in ("mu", "cov"))
            self._mean, self._covariance = mean.reshape(36), covariance.reshape(36, 36)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{path}: does not hold NIQE's model ({error})") from error

    def __call__(self, image: Tensor) -> float:
        """The distance (10) of a picture (1, 3, H, W) in [0, 1], on its Y rounded to whole numbers, by blocks of 96x96.

        Raises `UserError` as `check_size` does, and for a flat picture.
        """
        self.check_size(*image.shape[-2:])
        y = luma((image.double().clamp(0, 1) * 255).round()).round()
        rows, columns = y.shape[-2] // BLOCK, y.shape[-1] // BLOCK
        y = y[..., : rows * BLOCK, : columns * BLOCK].cpu()
        fine, coarse = _blocks(_normalised(y), BLOCK), _blocks(_normalised(_half(y)), BLOCK // 2)
        features = torch.cat([_features(fine), _features(coarse)], dim=1)
        whole = features[features.isfinite().all(dim=1)]  # a flat block has no distribution to fit
        if len(whole) < 2:
            raise UserError("NIQE needs two blocks with texture, this picture is flat")
        difference = self._mean - features.nanmean(dim=0)
        pooled = torch.linalg.pinv((self._covariance + whole.T.cov()) / 2)
        return float((difference @ pooled @ difference).clamp_min(0).sqrt())

    @staticmethod
    def check_size(height: int, width: int) -> None:
        """Raise `UserError` for a picture of fewer than two blocks."""
        if (height // BLOCK) * (width // BLOCK) < 2:
            raise UserError(f"NIQE needs two blocks of {BLOCK}x{BLOCK} pixels, got {width}x{height}")


def _normalised(y: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised luminance (1): (y - mu) / (sigma + 1), mu and sigma of a 7x7 Gaussian."""
    axis = torch.arange(WINDOW, dtype=y.dtype) - WINDOW // 2
    line = torch.exp(-(axis**2) / (2 * SIGMA**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (WINDOW // 2,) * 4, mode="replicate"), window)

    mu = mean(y)
    return (y - mu) / ((mean(y * y) - mu * mu).abs().sqrt() + 1)


def _half(y: Tensor) -> Tensor:
    """Half the size by an antialiased bicubic filter, the border mirrored, as MATLAB's imresize does it."""
    edge = 8  # wider than the filter, and even, so that it becomes whole pixels
    mirrored = torch.from_numpy(np.pad(y[0, 0].numpy(), edge, mode="symmetric"))[None, None]
    small = F.interpolate(mirrored, scale_factor=0.5, mode="bicubic", antialias=True)
    return small[..., edge // 2 : -edge // 2, edge // 2 : -edge // 2]


def _blocks(x: Tensor, size: int) -> Tensor:
    """(1, 1, H, W) to (N, size, size)."""
    return F.unfold(x, size, stride=size)[0].T.reshape(-1, size, size)


def _features(blocks: Tensor) -> Tensor:
    """(N, h, w) to (N, 18): the fitted distribution of the coefficients, and of the products of neighbours."""
    alpha, left, right = _fit(blocks)
    found = [alpha, (left + right) / 2]
    for shift in SHIFTS:
        alpha, left, right = _fit(blocks * blocks.roll(shift, dims=(1, 2)))
        mean = (right - left) * torch.exp(torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha))  # (8)
        found += [alpha, mean, left, right]
    return torch.stack(found, dim=1)


def _fit(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape alpha, scales beta_l and beta_r of an asymmetric generalised Gaussian (7) by moment matching, each (N,)."""
    values = blocks.flatten(1)

    def one_sided(part: Tensor) -> Tensor:
        return ((values.square() * part).sum(1) / part.sum(1)).sqrt()

    left, right = one_sided(values < 0), one_sided(values > 0)
    ratio = left / right
    moment = values.abs().mean(1).square() / values.square().mean(1)
    wanted = moment * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    table = torch.exp(2 * torch.lgamma(2 / SHAPES) - torch.lgamma(1 / SHAPES) - torch.lgamma(3 / SHAPES))
    alpha = SHAPES[(table[None] - wanted[:, None]).abs().argmin(dim=1)]
    scale = torch.exp(0.5 * (torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)))
    return alpha, left * scale, right * scale
