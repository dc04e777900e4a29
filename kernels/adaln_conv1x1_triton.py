"""K1: AdaLN and the 1×1 convolution behind it in one pass, and both backward in another. Maps are channels_last.

Names: P pixels of a tile, C input channels, N output channels; every row of channels is held whole.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.adaln_triton import eps_of_pixels, load_modulation, load_row, normalise, normalise_backward
from dtpm_fast.kernels.dispatch import Options
from dtpm_fast.kernels.tiles import COMPILER, add_partials, empty_map, programs_per_sample, sum_pixels


def adaln_conv1x1_forward(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    options: Options,
) -> torch.Tensor:
    """`conv1x1(adaln(x))`: (B, C, H, W) to (B, 2C, H, W)."""
    samples, channels, height, width = x.shape
    outputs, pixels = weight.shape[0], height * width
    out = empty_map((samples, outputs, height, width), x)
    adaln_conv1x1_forward_kernel[(triton.cdiv(pixels, options["BLOCK_P"]), samples)](
        x, shift, scale, weight, bias, out, shift.stride(0), scale.stride(0), pixels, eps,
        CHANNELS=channels, OUTPUTS=outputs, BLOCK_C=block_of(channels),
        **options, **COMPILER,
    )  # fmt: skip
    return out


def adaln_conv1x1_backward(
    grad: torch.Tensor,
    residual: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    frozen: bool,
    options: Options,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x (plus `residual`), shift, scale; unless frozen, of weight (2C, C) and bias. Float64 but x's."""
    samples, channels, height, width = x.shape
    pixels = height * width
    programs = programs_per_sample(triton.cdiv(pixels, options["BLOCK_P"]), samples, total=264)
    grad_x = empty_map(x.shape, x)
    grad_shift = x.new_empty((samples, programs, channels), dtype=torch.float32)
    grad_scale = torch.empty_like(grad_shift)
    summed = 0 if frozen else programs
    grad_bias = x.new_empty((samples, summed, 2 * channels), dtype=torch.float32)
    grad_weight = x.new_empty((samples, summed, 2 * channels, channels), dtype=torch.float32)
    adaln_conv1x1_backward_kernel[(programs, samples)](
        grad, residual, x, shift, scale, weight, grad_x, grad_shift, grad_scale, grad_weight, grad_bias,
        shift.stride(0), scale.stride(0), pixels, eps, CHANNELS=channels, BLOCK_C=block_of(channels), FROZEN=frozen,
        **options, **COMPILER,
    )  # fmt: skip
    found = grad_x, add_partials(grad_shift), add_partials(grad_scale)
    return found if frozen else (*found, add_partials(grad_weight).sum(0), add_partials(grad_bias).sum(0))


def block_of(channels: int) -> int:
    """Channels padded to what `tl.dot` takes."""
    return max(triton.next_power_of_2(channels), 16)


