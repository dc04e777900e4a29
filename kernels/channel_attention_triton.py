"""Triton kernels of channel attention: sums in two fixed stages (no float atomics), and the scaling."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.checks import is_channels_last, layout_of
from dtpm_fast.kernels.dispatch import Options
from dtpm_fast.kernels.tiles import COMPILER, add_partials, programs_per_sample, sum_pixels, tile_offsets


def channel_means(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the pixels of `x`, or of `x · other` (same layout): (B, C) in float64."""
    samples, channels, height, width = x.shape
    pixels = height * width
    options = launch_options(channels)
    programs = programs_per_sample(triton.cdiv(pixels, options["BLOCK_P"]), samples)
    partials = torch.empty((samples, programs, channels), device=x.device, dtype=torch.float32)
    channel_sums_kernel[(programs, samples, triton.cdiv(channels, options["BLOCK_C"]))](
        x, x if other is None else other, partials, pixels, CHANNELS=channels,
        CHANNELS_LAST=is_channels_last(x), PRODUCT=other is not None, **options, **COMPILER,
    )  # fmt: skip
    return add_partials(partials) / pixels


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
