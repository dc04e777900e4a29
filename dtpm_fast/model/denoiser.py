"""The denoiser f_theta of equations 4 and 6: the U-Net of figure 3 with its conditioning vector."""

import math

import torch
from torch import Tensor, nn

from dtpm_fast.model.block import DenoisingBlock, simple_gate
from dtpm_fast.model.unet import ApplyBlock, UNet, zero_init


class Denoiser(UNet):
    """f_theta([x_t, condition], code, gamma): (B, 6, H, W) to (B, 3, H, W).

    The conditioning vector of every block is e = SimpleGate-MLP(sinusoid(1000 sqrt(gamma))) + MLP(code).
    """

    def __init__(
        self,
        width: int,
        encoder: tuple[int, ...],
        middle: int,
        decoder: tuple[int, ...],
        embedding: int,
        code_channels: int,
    ) -> None:
        super().__init__(6, width, encoder, middle, decoder, lambda channels: DenoisingBlock(channels, embedding))
        zero_init(self.ending)  # F = 0 at the start: the preconditioned estimate is then that of a Gaussian prior
        self.embedding = embedding
        self.time_mlp = nn.Sequential(nn.Linear(embedding, 4 * embedding), Gate(), nn.Linear(2 * embedding, embedding))
        self.code_mlp = (
            nn.Sequential(nn.Linear(code_channels, 2 * embedding), Gate(), nn.Linear(embedding, embedding))
            if code_channels
            else None
        )

    def condition(self, gamma: Tensor, code: Tensor | None) -> Tensor:
        """e (B, embedding) from gamma (B,) in (0, 1] and the semantic code (B, code_channels)."""
        e = self.time_mlp(sinusoid(1000 * gamma.sqrt(), self.embedding))
        if self.code_mlp is not None:
            if code is None:
                raise ValueError("this denoiser was built for a semantic code and got none")
            e = e + self.code_mlp(code)
        return e

    def forward(self, x: Tensor, gamma: Tensor, code: Tensor | None, after_block: ApplyBlock | None = None) -> Tensor:  # type: ignore[override]
        """x = [x_t, condition]; `after_block` is where stage II puts its adapters."""
        e = self.condition(gamma, code)

        def apply_block(position: str, block: nn.Module, h: Tensor) -> Tensor:
            h = block(h, e)
            return h if after_block is None else after_block(position, block, h)

        return super().forward(x, apply_block)


class Gate(nn.Module):
    """SimpleGate as a layer of an MLP, on (B, 2n) vectors."""

    def forward(self, x: Tensor) -> Tensor:
        return simple_gate(x)


def sinusoid(position: Tensor, length: int) -> Tensor:
    """The transformer's sinusoidal embedding (B, length) of positions (B,)."""
    half = length // 2
    frequencies = torch.exp(
        torch.arange(half, device=position.device, dtype=position.dtype) * (-math.log(10000.0) / half)
    )
    angles = position[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
