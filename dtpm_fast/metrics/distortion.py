"""Full-reference distortion: PSNR, SSIM, MAE. Pictures are (B, 3, H, W), float64 on 0..255; figures are (B,)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dtpm_fast.errors import UserError

PEAK = 255.0
PSNR_MAX = 100.0  # what equal pictures get: JSON knows no infinity, and a mean has to stay finite
GAUSSIAN_WINDOW, UNIFORM_WINDOW = 11, 7


def luma(rgb: Tensor) -> Tensor:
    """Y of BT.601 in studio range, 16..235, unrounded, (B, 1, H, W): what MATLAB's rgb2ycbcr gives before rounding, and
    what the deraining and desnowing papers measure. Full-range luma gives 1.32 dB less PSNR."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=rgb.dtype, device=rgb.device) / PEAK
    return 16 + torch.einsum("bchw,c->bhw", rgb, weights).unsqueeze(1)


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all pixels and channels of each picture, peak 255, at most 100."""
    found = peak_signal_noise_ratio(image, target, data_range=PEAK, reduction="none", dim=(1, 2, 3))
    return found.clamp(max=PSNR_MAX)


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """SSIM of Wang et al. 2004: Gaussian window 11x11, sigma 1.5, only where the window lies inside the picture, the
    mean over pixels and channels.

    In float32, whose windows PyTorch computes 20 times as fast on a CPU; the figure is the same to 1e-5."""
    check_size(image.shape[-2], image.shape[-1], GAUSSIAN_WINDOW)
    _, everywhere = structural_similarity_index_measure(
        image.float(), target.float(), sigma=1.5, data_range=PEAK, reduction="none", return_full_image=True
    )
    # torchmetrics reflects the border; the paper's authors and the field's scripts leave it out.
    edge = GAUSSIAN_WINDOW // 2
    return everywhere[..., edge:-edge, edge:-edge].double().mean(dim=(1, 2, 3))


def ssim_uniform(image: Tensor, target: Tensor) -> Tensor:
    """SSIM as `skimage.metrics.structural_similarity(..., channel_axis=-1)` computes it by default: a uniform 7x7
    window and sample covariance. torchmetrics has the biased covariance only."""
    check_size(image.shape[-2], image.shape[-1], UNIFORM_WINDOW)
    count = UNIFORM_WINDOW**2
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    mean_x, mean_y = _window_mean(image), _window_mean(target)
    unbiased = count / (count - 1)
    var_x = unbiased * (_window_mean(image * image) - mean_x * mean_x)
    var_y = unbiased * (_window_mean(target * target) - mean_y * mean_y)
    cov = unbiased * (_window_mean(image * target) - mean_x * mean_y)
    upper = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    lower = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return (upper / lower).mean(dim=(1, 2, 3))


def mae(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error on the scale 0..1, as the defocus papers report it."""
    return (image - target).abs().mean(dim=(1, 2, 3)) / PEAK


def check_size(height: int, width: int, window: int = GAUSSIAN_WINDOW) -> None:
    """Raise `UserError` where SSIM's window does not fit."""
    if min(height, width) < window:
        raise UserError(f"a picture of {width}x{height} pixels is smaller than SSIM's window of {window}x{window}")


def _window_mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, UNIFORM_WINDOW, stride=1)
