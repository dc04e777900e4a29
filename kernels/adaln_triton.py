"""Triton kernels of AdaLN. A program holds whole rows of channels: one read, exact two-pass statistics."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.checks import is_channels_last, layout_of
from dtpm_fast.kernels.dispatch import Options
from dtpm_fast.kernels.tiles import COMPILER, add_partials, programs_per_sample, sum_pixels, tile_offsets


def adaln_forward(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """`adaln` of a dense map on a GPU, in its layout."""
    samples, channels, height, width = x.shape
    out = torch.empty_like(x, memory_format=layout_of(x))
    options = launch_options(channels, is_channels_last(x))
    grid = (triton.cdiv(height * width, options["BLOCK_P"]), samples)
    adaln_forward_kernel[grid](
        x, shift, scale, out, shift.stride(0), scale.stride(0), height * width, eps,
        CHANNELS=channels, CHANNELS_LAST=is_channels_last(x), **options, **COMPILER,
    )  # fmt: skip
    return out


def adaln_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (its dtype; plus `residual`), shift and scale; `grad` and `residual` are laid out as `x`.
    Bit-equal in every run."""
    samples, channels, height, width = x.shape
    grad_x = torch.empty_like(x, memory_format=layout_of(x))
    options = launch_options(channels, is_channels_last(x))
    programs = programs_per_sample(triton.cdiv(height * width, options["BLOCK_P"]), samples)
    partials = torch.empty((2, samples, programs, channels), device=x.device, dtype=torch.float32)
    adaln_backward_kernel[(programs, samples)](
        grad, x, x if residual is None else residual, scale, grad_x, partials[0], partials[1],
        scale.stride(0), height * width, eps, CHANNELS=channels, CHANNELS_LAST=is_channels_last(x),
        RESIDUAL=residual is not None, **options, **COMPILER,
    )  # fmt: skip
    return grad_x, add_partials(partials[0]), add_partials(partials[1])


def launch_options(channels: int, channels_last: bool) -> Options:
    """Whole rows of channels, tiles of about 2,048 elements; NCHW wants at least 8 pixels side by side."""
    block_c = triton.next_power_of_2(channels)
    block_p = max(2048 // block_c, 1 if channels_last else 8)
    # 16 elements a thread: the backward holds several tiles in registers.
    return {"BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": min(max(block_c * block_p // 512, 4), 16)}


@triton.jit
def normalise(x, in_channels, CHANNELS: tl.constexpr, eps):
    """(pixels, channels) in float32 to zero mean and unit variance over the channels, and 1/std, (pixels, 1). `eps` is
    one number, or (pixels,)."""
    mean = tl.sum(x, axis=1) / CHANNELS
    centred = tl.where(in_channels, x - mean[:, None], 0.0)
    # The first mean is off by its own rounding, which a large offset of the inputs makes visible.
    centred = tl.where(in_channels, centred - (tl.sum(centred, axis=1) / CHANNELS)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / CHANNELS + eps)[:, None]
    return centred * rstd, rstd


@triton.jit
def eps_of_pixels(first, BLOCK_P: tl.constexpr, pixels, eps):
    """`normalise`'s eps (P,) where pixels are summed: 1 behind the last of them, of which an eps of 0 makes 0 · inf."""
    return tl.where(first + tl.arange(0, BLOCK_P) < pixels, eps, 1.0)


@triton.jit
def normalise_backward(grad, normal, rstd, CHANNELS: tl.constexpr):
    """Gradient of `normalise`'s input from that of its output; `grad` is zero in the padded channels."""
    mean = tl.sum(grad, axis=1)[:, None] / CHANNELS
    slope = tl.sum(grad * normal, axis=1)[:, None] / CHANNELS
    return rstd * (grad - mean - normal * slope)


@triton.jit
def load_modulation(shift_ptr, scale_ptr, shift_stride, scale_stride, c, in_c):
    """This program's sample's shift and 1 + scale, (1, C)."""
    sample = tl.program_id(1).to(tl.int64)
    shift = tl.load(shift_ptr + sample * shift_stride + c, mask=in_c, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * scale_stride + c, mask=in_c, other=0.0).to(tl.float32)
    return shift, 1.0 + scale


@triton.jit
def load_row(ptr, c, in_c):
    """A vector over the channels as (1, C) in float32."""
    return tl.load(ptr + c, mask=in_c, other=0.0).to(tl.float32)


@triton.jit
def adaln_forward_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr, shift_stride, scale_stride, pixels, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)[None, :]
    in_c = c < CHANNELS
    shift, scale = load_modulation(shift_ptr, scale_ptr, shift_stride, scale_stride, c, in_c)
    first = tl.program_id(0) * BLOCK_P
    mask = (first + tl.arange(0, BLOCK_P)[:, None] < pixels) & in_c
    start, at = tile_offsets(tl.program_id(1), first, BLOCK_P, c, pixels, CHANNELS, CHANNELS_LAST)
    x = tl.load(x_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    normal, _ = normalise(x, in_c, CHANNELS, eps)
    tl.store(out_ptr + start + at, (normal * scale + shift).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def adaln_backward_kernel(
    grad_ptr, x_ptr, residual_ptr, scale_ptr, grad_x_ptr, grad_shift_ptr, grad_scale_ptr, scale_stride, pixels, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A program walks over tiles of one sample and writes its own sums of shift's and scale's gradients."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :]
    in_c = c < CHANNELS
    scale = tl.load(scale_ptr + sample * scale_stride + c, mask=in_c, other=0.0).to(tl.float32)
    grad_shift = tl.zeros((1, BLOCK_C), tl.float32)
    grad_scale = tl.zeros((1, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(pixels, BLOCK_P), programs):
        first = tile * BLOCK_P
        mask = (first + tl.arange(0, BLOCK_P)[:, None] < pixels) & in_c
        start, at = tile_offsets(sample, first, BLOCK_P, c, pixels, CHANNELS, CHANNELS_LAST)
        x = tl.load(x_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        normal, rstd = normalise(x, in_c, CHANNELS, eps_of_pixels(first, BLOCK_P, pixels, eps))
        grad_shift += sum_pixels(grad)
        grad_scale += sum_pixels(grad * normal)
        grad_x = normalise_backward(grad * (1.0 + scale), normal, rstd, CHANNELS)
        if RESIDUAL:
            grad_x += tl.load(residual_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + start + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    at = (sample * programs + program) * CHANNELS + c
    tl.store(grad_shift_ptr + at, grad_shift, mask=in_c)
    tl.store(grad_scale_ptr + at, grad_scale, mask=in_c)
