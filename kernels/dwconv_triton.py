"""K2: depth-wise 3×3, SimpleGate and the sums for channel attention in one pass, and their backward. channels_last.

A program walks down a strip of BLOCK_W columns, ROWS rows long: every input row is read once (at three shifts, two of
them from the cache) and feeds the three output rows that see it, whose sums stay in registers.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.dispatch import Options
from dtpm_fast.kernels.tiles import COMPILER, add_partials, empty_map, sum_pixels


def dwconv_gate_pool_forward(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """`simple_gate(conv3x3(h))` of (B, 2C, H, W), and its mean over the pixels, (B, C) in float64."""
    samples, doubled, height, width = h.shape
    channels = doubled // 2
    grid = _grid(h, channels, options)
    out = empty_map((samples, channels, height, width), h)
    sums = h.new_empty((samples, grid[0], channels), dtype=torch.float32)
    dwconv_gate_pool_kernel[grid](h, weight, bias, out, sums, height, width, CHANNELS=channels, **options, **COMPILER)
    return out, add_partials(sums) / (height * width)


def gate_backward(
    grad: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """Gradient of the depth-wise convolution's output, whose gate gets `grad · scale + offset`; those are (B, C)."""
    _, doubled, height, width = h.shape
    out = torch.empty_like(h)
    gate_backward_kernel[_grid(h, doubled // 2, options)](
        grad, scale, offset, h, weight, bias, out, height, width, CHANNELS=doubled // 2, **options, **COMPILER
    )
    return out


def dwconv_backward(
    grad: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the depth-wise convolution's input (its dtype), weight (2C, 1, 3, 3) and bias (float64)."""
    samples, doubled, height, width = h.shape
    grid = _grid(h, doubled, options)
    grad_h = torch.empty_like(h)
    sums = h.new_empty((samples, grid[0], 10, doubled), dtype=torch.float32)
    dwconv_backward_kernel[grid](grad, h, weight, grad_h, sums, height, width, CHANNELS=doubled, **options, **COMPILER)
    total = add_partials(sums).sum(0)
    return grad_h, total[:9].t().reshape(weight.shape), total[9].clone()


def _grid(h: torch.Tensor, channels: int, options: Options) -> tuple[int, int, int]:
    samples, _, height, width = h.shape
    strips = triton.cdiv(height, options["ROWS"]) * triton.cdiv(width, options["BLOCK_W"])
    return strips, samples, triton.cdiv(channels, options["BLOCK_C"])


@triton.jit
def _load_tap(weight_ptr, c, in_c, tap: tl.constexpr, FLIP: tl.constexpr):
    """One of the nine weights of each channel, (1, C); counted from the end for the transposed convolution."""
    at = weight_ptr + c * 9 + (8 - tap if FLIP else tap)
    return tl.load(at, mask=in_c, other=0.0).to(tl.float32)


@triton.jit
def _load_taps(weight_ptr, c, in_c, FLIP: tl.constexpr):
    """All nine, row by row."""
    w0 = _load_tap(weight_ptr, c, in_c, 0, FLIP)
    w1 = _load_tap(weight_ptr, c, in_c, 1, FLIP)
    w2 = _load_tap(weight_ptr, c, in_c, 2, FLIP)
    w3 = _load_tap(weight_ptr, c, in_c, 3, FLIP)
    w4 = _load_tap(weight_ptr, c, in_c, 4, FLIP)
    w5 = _load_tap(weight_ptr, c, in_c, 5, FLIP)
    w6 = _load_tap(weight_ptr, c, in_c, 6, FLIP)
    w7 = _load_tap(weight_ptr, c, in_c, 7, FLIP)
    w8 = _load_tap(weight_ptr, c, in_c, 8, FLIP)
    return w0, w1, w2, w3, w4, w5, w6, w7, w8


@triton.jit
def _load_shifted(ptr, row, height, column, width, stride, c, in_c):
    """One row of a map at the columns to the left, in place and to the right; zero outside of the map."""
    rows = row + tl.zeros_like(c)  # the interpreter takes no scalar condition into a mask
    inside = (rows >= 0) & (rows < height) & in_c
    at = ptr + row.to(tl.int64) * width * stride + column * stride + c
    left = tl.load(at - stride, mask=inside & (column >= 1) & (column <= width), other=0.0).to(tl.float32)
    centre = tl.load(at, mask=inside & (column < width), other=0.0).to(tl.float32)
    right = tl.load(at + stride, mask=inside & (column < width - 1), other=0.0).to(tl.float32)
    return left, centre, right


@triton.jit
def _strip(width, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """First row, columns (W, 1), and channels (1, C) of this program."""
    across = tl.cdiv(width, BLOCK_W)
    first = (tl.program_id(0) // across) * ROWS
    column = (tl.program_id(0) % across) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    return first, column, tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]


@triton.jit
def dwconv_gate_pool_kernel(
    h_ptr, weight_ptr, bias_ptr, out_ptr, sums_ptr, height, width,
    CHANNELS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first, column, c = _strip(width, BLOCK_W, BLOCK_C, ROWS)
    in_c = c < CHANNELS
    sample = tl.program_id(1).to(tl.int64)
    h_ptr += sample * height * width * 2 * CHANNELS
    out_ptr += sample * height * width * CHANNELS
    wa = _load_taps(weight_ptr, c, in_c, False)
    wb = _load_taps(weight_ptr + 9 * CHANNELS, c, in_c, False)
    bias_a = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    bias_b = tl.load(bias_ptr + CHANNELS + c, mask=in_c, other=0.0).to(tl.float32)
    # Sums of the output rows above and at the input row that comes next.
    above_a = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    here_a = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    above_b = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    here_b = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for step in range(ROWS + 2):
        row = first + step - 1
        left, centre, right = _load_shifted(h_ptr, row, height, column, width, 2 * CHANNELS, c, in_c)
        a = above_a + wa[6] * left + wa[7] * centre + wa[8] * right + bias_a
        above_a = here_a + wa[3] * left + wa[4] * centre + wa[5] * right
        here_a = wa[0] * left + wa[1] * centre + wa[2] * right
        left, centre, right = _load_shifted(h_ptr + CHANNELS, row, height, column, width, 2 * CHANNELS, c, in_c)
        b = above_b + wb[6] * left + wb[7] * centre + wb[8] * right + bias_b
        above_b = here_b + wb[3] * left + wb[4] * centre + wb[5] * right
        here_b = wb[0] * left + wb[1] * centre + wb[2] * right
        rows = row + tl.zeros_like(c)
        done = (rows > first) & (rows <= height) & (column < width) & in_c
        gated = tl.where(done, a * b, 0.0)
        sums += gated
        at = (row - 1).to(tl.int64) * width * CHANNELS + column * CHANNELS + c
        tl.store(out_ptr + at, gated.to(out_ptr.dtype.element_ty), mask=done)
    at = (sample * tl.num_programs(0) + tl.program_id(0)) * CHANNELS + c
    tl.store(sums_ptr + at, sum_pixels(sums), mask=in_c)


@triton.jit
def gate_backward_kernel(
    grad_ptr, scale_ptr, offset_ptr, h_ptr, weight_ptr, bias_ptr, out_ptr, height, width,
    CHANNELS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The convolution's output is computed once more; each half's gradient is the gate's times the other half."""
    first, column, c = _strip(width, BLOCK_W, BLOCK_C, ROWS)
    in_c = c < CHANNELS
    sample = tl.program_id(1).to(tl.int64)
    h_ptr += sample * height * width * 2 * CHANNELS
    out_ptr += sample * height * width * 2 * CHANNELS
    grad_ptr += sample * height * width * CHANNELS
    wa = _load_taps(weight_ptr, c, in_c, False)
    wb = _load_taps(weight_ptr + 9 * CHANNELS, c, in_c, False)
    bias_a = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    bias_b = tl.load(bias_ptr + CHANNELS + c, mask=in_c, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * CHANNELS + c, mask=in_c, other=0.0)
    offset = tl.load(offset_ptr + sample * CHANNELS + c, mask=in_c, other=0.0)
    above_a = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    here_a = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    above_b = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    here_b = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for step in range(ROWS + 2):
        row = first + step - 1
        left, centre, right = _load_shifted(h_ptr, row, height, column, width, 2 * CHANNELS, c, in_c)
        a = above_a + wa[6] * left + wa[7] * centre + wa[8] * right + bias_a
        above_a = here_a + wa[3] * left + wa[4] * centre + wa[5] * right
        here_a = wa[0] * left + wa[1] * centre + wa[2] * right
        left, centre, right = _load_shifted(h_ptr + CHANNELS, row, height, column, width, 2 * CHANNELS, c, in_c)
        b = above_b + wb[6] * left + wb[7] * centre + wb[8] * right + bias_b
        above_b = here_b + wb[3] * left + wb[4] * centre + wb[5] * right
        here_b = wb[0] * left + wb[1] * centre + wb[2] * right
        rows = row + tl.zeros_like(c)
        done = (rows > first) & (rows <= height) & (column < width) & in_c
        at = (row - 1).to(tl.int64) * width * CHANNELS + column * CHANNELS
        grad = tl.load(grad_ptr + at + c, mask=done, other=0.0).to(tl.float32) * scale + offset
        tl.store(out_ptr + 2 * at + c, (grad * b).to(out_ptr.dtype.element_ty), mask=done)
        tl.store(out_ptr + 2 * at + CHANNELS + c, (grad * a).to(out_ptr.dtype.element_ty), mask=done)


@triton.jit
def dwconv_backward_kernel(
    grad_ptr, h_ptr, weight_ptr, grad_h_ptr, sums_ptr, height, width,
    CHANNELS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Transposed convolution of the gradient; weight[i, j]'s gradient sums h(y, x) · grad(y - i + 1, x - j + 1)."""
    first, column, c = _strip(width, BLOCK_W, BLOCK_C, ROWS)
    in_c = c < CHANNELS
    sample = tl.program_id(1).to(tl.int64)
    start = sample * height * width * CHANNELS
    grad_ptr += start
    h_ptr += start
    grad_h_ptr += start
    w = _load_taps(weight_ptr, c, in_c, True)
    own = (column < width) & in_c
    zero = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    above, here, h_above, h_here = zero, zero, zero, zero
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    for step in range(ROWS + 2):
        row = first + step - 1
        left, centre, right = _load_shifted(grad_ptr, row, height, column, width, CHANNELS, c, in_c)
        # This program's own pixels of h in the row below; those above and beside it are kept from the steps before.
        rows = row + tl.zeros_like(c)
        below = own & (rows + 1 < first + ROWS) & (rows + 1 < height)
        at = (row + 1).to(tl.int64) * width * CHANNELS + column * CHANNELS + c
        h_below = tl.load(h_ptr + at, mask=below, other=0.0).to(tl.float32)
        s0 += h_above * right
        s1 += h_above * centre
        s2 += h_above * left
        s3 += h_here * right
        s4 += h_here * centre
        s5 += h_here * left
        s6 += h_below * right
        s7 += h_below * centre
        s8 += h_below * left
        s9 += tl.where(own & (rows >= first) & (rows < first + ROWS), centre, 0.0)
        done = own & (rows > first) & (rows <= height)
        result = above + w[6] * left + w[7] * centre + w[8] * right
        at = (row - 1).to(tl.int64) * width * CHANNELS + column * CHANNELS + c
        tl.store(grad_h_ptr + at, result.to(grad_h_ptr.dtype.element_ty), mask=done)
        above = here + w[3] * left + w[4] * centre + w[5] * right
        here = w[0] * left + w[1] * centre + w[2] * right
        h_above = h_here
        h_here = h_below
    sums_ptr += (sample * tl.num_programs(0) + tl.program_id(0)) * 10 * CHANNELS
    tl.store(sums_ptr + c, sum_pixels(s0), mask=in_c)
    tl.store(sums_ptr + CHANNELS + c, sum_pixels(s1), mask=in_c)
    tl.store(sums_ptr + 2 * CHANNELS + c, sum_pixels(s2), mask=in_c)
    tl.store(sums_ptr + 3 * CHANNELS + c, sum_pixels(s3), mask=in_c)
    tl.store(sums_ptr + 4 * CHANNELS + c, sum_pixels(s4), mask=in_c)
    tl.store(sums_ptr + 5 * CHANNELS + c, sum_pixels(s5), mask=in_c)
    tl.store(sums_ptr + 6 * CHANNELS + c, sum_pixels(s6), mask=in_c)
    tl.store(sums_ptr + 7 * CHANNELS + c, sum_pixels(s7), mask=in_c)
    tl.store(sums_ptr + 8 * CHANNELS + c, sum_pixels(s8), mask=in_c)
    tl.store(sums_ptr + 9 * CHANNELS + c, sum_pixels(s9), mask=in_c)
