"""The denoising block for training on a CPU: four products of a map's pixels with matrices, one depth-wise convolution.

What the block multiplies its maps with goes into the matrices, which are small: the modulation's scale into the 1x1
convolutions behind AdaLN, the attention and beta into the third, gamma into the fifth. So autograd keeps and passes
over fewer maps than the lines of the oracle need. Gradients of all those are sums over a map's pixels inside a product;
tiles of a few rows, a matrix for each, keep such sums short and their rounding that of a sum by pairs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpm_fast.kernels.block_compute import BlockWeights, Modulation

TILE = 16  # pixels of a tile for each channel, at least


def products_train(x: Tensor) -> bool:
    """Whether a block of this input goes this way: on the CPU, with gradients, channels_last and no autocast."""
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
    )


def block_products(x: Tensor, modulation: Modulation, weights: BlockWeights, eps: float) -> Tensor:
    """(B, C, H, W) in channels_last, float32 or float64, to the same. Differentiable in everything."""
    w = weights
    samples, channels, height, width = x.shape
    tiles = height // _rows(height, width, channels)
    shift1, scale1, shift2, scale2 = (v.to(x.dtype)[:, None].expand(-1, tiles, -1).flatten(0, 1) for v in modulation)
    pixels = x.permute(0, 2, 3, 1).reshape(samples * tiles, -1, channels)

    h = _adaln_conv1x1(pixels, shift1, scale1, w.conv1_weight, w.conv1_bias, eps)
    h = h.view(samples, height, width, 2 * channels).permute(0, 3, 1, 2)
    h = F.conv2d(h, w.conv2_weight, w.conv2_bias, padding=1, groups=2 * channels)
    g = _Gate.apply(h.permute(0, 2, 3, 1).reshape(samples * tiles, -1, 2 * channels))
    mean = g.mean(dim=1).view(samples, tiles, channels).mean(dim=1)
    attention = F.linear(mean, _matrix(w.sca_weight), w.sca_bias)
    conv3 = w.beta.view(-1, 1) * _matrix(w.conv3_weight) * attention[:, None]
    conv3 = conv3[:, None].expand(-1, tiles, -1, -1).flatten(0, 1)
    y = torch.baddbmm(pixels + w.beta.flatten() * w.conv3_bias, g, conv3.mT)

    h = _adaln_conv1x1(y, shift2, scale2, w.conv4_weight, w.conv4_bias, eps)
    conv5 = (w.gamma.view(-1, 1) * _matrix(w.conv5_weight)).expand(samples * tiles, -1, -1)
    z = torch.baddbmm(y + w.gamma.flatten() * w.conv5_bias, _Gate.apply(h), conv5.mT)
    return z.view(samples, height, width, channels).permute(0, 3, 1, 2)


def _rows(height: int, width: int, channels: int) -> int:
    """Rows of a tile: the smallest divisor of the height with which a tile's matrices are small beside its pixels."""
    return next((rows for rows in range(1, height) if height % rows == 0 and rows * width >= TILE * channels), height)


def _adaln_conv1x1(pixels: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """W (LN(x) (1 + scale) + shift) + b = (W (1 + scale)) LN(x) + (W shift + b), for (tiles, pixels, C), (tiles, C)."""
    matrix = _matrix(weight)
    normal = F.layer_norm(pixels, pixels.shape[-1:], eps=eps)
    return torch.baddbmm(F.linear(shift, matrix, bias)[:, None], normal, (matrix * (1 + scale[:, None])).mT)


def _matrix(weight: Tensor) -> Tensor:
    """(outputs, inputs) of a 1x1 weight, by a permutation: so its gradient has the strides of one in channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


class _Gate(torch.autograd.Function):
    """SimpleGate whose backward writes both halves of the gradient where they belong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        a, b = x.chunk(2, dim=-1)
        return a * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grads
        a, b = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        first, second = result.chunk(2, dim=-1)
        first.copy_(grad).mul_(b)
        second.copy_(grad).mul_(a)
        return result
