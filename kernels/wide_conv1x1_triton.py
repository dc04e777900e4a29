"""A 1×1 convolution of many channels with what stands before and behind it in the block, as one tiled product.

K1 and K3 hold whole rows of channels, which ends at some 128 of them. From there on the block is four products of this
kind: AdaLN → conv1; attention's scale → conv3 → residual; AdaLN → conv4 → gate; conv5 → residual, and the adapter in
the same pass (`MergedConv5`). A program takes BLOCK_P pixels and BLOCK_N outputs, and walks over the input channels in
steps of BLOCK_K. Maps are channels_last. Names: P pixels of a tile, N output channels, K input channels.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.adaln_triton import load_modulation, load_row
from dtpm_fast.kernels.dispatch import Options
from dtpm_fast.kernels.tiles import COMPILER, FEWEST_PROGRAMS, empty_map

SMALLEST_P, SMALLEST_N = 32, 64  # tiles that `launch` makes no smaller


def wide_conv1x1(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    options: Options,
    *,
    adaln: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    attention: torch.Tensor | None = None,
    gate: bool = False,
    residual: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    adapter: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`residual + factor · gate(conv1x1(x'))`, x' being AdaLN(x) with (shift, scale, eps), `attention` · x, or x.

    `attention` is (B, C) in float32; `factor` one value a channel; what is None is left out. `adapter` adds
    matrix · residual + m_out · condition: matrix (C, C), m_out (C, R) and the condition (B, R, H, W).
    """
    samples, channels, height, width = x.shape
    outputs, pixels = weight.shape[0] // (2 if gate else 1), height * width
    out = empty_map((samples, outputs, height, width), x)
    shift, scale, eps = adaln or (x, x, 0.0)  # x stands in for what is not read
    strides = (shift.stride(0), scale.stride(0)) if adaln else (0, 0)
    grid, options = launch(samples, pixels, outputs, options)
    rank = 0 if adapter is None else adapter[2].shape[1]
    given = (attention, residual, factor, *(adapter or (None, None, None)))
    stand_in = (x if tensor is None else tensor for tensor in given)
    wide_conv1x1_kernel[grid](
        x, weight, shift, scale, bias, *stand_in, out, *strides, pixels, eps,
        CHANNELS=channels, OUTPUTS=outputs, ADALN=adaln is not None,
        ATTENTION=attention is not None, GATE=gate, RESIDUAL=residual is not None, FACTOR=factor is not None,
        RANK=rank, **options, **COMPILER,
    )  # fmt: skip
    return out


