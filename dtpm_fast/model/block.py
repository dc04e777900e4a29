"""The block of figure 4. Shapes: x is (B, C, H, W); shift and scale are (B, C)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpm_fast.kernels.block import block_weights, denoising_block


class Block(nn.Module):
    """NAFNet's block with AdaLN for LayerNorm (figure 4); the subclasses say where shift and scale come from.

    Parameter names are NAFNet's. beta and gamma start at zero: a fresh block is the identity. `use_kernels` switches
    between the lines below and the fused kernels, which compute the same from the same parameters.
    """

    fused = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def body(self, x: Tensor, shift1: Tensor, scale1: Tensor, shift2: Tensor, scale2: Tensor) -> Tensor:
        if self.fused:
            return denoising_block(x, shift1, scale1, shift2, scale2, block_weights(self))
        h = adaln(x, shift1, scale1)
        h = simple_gate(self.conv2(self.conv1(h)))
        h = h * self.sca(h)  # channel attention: CA(x) = x * (W mean_HW(x) + b)
        y = x + self.beta * self.conv3(h)

        h = adaln(y, shift2, scale2)
        h = simple_gate(self.conv4(h))
        return y + self.gamma * self.conv5(h)


class DenoisingBlock(Block):
    """Figure 4: shift and scale are a linear map of the conditioning vector e (B, embedding)."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__(channels)
        self.modulation = nn.Linear(embedding, 4 * channels)
        nn.init.zeros_(self.modulation.weight)  # a fresh AdaLN is a plain layer norm
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.body(x, *self.modulation(e).chunk(4, dim=1))


class NAFBlock(Block):
    """NAFNet's own block: its affine LayerNorm is AdaLN with a constant shift (bias) and scale (weight - 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm1 = Affine(channels)
        self.norm2 = Affine(channels)

    def forward(self, x: Tensor) -> Tensor:
        shifts_and_scales = (self.norm1.bias, self.norm1.weight - 1, self.norm2.bias, self.norm2.weight - 1)
        return self.body(x, *(p.expand(x.shape[0], -1) for p in shifts_and_scales))


class Affine(nn.Module):
    """The weight and bias of a LayerNorm over channels, under NAFNet's names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))


def use_kernels(model: nn.Module, on: bool = True) -> None:
    """Let every block of the model run through `dtpm_fast.kernels`: Triton on CUDA tensors, its oracle on others."""
    for module in model.modules():
        if isinstance(module, Block):
            module.fused = on


def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN(x) = LN_C(x) * (1 + scale) + shift, LN over the channels of each pixel.

    `layer_norm` over the permuted view keeps its statistics in float32 for 16-bit inputs, and is the fast form for
    tensors in channels_last.
    """
    normal = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
    return normal * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


def simple_gate(x: Tensor) -> Tensor:
    """SimpleGate(a (+) b) = a * b, the halves of the channels."""
    a, b = x.chunk(2, dim=1)
    return a * b
