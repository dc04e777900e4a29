"""The Conditional Guidance Adapter, equation 5, one after every denoising block."""

import torch.nn.functional as F
from torch import Tensor, nn

from dtpm_fast.model.block import simple_gate
from dtpm_fast.model.unet import zero_init


class CGAdapter(nn.Module):
    """CG-Adapter(f, y_eps) = f + M_out( M_in(f) + Conv(y_eps) )                                       (eq. 5)

    M_in: C -> rC and M_out: rC -> C are 1x1 convolutions, linear by default, so that the adapter merges into one CxC
    matrix and a bias map; "gated" puts a SimpleGate between them. M_out starts at zero: a fresh adapter is the
    identity.
    """

    def __init__(self, channels: int, ratio: float, kind: str) -> None:
        super().__init__()
        inner = max(1, round(ratio * channels))
        self.gated = kind == "gated"
        self.m_in = nn.Conv2d(channels, 2 * inner if self.gated else inner, 1)
        self.conv = nn.Conv2d(3, self.m_in.out_channels, 3, padding=1)
        self.m_out = nn.Conv2d(inner, channels, 1)
        zero_init(self.m_out)

    def forward(self, f: Tensor, y_eps: Tensor) -> Tensor:
        """f: (B, C, h, w); y_eps: (B, 3, h, w) in [-1, 1], already of the level's size (`resize_to_level`)."""
        h = self.m_in(f) + self.conv(y_eps)
        return f + self.m_out(simple_gate(h) if self.gated else h)


def resize_to_level(y_eps: Tensor, level: int) -> Tensor:
    """y_eps (B, 3, H, W) at 1 / 2^level of its size: bilinear, antialiased."""
    if level == 0:
        return y_eps
    height, width = (side >> level for side in y_eps.shape[-2:])
    if height > width == 1:  # the result of PyTorch's antialiased resize is wrong for such a map, on the CPU
        return resize_to_level(y_eps.mT, level).mT
    return F.interpolate(y_eps, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
