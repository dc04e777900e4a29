"""Triton kernels of channel attention: sums in two fixed stages (no float atomics), the attention, and the scaling."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.checks import is_channels_last, layout_of
from dtpm_fast.kernels.dispatch import Options
from dtpm_fast.kernels.tiles import COMPILER, add_partials, programs_per_sample, sum_pixels, tile_offsets

# Programs whose sums `attention_kernel` adds up itself. Those of more are added up before it, once, and not in each of
# its own programs.
MOST_PROGRAMS = 256


def channel_means(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the pixels of `x`, or of `x · other` (same layout): (B, C) in float64."""
    return add_partials(channel_sums(x, other)) / (x.shape[2] * x.shape[3])


def channel_sums(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """The programs' sums over the pixels of `x`, or of `x · other` (same layout): (B, programs, C) in float32."""
    samples, channels, height, width = x.shape
    pixels = height * width
    options = launch_options(channels)
    programs = programs_per_sample(triton.cdiv(pixels, options["BLOCK_P"]), samples)
    partials = torch.empty((samples, programs, channels), device=x.device, dtype=torch.float32)
    channel_sums_kernel[(programs, samples, triton.cdiv(channels, options["BLOCK_C"]))](
        x, x if other is None else other, partials, pixels, CHANNELS=channels,
        CHANNELS_LAST=is_channels_last(x), PRODUCT=other is not None, **options, **COMPILER,
    )  # fmt: skip
    return partials


def mean_and_attention(
    sums: torch.Tensor, pixels: int, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the programs' sums over so many pixels, (B, programs, C): the means (B, C) in float64, and the attention
    `W · mean + b`, computed in float64, (B, C) in float32. One launch for small maps, two for large ones."""
    samples, programs, channels = sums.shape
    if programs > MOST_PROGRAMS:
        sums, programs = add_partials(sums), 1
    mean = sums.new_empty((samples, channels), dtype=torch.float64)
    attention = sums.new_empty((samples, channels), dtype=torch.float32)
    options = attention_options(channels)
    attention_kernel[(triton.cdiv(channels, options["BLOCK_N"]), samples)](
        sums, weight, bias, mean, attention, programs, pixels, CHANNELS=channels, **options, **COMPILER
    )
    return mean, attention


def attention_options(channels: int) -> Options:
    """Tiles of 2,048 numbers: of the programs' sums (S by C), and of the weight (N outputs by C inputs)."""
    block_c = min(triton.next_power_of_2(channels), 256)
    return {"BLOCK_C": block_c, "BLOCK_S": 2048 // block_c, "BLOCK_N": 2048 // block_c, "num_warps": 4}


def scale_channels(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    """`x · scale + offset` with scale and offset (B, C) in float32."""
    samples, channels, height, width = x.shape
    pixels = height * width
    out = torch.empty_like(x, memory_format=layout_of(x))
    options = launch_options(channels)
    grid = (triton.cdiv(pixels, options["BLOCK_P"]), samples, triton.cdiv(channels, options["BLOCK_C"]))
    scale_channels_kernel[grid](
        x, scale, scale if offset is None else offset, out, pixels, CHANNELS=channels,
        CHANNELS_LAST=is_channels_last(x), OFFSET=offset is not None, **options, **COMPILER,
    )  # fmt: skip
    return out


def launch_options(channels: int) -> Options:
    """Channels and pixels of a tile of 2,048 elements, eight a thread: at 16, Triton 3.8's ptxas spills on sm_90."""
    block_c = min(triton.next_power_of_2(channels), 64)
    return {"BLOCK_C": block_c, "BLOCK_P": 2048 // block_c, "num_warps": 8}


@triton.jit
def channel_sums_kernel(
    x_ptr, other_ptr, sums_ptr, pixels,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """A program walks over tiles of one sample and writes its own sums; the caller adds them up in one fixed order."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    in_c = c < CHANNELS
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(pixels, BLOCK_P), programs):
        first = tile * BLOCK_P
        mask = (first + tl.arange(0, BLOCK_P)[:, None] < pixels) & in_c
        start, at = tile_offsets(sample, first, BLOCK_P, c, pixels, CHANNELS, CHANNELS_LAST)
        x = tl.load(x_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        if PRODUCT:
            x *= tl.load(other_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        sums += x
    tl.store(sums_ptr + (sample * programs + program) * CHANNELS + c, sum_pixels(sums), mask=in_c)


@triton.jit
def attention_kernel(
    sums_ptr, weight_ptr, bias_ptr, mean_ptr, attention_ptr, programs, pixels,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N of a sample's outputs. Every program takes the means of all channels; the first one writes them."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < CHANNELS
    sample = tl.program_id(1)
    sums_ptr += sample.to(tl.int64) * programs * CHANNELS
    s = tl.arange(0, BLOCK_S)[:, None]
    products = tl.zeros((BLOCK_N, BLOCK_C), tl.float64)
    for first in range(0, CHANNELS, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        in_c = c < CHANNELS
        total = tl.zeros((BLOCK_S, BLOCK_C), tl.float64)
        for start in range(0, programs, BLOCK_S):
            mask = (start + s < programs) & in_c
            total += tl.load(sums_ptr + (start + s) * CHANNELS + c, mask=mask, other=0.0).to(tl.float64)
        mean = tl.sum(total, axis=0)[None, :] / pixels
        if tl.program_id(0) == 0:
            tl.store(mean_ptr + sample * CHANNELS + c, mean, mask=in_c)
        weight = tl.load(weight_ptr + n[:, None] * CHANNELS + c, mask=in_n[:, None] & in_c, other=0.0)
        products += weight.to(tl.float64) * mean
    bias = tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float64)
    attention = tl.sum(products, axis=1) + bias
    tl.store(attention_ptr + sample * CHANNELS + n, attention.to(tl.float32), mask=in_n)


@triton.jit
def scale_channels_kernel(
    x_ptr, scale_ptr, offset_ptr, out_ptr, pixels,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    in_c = c < CHANNELS
    first = tl.program_id(0) * BLOCK_P
    mask = (first + tl.arange(0, BLOCK_P)[:, None] < pixels) & in_c
    start, at = tile_offsets(sample, first, BLOCK_P, c, pixels, CHANNELS, CHANNELS_LAST)
    out = tl.load(x_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    out *= tl.load(scale_ptr + sample * CHANNELS + c, mask=in_c, other=0.0)
    if OFFSET:
        out += tl.load(offset_ptr + sample * CHANNELS + c, mask=in_c, other=0.0)
    tl.store(out_ptr + start + at, out.to(out_ptr.dtype.element_ty), mask=mask)
