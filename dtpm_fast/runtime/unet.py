"""The U-Net rewritten for inference: everything that can be folded into its weights is.

Maps are (B, H, W, C) and contiguous: a 1x1 convolution is a matrix product, LN reads whole rows, and the view
(B, C, H, W) of the same memory is channels_last, which the 3x3 convolutions want. Folding happens in float64.

What is folded: beta and gamma into conv3 and conv5, channel attention's vector into conv3's matrix, "1 +" into the
scale, conv5 into the merged adapter, PixelShuffle's order into the rows of the convolution before it.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpm_fast.errors import UserError
from dtpm_fast.model.adapter import CGAdapter
from dtpm_fast.model.block import Block
from dtpm_fast.model.unet import UNet

# Called with a block's number and its gated map (B, h, w, C); returns its mean (B, 1, C) for channel attention.
Mean = Callable[[int, Tensor], Tensor]


def own_mean(_: int, gated: Tensor) -> Tensor:
    """The mean over the pixels of the map itself, as channel attention is defined; summed in float32 or better."""
    if gated.dtype == torch.bfloat16 and gated.device.type == "cpu":
        # As a product it is four times as fast as PyTorch's sum, and oneDNN accumulates in float32 as well.
        flat = _flat(gated)
        return flat.new_ones(flat.shape[0], 1, flat.shape[1]) @ flat / flat.shape[1]
    return gated.mean(dim=(1, 2), dtype=torch.promote_types(gated.dtype, torch.float32)).to(gated.dtype)[:, None]


class MergedAdapter:
    """CG-Adapter(f, y_eps) = M f + Conv(y_eps), M = I + W_out W_in, with one 3x3 convolution from y_eps to C channels.

    Equation 5 multiplied out, exact because the adapter is linear. Raises `UserError` for a gated one.
    """

    def __init__(self, adapter: CGAdapter) -> None:
        if adapter.gated:
            raise UserError(
                "gated adapters are not linear and cannot be merged: use the reference backend "
                "(--backend reference), or train with adapter_kind=linear"
            )
        m_in, m_out = (_double(layer.weight).flatten(1) for layer in (adapter.m_in, adapter.m_out))
        self.m_in, self.m_out, self.conv = m_in, m_out, _double(adapter.conv.weight)
        self.matrix = torch.eye(m_out.shape[0], dtype=torch.float64, device=m_out.device) + m_out @ m_in
        self.inside, self.bias = _double(adapter.m_in.bias) + _double(adapter.conv.bias), _double(adapter.m_out.bias)

    def bias_map(self, b5: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution from y_eps to all that is added to M y + M W5 g; b5 (C,): conv5's bias."""
        kernel = torch.einsum("oi,ichw->ochw", self.m_out, self.conv)
        return kernel, self.m_out @ self.inside + self.bias + self.matrix @ b5

    def condition(self, missing: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution from y_eps to what is added inside of the adapter, where W_in multiplies
        the block's output without `missing` (C,): its rC channels, and zeros to fill them up to `rank`."""
        weight, bias = self.conv, self.inside + self.m_in @ missing
        return F.pad(weight, (0,) * 7 + (rank - len(weight),)), F.pad(bias, (0, rank - len(bias)))


class FoldedBlock(nn.Module):
    """Figure 4's block, and the linear half of the adapter behind it."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor
    w4: Tensor
    b4: Tensor
    w5: Tensor
    b5: Tensor
    w_sca: Tensor
    b_sca: Tensor
    matrix: Tensor | None

    def __init__(self, block: Block, adapter: MergedAdapter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.channels = block.conv3.in_channels
        beta, gamma = _double(block.beta).flatten(), _double(block.gamma).flatten()
        w3, w5 = (_double(layer.weight).flatten(1) for layer in (block.conv3, block.conv5))
        w3, b3 = beta[:, None] * w3, beta * _double(block.conv3.bias)
        w5, b5 = gamma[:, None] * w5, gamma * _double(block.conv5.bias)
        if adapter is not None:
            w5 = adapter.matrix @ w5  # and M b5 is a part of the bias map
        convolutions = {"1": block.conv1, "2": block.conv2, "4": block.conv4, "_sca": _sca(block)}
        folded = {"w3": w3, "b3": b3, "w5": w5, "b5": b5}
        for name, layer in convolutions.items():
            folded["w" + name], folded["b" + name] = _double(layer.weight), _double(layer.bias)
        folded["w_sca"] = folded["w_sca"].flatten(1)
        for name, value in folded.items():
            self.register_buffer(name, value.to(dtype).contiguous())
        self.register_buffer("matrix", None if adapter is None else adapter.matrix.to(dtype).contiguous())
        self.residual_bias = b5  # float64, for the bias map; no part of the state

    def forward(
        self, x: Tensor, rows: tuple[Tensor, Tensor, Tensor, Tensor], bias_map: Tensor | None, number: int, mean: Mean
    ) -> Tensor:
        """x, bias_map: (B, h, w, C); rows: shift1, 1 + scale1, shift2, 1 + scale2, each (B or 1, C)."""
        shift1, scale1, shift2, scale2 = rows
        c = self.channels
        gated = _gate(self._depthwise(_pointwise(_adaln(x, shift1, scale1), self.w1, self.b1)), c)
        attention = F.linear(mean(number, gated), self.w_sca, self.b_sca)  # (B, 1, C)
        y = _add_product(x + self.b3, gated, self.w3 * attention)
        gated = _gate(_pointwise(_adaln(y, shift2, scale2), self.w4, self.b4), c)
        if bias_map is None or self.matrix is None:
            return _add_product(y + self.b5, gated, self.w5[None])
        adapted = torch.baddbmm(_flat(bias_map), _flat(y), _per_sample(self.matrix[None], y)).view(y.shape)
        return _add_product(adapted, gated, self.w5[None])

    def _depthwise(self, x: Tensor) -> Tensor:
        x = F.conv2d(x.permute(0, 3, 1, 2), self.w2, self.b2, padding=1, groups=2 * self.channels)
        return x.permute(0, 2, 3, 1).contiguous()  # a copy only where the convolution chose another layout


class KernelBlock(nn.Module):
    """The same block through `dtpm_fast.kernels.denoising_block`, for GPUs. Channel attention takes its own mean. With
    an adapter gamma is folded into conv5, and the adapter's last bias is added there, before the adapter.

    The kernels are imported here and not above: they need Triton, which takes a second and is not on every platform.
    """

    def __init__(self, block: Block, adapter: MergedAdapter | None, dtype: torch.dtype) -> None:
        from dtpm_fast.kernels import Adapter, BlockWeights, MergedConv5, block_weights, denoising_block, merge_conv5

        super().__init__()
        self.call, self.weights, self.adapter, self.merged = denoising_block, BlockWeights, Adapter, MergedConv5
        parameters = block_weights(block)
        self.rank = 0
        if adapter is not None:
            w5, b5, gamma = _double(block.conv5.weight), _double(block.conv5.bias), _double(block.gamma)
            w5, b5 = gamma.view(-1, 1, 1, 1) * w5, gamma.flatten() * b5 + adapter.bias
            parameters = parameters._replace(conv5_weight=w5, conv5_bias=b5, gamma=torch.ones_like(gamma))
            self.rank = len(adapter.m_in)
            self.residual_bias = -adapter.bias  # float64: the condition takes back what W_in sees of it
            merged = merge_conv5(w5, b5, parameters.gamma, adapter.m_in, adapter.m_out)
            for name, value in {"m_in": adapter.m_in, "m_out": adapter.m_out, **merged._asdict()}.items():
                self.register_buffer(f"adapter_{name}", value.to(dtype).contiguous())
        for name, value in zip(BlockWeights._fields, parameters, strict=True):
            self.register_buffer(name, value.detach().to(dtype).contiguous())

    def forward(
        self, x: Tensor, rows: tuple[Tensor, Tensor, Tensor, Tensor], condition: Tensor | None, number: int, mean: Mean
    ) -> Tensor:
        """rows: shift1, scale1, shift2, scale2, as `KernelUNet.rows_of` made them; condition: (B, h, w, rC)."""
        if mean is not own_mean:
            raise ValueError("the fused kernels take channel attention's mean over the map that they are given")
        shift1, scale1, shift2, scale2 = (row.expand(x.shape[0], -1) for row in rows)
        weights = self.weights(*(getattr(self, name) for name in self.weights._fields))
        adapter = None
        if condition is not None:
            names = ("m_in", "m_out", *self.merged._fields)
            m_in, m_out, *merged = (getattr(self, f"adapter_{name}") for name in names)
            adapter = self.adapter(m_in, m_out, condition.permute(0, 3, 1, 2), self.merged(*merged))
        h = self.call(x.permute(0, 3, 1, 2), shift1, scale1, shift2, scale2, weights, adapter)
        return h.permute(0, 2, 3, 1).contiguous()


class PictureMap(nn.Module):
    """A 3x3 convolution of a picture (B, 3, H, W) to a map (B, H, W, C), and its bias or another map added."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", _channels_last(weight, dtype))
        self.register_buffer("bias", bias.detach().to(dtype))

    def forward(self, picture: Tensor, instead: Tensor | None = None) -> Tensor:
        """`instead`: a map (B, H, W, C) that is added in the bias's place."""
        bias = self.bias if instead is None else None
        h = F.conv2d(picture.to(self.dtype), self.weight, bias, padding=1).permute(0, 2, 3, 1)
        return h.contiguous() if instead is None else h + instead