@triton.jit
def load_weight(
    ptr, first, BLOCK_N: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Rows first.. of a 1×1 convolution's weight (outputs, channels), zero beyond both: (N, C)."""
    n = first + tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    return tl.load(ptr + n * CHANNELS + c, mask=(n < OUTPUTS) & (c < CHANNELS), other=0.0)


@triton.jit
def adaln_conv1x1_forward_kernel(
    x_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, out_ptr, shift_stride, scale_stride, pixels, eps,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)[None, :]
    in_c = c < CHANNELS
    shift, scale = load_modulation(shift_ptr, scale_ptr, shift_stride, scale_stride, c, in_c)
    p = tl.arange(0, BLOCK_P)[:, None]
    first = tl.program_id(0) * BLOCK_P
    in_p = first + p < pixels
    start = tl.program_id(1).to(tl.int64) * pixels + first
    x = tl.load(x_ptr + start * CHANNELS + p * CHANNELS + c, mask=in_p & in_c, other=0.0)
    normal, _ = normalise(x.to(tl.float32), in_c, CHANNELS, eps)
    h = (normal * scale + shift).to(x.dtype)
    for n in tl.static_range(0, OUTPUTS, BLOCK_N):
        weight = load_weight(weight_ptr, n, BLOCK_N, OUTPUTS, CHANNELS, BLOCK_C)
        columns = n + tl.arange(0, BLOCK_N)[None, :]
        in_n = columns < OUTPUTS
        out = tl.dot(h, tl.trans(weight), input_precision="ieee") + load_row(bias_ptr, columns, in_n)
        tl.store(out_ptr + start * OUTPUTS + p * OUTPUTS + columns, out.to(x.dtype), mask=in_p & in_n)


@triton.jit
def adaln_conv1x1_backward_kernel(
    grad_ptr, residual_ptr, x_ptr, shift_ptr, scale_ptr, weight_ptr,
    grad_x_ptr, grad_shift_ptr, grad_scale_ptr, grad_weight_ptr, grad_bias_ptr,
    shift_stride, scale_stride, pixels, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FROZEN: tl.constexpr,
):  # fmt: skip
    """A program walks over tiles of one sample, keeps its sums in registers and writes them once."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :]
    in_c = c < CHANNELS
    shift, scale = load_modulation(shift_ptr, scale_ptr, shift_stride, scale_stride, c, in_c)
    p = tl.arange(0, BLOCK_P)[:, None]
    grad_shift = tl.zeros((1, BLOCK_C), tl.float32)
    grad_scale = tl.zeros((1, BLOCK_C), tl.float32)
    grad_bias_a = tl.zeros((1, BLOCK_C), tl.float32)
    grad_bias_b = tl.zeros((1, BLOCK_C), tl.float32)
    grad_weight_a = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    grad_weight_b = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(pixels, BLOCK_P), programs):
        mask = (tile * BLOCK_P + p < pixels) & in_c
        start = (sample * pixels + tile * BLOCK_P) * CHANNELS
        at = p * CHANNELS + c
        x = tl.load(x_ptr + start + at, mask=mask, other=0.0)
        grad_a = tl.load(grad_ptr + 2 * start + p * 2 * CHANNELS + c, mask=mask, other=0.0)
        grad_b = tl.load(grad_ptr + 2 * start + p * 2 * CHANNELS + CHANNELS + c, mask=mask, other=0.0)
        eps_p = eps_of_pixels(tile * BLOCK_P, BLOCK_P, pixels, eps)
        normal, rstd = normalise(x.to(tl.float32), in_c, CHANNELS, eps_p)
        if not FROZEN:
            h = (normal * scale + shift).to(x.dtype)
            grad_weight_a = tl.dot(tl.trans(grad_a), h, grad_weight_a, input_precision="ieee")
            grad_weight_b = tl.dot(tl.trans(grad_b), h, grad_weight_b, input_precision="ieee")
            grad_bias_a += sum_pixels(grad_a.to(tl.float32))
            grad_bias_b += sum_pixels(grad_b.to(tl.float32))
        weight_a = load_weight(weight_ptr, 0, BLOCK_C, CHANNELS, CHANNELS, BLOCK_C)
        weight_b = load_weight(weight_ptr + CHANNELS * CHANNELS, 0, BLOCK_C, CHANNELS, CHANNELS, BLOCK_C)
        grad_h = tl.dot(grad_a, weight_a, input_precision="ieee")
        grad_h = tl.dot(grad_b, weight_b, grad_h, input_precision="ieee")
        grad_shift += sum_pixels(grad_h)
        grad_scale += sum_pixels(grad_h * normal)
        grad_x = normalise_backward(grad_h * scale, normal, rstd, CHANNELS)
        grad_x += tl.load(residual_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + start + at, grad_x.to(x.dtype), mask=mask)
    out = sample * programs + program
    tl.store(grad_shift_ptr + out * CHANNELS + c, grad_shift, mask=in_c)
    tl.store(grad_scale_ptr + out * CHANNELS + c, grad_scale, mask=in_c)
    if not FROZEN:
        tl.store(grad_bias_ptr + out * 2 * CHANNELS + c, grad_bias_a, mask=in_c)
        tl.store(grad_bias_ptr + out * 2 * CHANNELS + CHANNELS + c, grad_bias_b, mask=in_c)
        matrix = grad_weight_ptr + out * 2 * CHANNELS * CHANNELS
        store_square(matrix, grad_weight_a, CHANNELS, BLOCK_C)
        store_square(matrix + CHANNELS * CHANNELS, grad_weight_b, CHANNELS, BLOCK_C)


@triton.jit
def store_square(ptr, matrix, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The (channels, channels) corner of a padded (C, C) matrix."""
    row = tl.arange(0, BLOCK_C)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    tl.store(ptr + row * CHANNELS + column, matrix, mask=(row < CHANNELS) & (column < CHANNELS))