def launch(samples: int, pixels: int, outputs: int, options: Options) -> tuple[tuple[int, int], Options]:
    """The grid (tiles, samples), and the options: the table's, but with smaller tiles where a small map would leave a
    good part of a GPU idle."""
    p, n, warps = (options[name] for name in ("BLOCK_P", "BLOCK_N", "num_warps"))
    while (tiles := triton.cdiv(pixels, p) * triton.cdiv(outputs, n)) * samples < FEWEST_PROGRAMS * 3 // 4:
        if n > SMALLEST_N:
            n //= 2
        elif p > SMALLEST_P:
            p //= 2
        else:
            break
        warps = max(warps // 2, min(warps, 4))
    return (tiles, samples), options | {"BLOCK_P": p, "BLOCK_N": n, "num_warps": warps}


@triton.jit
def channel_statistics(rows, in_p, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, eps):
    """Mean and 1/std over the channels of every pixel, (P, 1): of BLOCK_K channels at a time, put together as Chan,
    Golub and LeVeque (1979) do, which loses no digits to a large mean."""
    mean = tl.zeros((BLOCK_P, 1), tl.float32)
    squares = tl.zeros((BLOCK_P, 1), tl.float32)
    for first in range(0, CHANNELS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        in_k = k < CHANNELS
        x = tl.load(rows + k, mask=in_p & in_k, other=0.0).to(tl.float32)
        count = tl.minimum(CHANNELS - first, BLOCK_K)
        part = tl.sum(x, axis=1)[:, None] / count
        centred = tl.where(in_k, x - part, 0.0)
        correction = tl.sum(centred, axis=1)[:, None] / count  # of the rounding of a large mean
        centred = tl.where(in_k, centred - correction, 0.0)
        apart = (part - mean) + correction
        weight = count / (first + count)
        mean += apart * weight
        squares += tl.sum(centred * centred, axis=1)[:, None] + apart * apart * (first * weight)
    return mean, tl.rsqrt(squares / CHANNELS + eps)


@triton.jit
def load_columns(ptr, n, k, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Weight rows n (N, 1), columns k (1, K) of (outputs, channels), zero beyond both."""
    return tl.load(ptr + n * CHANNELS + k, mask=(n < OUTPUTS) & (k < CHANNELS), other=0.0)


@triton.jit
def add_product(out, rows, in_p, weight_ptr, n, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr):
    """`out` and the product of pixels' channels, at the pointers `rows` (P, 1), with weight rows n (N) of (outputs,
    channels)."""
    for first in range(0, CHANNELS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(rows + k, mask=in_p & (k < CHANNELS), other=0.0)
        weight = load_columns(weight_ptr, n[:, None], k, OUTPUTS, CHANNELS)
        out = tl.dot(x, tl.trans(weight), out, input_precision="ieee")
    return out


@triton.jit
def wide_conv1x1_kernel(
    x_ptr, weight_ptr, shift_ptr, scale_ptr, bias_ptr, attention_ptr, residual_ptr, factor_ptr, matrix_ptr,
    m_out_ptr, condition_ptr, out_ptr, shift_stride, scale_stride, pixels, eps,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, ADALN: tl.constexpr, ATTENTION: tl.constexpr,
    GATE: tl.constexpr, RESIDUAL: tl.constexpr, FACTOR: tl.constexpr, RANK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs of one tile of pixels follow each other, so that all but the first find it in the cache."""
    columns = tl.cdiv(OUTPUTS, BLOCK_N)
    first_p = (tl.program_id(0) // columns) * BLOCK_P
    first_n = (tl.program_id(0) % columns) * BLOCK_N
    p = tl.arange(0, BLOCK_P)[:, None]
    in_p = first_p + p < pixels
    start = tl.program_id(1).to(tl.int64) * pixels + first_p
    rows = x_ptr + start * CHANNELS + p * CHANNELS
    if ADALN:
        mean, rstd = channel_statistics(rows, in_p, CHANNELS, BLOCK_P, BLOCK_K, eps)
    out = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if GATE:
        b = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    n = first_n + tl.arange(0, BLOCK_N)
    for first in range(0, CHANNELS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        in_k = k < CHANNELS
        x = tl.load(rows + k, mask=in_p & in_k, other=0.0)
        if ADALN:
            shift, scale = load_modulation(shift_ptr, scale_ptr, shift_stride, scale_stride, k, in_k)
            # Zero behind the last channel: in float16 -mean * rstd can be infinite there, and times a weight of 0 NaN.
            x = tl.where(in_k, (x.to(tl.float32) - mean) * rstd * scale + shift, 0.0).to(x.dtype)
        if ATTENTION:
            x = (x.to(tl.float32) * load_row(attention_ptr + tl.program_id(1) * CHANNELS, k, in_k)).to(x.dtype)
        weight = load_columns(weight_ptr, n[:, None], k, OUTPUTS, CHANNELS)
        out = tl.dot(x, tl.trans(weight), out, input_precision="ieee")
        if GATE:
            weight = load_columns(weight_ptr + OUTPUTS * CHANNELS, n[:, None], k, OUTPUTS, CHANNELS)
            b = tl.dot(x, tl.trans(weight), b, input_precision="ieee")
    if RANK > 0:
        rows = residual_ptr + start * OUTPUTS + p * OUTPUTS
        out = add_product(out, rows, in_p, matrix_ptr, n, OUTPUTS, OUTPUTS, BLOCK_K)
        rows = condition_ptr + start * RANK + p * RANK
        out = add_product(out, rows, in_p, m_out_ptr, n, OUTPUTS, RANK, BLOCK_K)
    n = n[None, :]
    in_n = n < OUTPUTS
    out += load_row(bias_ptr, n, in_n)
    if GATE:
        out *= b + load_row(bias_ptr + OUTPUTS, n, in_n)
    if FACTOR:
        out *= load_row(factor_ptr, n, in_n)
    at = p * OUTPUTS + n
    if RESIDUAL:
        out += tl.load(residual_ptr + start * OUTPUTS + at, mask=in_p & in_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + start * OUTPUTS + at, out.to(out_ptr.dtype.element_ty), mask=in_p & in_n)