class StackedPictureMaps(nn.Module):
    """Several 3x3 convolutions of one picture to C channels each, as one product of its neighbourhoods: each would be a
    launch or more, too small to fill a GPU."""

    INPUTS = 32  # of the product: 27 values and a one for the bias, filled up to what a GPU multiplies at a time

    weight: Tensor

    def __init__(self, convolutions: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        """(weight (C, 3, 3, 3), bias (C,)) of each."""
        super().__init__()
        rows = [
            torch.cat([_double(weight).flatten(1), _double(bias)[:, None]], dim=1).T for weight, bias in convolutions
        ]
        weight = F.pad(torch.stack(rows), (0, 0, 0, self.INPUTS - rows[0].shape[0]))
        self.register_buffer("weight", weight.to(dtype).contiguous())  # (N, 32, C)

    def forward(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W) to the maps (N, B, H, W, C), each contiguous."""
        b, _, height, width = picture.shape
        values = F.unfold(picture.to(self.weight.dtype), 3, padding=1)  # (B, 27, H W), by (channel, row, column)
        ones = values.new_ones(()).expand(b, self.INPUTS - values.shape[1], values.shape[2])
        rows = torch.cat([values, ones], dim=1).transpose(1, 2).reshape(1, -1, self.INPUTS)
        maps = rows.expand(len(self.weight), -1, -1) @ self.weight
        return maps.view(len(self.weight), b, height, width, -1)


class FoldedUNet(nn.Module):
    """All of a U-Net behind its intro convolution, modulation rows and bias maps given."""

    ending_weight: Tensor
    ending_bias: Tensor

    def __init__(
        self,
        unet: UNet,
        adapters: dict[str, MergedAdapter],
        dtype: torch.dtype,
        make_block: Callable[[Block, MergedAdapter | None, torch.dtype], nn.Module] = FoldedBlock,
    ) -> None:
        super().__init__()
        self.dtype, self.positions = dtype, unet.positions()
        self.encoder, self.decoder = (
            [len(list(level.children())) for level in part] for part in (unet.encoders, unet.decoders)
        )
        self.middle = len(unet.middle_blks)
        self.blocks = nn.ModuleList(
            make_block(cast(Block, unet.get_submodule(position)), adapters.get(position), dtype)
            for position in self.positions
        )
        for i, down in enumerate(unet.downs):
            self.register_buffer(f"down{i}_weight", _channels_last(cast(nn.Conv2d, down).weight, dtype))
            self.register_buffer(f"down{i}_bias", _double(cast(nn.Conv2d, down).bias).to(dtype))
        for i, up in enumerate(unet.ups):
            rows = _double(up.get_parameter("0.weight")).flatten(1)
            # PixelShuffle reads channels as (c, dy, dx); here they are (dy, dx, c).
            rows = rows.view(-1, 2, 2, rows.shape[1]).permute(1, 2, 0, 3).reshape(rows.shape)
            self.register_buffer(f"up{i}", rows.to(dtype).contiguous())
        self.register_buffer("ending_weight", _channels_last(unet.ending.weight, dtype))
        self.register_buffer("ending_bias", _double(unet.ending.bias).to(dtype))

    def rows_of(self, rows: Tensor) -> Tensor:
        """(B or 1, sum of 4C), every block's shift1, 1 + scale1, shift2, 1 + scale2, as the blocks read them."""
        return rows.to(self.dtype)

    def forward(self, h: Tensor, rows: Tensor, bias_maps: dict[str, Tensor], mean: Mean = own_mean) -> Tensor:
        """h: (B, H, W, C), the intro's output; rows: what `rows_of` made of all blocks' modulation; bias_maps:
        (B, h, w, C) by position. Returns (B, 3, H, W)."""
        split = iter(rows.split([c for channels in self.positions.values() for c in 4 * [channels]], dim=1))
        numbered = enumerate(zip(self.positions, self.blocks, strict=True))

        def run(count: int, h: Tensor) -> Tensor:
            for _ in range(count):
                number, (position, block) = next(numbered)
                four = (next(split), next(split), next(split), next(split))
                h = block(h, four, bias_maps.get(position), number, mean)
            return h

        skips = []
        for i, count in enumerate(self.encoder):
            h = run(count, h)
            skips.append(h)
            h = self._down(h, i)
        h = run(self.middle, h)
        for i, count in enumerate(self.decoder):
            h = run(count, self._up(h, i, skips.pop()))
        return self._ending(h)

    def _down(self, h: Tensor, i: int) -> Tensor:
        weight, bias = getattr(self, f"down{i}_weight"), getattr(self, f"down{i}_bias")
        return F.conv2d(h.permute(0, 3, 1, 2), weight, bias, stride=2).permute(0, 2, 3, 1).contiguous()

    def _up(self, h: Tensor, i: int, skip: Tensor) -> Tensor:
        b, height, width, c = skip.shape
        h = F.linear(h, getattr(self, f"up{i}")).view(b, height // 2, width // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return (skip.view(b, height // 2, 2, width // 2, 2, c) + h).view(skip.shape)

    def _ending(self, h: Tensor) -> Tensor:
        return F.conv2d(h.permute(0, 3, 1, 2), self.ending_weight, self.ending_bias, padding=1)


class KernelUNet(FoldedUNet):
    """`FoldedUNet` with the fused kernels for blocks. These add the 1 to scale themselves, and read float32: in 16 bits
    a small scale would lose what it has."""

    one: Tensor

    def __init__(self, unet: UNet, adapters: dict[str, MergedAdapter], dtype: torch.dtype) -> None:
        super().__init__(unet, adapters, dtype, KernelBlock)
        like = self.ending_bias.new_zeros(1, dtype=torch.promote_types(dtype, torch.float32))
        one = torch.cat([like.new_tensor([0, 1, 0, 1]).repeat_interleave(c) for c in self.positions.values()])
        self.register_buffer("one", one[None], persistent=False)

    def rows_of(self, rows: Tensor) -> Tensor:
        """In a launch or two for all blocks of a step."""
        return rows.to(self.one.dtype) - self.one


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution of (B, H, W, C), weight (C', C) or (C', C, 1, 1)."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # oneDNN's convolution is the faster bf16 product for long maps of few channels, its linear the faster float32.
        return F.conv2d(x.permute(0, 3, 1, 2), weight.view(*weight.shape[:2], 1, 1), bias).permute(0, 2, 3, 1)
    return F.linear(x, weight.flatten(1), bias)


def _add_product(fresh: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """fresh + W x per pixel, one W (1 or B, C', C) per sample, written over `fresh`: half the traffic of a new map."""
    return _flat(fresh).baddbmm_(_flat(x), _per_sample(weight, x)).view(fresh.shape)


def _flat(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, x.shape[-1])


def _per_sample(weight: Tensor, x: Tensor) -> Tensor:
    return weight.expand(x.shape[0], -1, -1).mT


def _adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * scale + shift; "1 +" is in scale. One modulation for the whole batch is LN's own affine."""
    channels = x.shape[-1:]
    if shift.shape[0] == 1:
        return F.layer_norm(x, channels, scale[0], shift[0], eps=1e-6)
    return torch.addcmul(shift[:, None, None], F.layer_norm(x, channels, eps=1e-6), scale[:, None, None])


def _sca(block: Block) -> nn.Conv2d:
    return cast(nn.Conv2d, block.sca[1])


def _gate(x: Tensor, channels: int) -> Tensor:
    return x[..., :channels] * x[..., channels:]


def _channels_last(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)


def _double(parameter: Tensor | None) -> Tensor:
    assert parameter is not None  # every convolution here has a bias
    return parameter.detach().double()
