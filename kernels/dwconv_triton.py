"""K2: depth-wise 3×3, SimpleGate and the sums for channel attention in one pass, and their backward in two.

Maps are channels_last. A program walks down a strip of GROUPS · COLUMNS columns, ROWS rows long: every input row is
read once and feeds the three output rows that see it, whose sums stay in registers. A thread holds COLUMNS columns side
by side, so that a neighbour to the left or right is another register and no other load: COLUMNS + 2 loads serve them.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.dispatch import Options
from dtpm_fast.kernels.tiles import COMPILER, FEWEST_PROGRAMS, add_partials, empty_map, sum_pixels


def dwconv_gate_pool_forward(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """`simple_gate(conv3x3(h))` of (B, 2C, H, W), and each strip's sums over its pixels, (B, strips, C) in float32."""
    samples, doubled, height, width = h.shape
    channels = doubled // 2
    grid, options = launch(h, channels, options)
    out = empty_map((samples, channels, height, width), h)
    sums = h.new_empty((samples, grid[0], channels), dtype=torch.float32)
    dwconv_gate_pool_forward_kernel[grid](
        h, weight, bias, out, sums, height, width, CHANNELS=channels, **options, **COMPILER
    )
    return out, sums


def gate_backward(
    grad: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    frozen: bool,
    options: Options,
) -> tuple[torch.Tensor, ...]:
    """Backward of `simple_gate(conv3x3(h))` down to the convolution: its output, computed once more, is not written.

    The gate's gradient is `grad · scale + offset`, with scale and offset (B, C) in float32. Returns the gradients of
    the convolution's output (B, 2C, H, W), and unless they are frozen of its weight (2C, 1, 3, 3) and of its bias (both
    in float64).
    """
    samples, doubled, height, width = h.shape
    grid, options = launch(h, doubled // 2, options)
    out = empty_map(h.shape, h)
    sums = h.new_empty((samples, 0 if frozen else grid[0], 10, doubled), dtype=torch.float32)
    gate_backward_kernel[grid](
        grad, scale, offset, h, weight, bias, out, sums, height, width, CHANNELS=doubled // 2, FROZEN=frozen,
        **options, **COMPILER,
    )  # fmt: skip
    if frozen:
        return (out,)
    total = add_partials(sums).sum(0)
    return out, total[:9].t().contiguous().reshape(weight.shape), total[9].clone()


def dwconv_backward(grad: torch.Tensor, weight: torch.Tensor, options: Options) -> torch.Tensor:
    """Gradient of the depth-wise convolution's input: the transposed convolution of its output's."""
    _, channels, height, width = grad.shape
    out = empty_map(grad.shape, grad)
    grid, options = launch(grad, channels, options)
    dwconv_backward_kernel[grid](grad, weight, out, height, width, CHANNELS=channels, **options, **COMPILER)
    return out


def launch(h: torch.Tensor, channels: int, options: Options) -> tuple[tuple[int, int, int], Options]:
    """The grid (strips, samples, blocks of channels) for a map, and the options: the table's, but with shorter strips
    where a small map would leave most of a GPU idle, because a strip's rows follow each other."""
    samples, _, height, width = h.shape
    across = triton.cdiv(width, options["GROUPS"] * options["COLUMNS"])
    blocks = triton.cdiv(channels, options["BLOCK_C"])
    rows = options["ROWS"]
    while rows >= 4 and triton.cdiv(height, rows) * across * samples * blocks < FEWEST_PROGRAMS:
        rows //= 2
    return (triton.cdiv(height, rows) * across, samples, blocks), options | {"ROWS": rows}


@triton.jit
def _strip(width, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """First row, first column of each group (GROUPS, 1), and channels (1, C) of this program."""
    across = tl.cdiv(width, GROUPS * COLUMNS)
    first = (tl.program_id(0) // across) * ROWS
    column = ((tl.program_id(0) % across) * GROUPS + tl.arange(0, GROUPS)[:, None]) * COLUMNS
    return first, column, tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]


@triton.jit
def _load_taps(weight_ptr, c, in_c):
    """The nine weights of each channel, row by row, (1, C) each."""
    taps = ()
    for tap in tl.static_range(9):
        taps = taps + (tl.load(weight_ptr + c * 9 + tap, mask=in_c, other=0.0).to(tl.float32),)  # noqa: RUF005
    return taps


@triton.jit
def _load_row(ptr, row, height, column, width, stride, c, in_c, COUNT: tl.constexpr):
    """One row of a map at COUNT columns from `column` on, zero outside of the map; a tuple of (GROUPS, C)."""
    rows = row + tl.zeros_like(c)  # the interpreter takes no scalar condition into a mask
    inside = (rows >= 0) & (rows < height) & in_c
    at = ptr + row.to(tl.int64) * width * stride + column * stride + c
    values = ()
    for i in tl.static_range(COUNT):
        mask = inside & (column + i >= 0) & (column + i < width)
        values = values + (tl.load(at + i * stride, mask=mask, other=0.0).to(tl.float32),)  # noqa: RUF005
    return values


@triton.jit
def _zeros(GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, COUNT: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((GROUPS, BLOCK_C), tl.float32),)  # noqa: RUF005
    return values


@triton.jit
def _convolve(row, taps, above, here, COUNT: tl.constexpr):
    """Feeds a row of COUNT + 2 values to the three output rows that see it. Returns the one above, now complete, and
    the sums so far of the other two, which are `above` and `here` at the next row."""
    done, next_above, next_here = (), (), ()
    for i in tl.static_range(COUNT):
        left, centre, right = row[i], row[i + 1], row[i + 2]
        done = done + (above[i] + taps[6] * left + taps[7] * centre + taps[8] * right,)  # noqa: RUF005
        next_above = next_above + (here[i] + taps[3] * left + taps[4] * centre + taps[5] * right,)  # noqa: RUF005
        next_here = next_here + (taps[0] * left + taps[1] * centre + taps[2] * right,)  # noqa: RUF005
    return done, next_above, next_here


@triton.jit
def _add_products(sums, grad, h_above, h_here, h_below, COUNT: tl.constexpr):
    """Adds to the nine sums of weight[i, j]'s gradient, grad(y, x) · h(y + i - 1, x + j - 1), what COUNT gradients of a
    row give with the rows of h above, at and below it, COUNT + 2 values each."""
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = sums
    for i in tl.static_range(COUNT):
        s0 += grad[i] * h_above[i]
        s1 += grad[i] * h_above[i + 1]
        s2 += grad[i] * h_above[i + 2]
        s3 += grad[i] * h_here[i]
        s4 += grad[i] * h_here[i + 1]
        s5 += grad[i] * h_here[i + 2]
        s6 += grad[i] * h_below[i]
        s7 += grad[i] * h_below[i + 1]
        s8 += grad[i] * h_below[i + 2]
    return s0, s1, s2, s3, s4, s5, s6, s7, s8


@triton.jit
def _store_row(ptr, values, row, column, width, stride, c, mask, COUNT: tl.constexpr):
    at = ptr + row.to(tl.int64) * width * stride + column * stride + c
    for i in tl.static_range(COUNT):
        tl.store(at + i * stride, values[i].to(ptr.dtype.element_ty), mask=mask & (column + i < width))


@triton.jit
def dwconv_gate_pool_forward_kernel(
    h_ptr, weight_ptr, bias_ptr, out_ptr, sums_ptr, height, width, CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first, column, c = _strip(width, GROUPS, COLUMNS, BLOCK_C, ROWS)
    in_c = c < CHANNELS
    sample = tl.program_id(1).to(tl.int64)
    h_ptr += sample * height * width * 2 * CHANNELS
    out_ptr += sample * height * width * CHANNELS
    taps_a = _load_taps(weight_ptr, c, in_c)
    taps_b = _load_taps(weight_ptr + 9 * CHANNELS, c, in_c)
    bias_a = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    bias_b = tl.load(bias_ptr + CHANNELS + c, mask=in_c, other=0.0).to(tl.float32)
    above_a = _zeros(GROUPS, BLOCK_C, COLUMNS)
    here_a = _zeros(GROUPS, BLOCK_C, COLUMNS)
    above_b = _zeros(GROUPS, BLOCK_C, COLUMNS)
    here_b = _zeros(GROUPS, BLOCK_C, COLUMNS)
    sums = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    for step in range(ROWS + 2):
        row = first + step - 1
        values = _load_row(h_ptr, row, height, column - 1, width, 2 * CHANNELS, c, in_c, COLUMNS + 2)
        a, above_a, here_a = _convolve(values, taps_a, above_a, here_a, COLUMNS)
        values = _load_row(h_ptr + CHANNELS, row, height, column - 1, width, 2 * CHANNELS, c, in_c, COLUMNS + 2)
        b, above_b, here_b = _convolve(values, taps_b, above_b, here_b, COLUMNS)
        rows = row + tl.zeros_like(c)
        done = (rows > first) & (rows <= height) & in_c
        gated = ()
        for i in tl.static_range(COLUMNS):
            gated = gated + ((a[i] + bias_a) * (b[i] + bias_b),)  # noqa: RUF005
            sums += tl.where(done & (column + i < width), gated[i], 0.0)
        _store_row(out_ptr, gated, row - 1, column, width, CHANNELS, c, done, COLUMNS)
    at = (sample * tl.num_programs(0) + tl.program_id(0)) * CHANNELS + c
    tl.store(sums_ptr + at, sum_pixels(sums), mask=in_c)


@triton.jit
def gate_backward_kernel(
    grad_ptr, scale_ptr, offset_ptr, h_ptr, weight_ptr, bias_ptr, out_ptr, sums_ptr, height, width,
    CHANNELS: tl.constexpr, FROZEN: tl.constexpr,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Row by row: h's row, the convolution's output one row above it, and that one's gradient: each half's is the
    gate's times the other half. Three rows of h are at hand then, which is what the weight's gradient takes."""
    first, column, c = _strip(width, GROUPS, COLUMNS, BLOCK_C, ROWS)
    in_c = c < CHANNELS
    sample = tl.program_id(1).to(tl.int64)
    h_ptr += sample * height * width * 2 * CHANNELS
    out_ptr += sample * height * width * 2 * CHANNELS
    grad_ptr += sample * height * width * CHANNELS
    taps_a = _load_taps(weight_ptr, c, in_c)
    taps_b = _load_taps(weight_ptr + 9 * CHANNELS, c, in_c)
    bias_a = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    bias_b = tl.load(bias_ptr + CHANNELS + c, mask=in_c, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * CHANNELS + c, mask=in_c, other=0.0)
    offset = tl.load(offset_ptr + sample * CHANNELS + c, mask=in_c, other=0.0)
    above_a = _zeros(GROUPS, BLOCK_C, COLUMNS)
    here_a = _zeros(GROUPS, BLOCK_C, COLUMNS)
    above_b = _zeros(GROUPS, BLOCK_C, COLUMNS)
    here_b = _zeros(GROUPS, BLOCK_C, COLUMNS)
    h_above_a = _zeros(GROUPS, BLOCK_C, COLUMNS + 2)
    h_here_a = _zeros(GROUPS, BLOCK_C, COLUMNS + 2)
    h_above_b = _zeros(GROUPS, BLOCK_C, COLUMNS + 2)
    h_here_b = _zeros(GROUPS, BLOCK_C, COLUMNS + 2)
    sums_a = _zeros(GROUPS, BLOCK_C, 9)
    sums_b = _zeros(GROUPS, BLOCK_C, 9)
    bias_sum_a = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    bias_sum_b = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    for step in range(ROWS + 2):
        row = first + step - 1
        h_a = _load_row(h_ptr, row, height, column - 1, width, 2 * CHANNELS, c, in_c, COLUMNS + 2)
        a, above_a, here_a = _convolve(h_a, taps_a, above_a, here_a, COLUMNS)
        h_b = _load_row(h_ptr + CHANNELS, row, height, column - 1, width, 2 * CHANNELS, c, in_c, COLUMNS + 2)
        b, above_b, here_b = _convolve(h_b, taps_b, above_b, here_b, COLUMNS)

        rows = row + tl.zeros_like(c)
        done = (rows > first) & (rows <= height) & in_c
        grad = _load_row(grad_ptr, row - 1, height, column, width, CHANNELS, c, done, COLUMNS)
        grad_a, grad_b = (), ()
        for i in tl.static_range(COLUMNS):
            gated = tl.where(done & (column + i < width), grad[i] * scale + offset, 0.0)
            grad_a = grad_a + (gated * (b[i] + bias_b),)  # noqa: RUF005
            grad_b = grad_b + (gated * (a[i] + bias_a),)  # noqa: RUF005
            if not FROZEN:
                bias_sum_a += grad_a[i]
                bias_sum_b += grad_b[i]
        _store_row(out_ptr, grad_a, row - 1, column, width, 2 * CHANNELS, c, done, COLUMNS)
        _store_row(out_ptr + CHANNELS, grad_b, row - 1, column, width, 2 * CHANNELS, c, done, COLUMNS)
        if not FROZEN:
            sums_a = _add_products(sums_a, grad_a, h_above_a, h_here_a, h_a, COLUMNS)
            sums_b = _add_products(sums_b, grad_b, h_above_b, h_here_b, h_b, COLUMNS)
            h_above_a, h_here_a = h_here_a, h_a
            h_above_b, h_here_b = h_here_b, h_b
    if not FROZEN:
        sums_ptr += (sample * tl.num_programs(0) + tl.program_id(0)) * 20 * CHANNELS + c
        for i in tl.static_range(9):
            tl.store(sums_ptr + 2 * i * CHANNELS, sum_pixels(sums_a[i]), mask=in_c)
            tl.store(sums_ptr + (2 * i + 1) * CHANNELS, sum_pixels(sums_b[i]), mask=in_c)
        tl.store(sums_ptr + 18 * CHANNELS, sum_pixels(bias_sum_a), mask=in_c)
        tl.store(sums_ptr + 19 * CHANNELS, sum_pixels(bias_sum_b), mask=in_c)


@triton.jit
def dwconv_backward_kernel(
    grad_ptr, weight_ptr, out_ptr, height, width, CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first, column, c = _strip(width, GROUPS, COLUMNS, BLOCK_C, ROWS)
    in_c = c < CHANNELS
    start = tl.program_id(1).to(tl.int64) * height * width * CHANNELS
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = _load_taps(weight_ptr, c, in_c)
    flipped = (w8, w7, w6, w5, w4, w3, w2, w1, w0)
    above = _zeros(GROUPS, BLOCK_C, COLUMNS)
    here = _zeros(GROUPS, BLOCK_C, COLUMNS)
    for step in range(ROWS + 2):
        row = first + step - 1
        values = _load_row(grad_ptr + start, row, height, column - 1, width, CHANNELS, c, in_c, COLUMNS + 2)
        out, above, here = _convolve(values, flipped, above, here, COLUMNS)
        rows = row + tl.zeros_like(c)
        done = (rows > first) & (rows <= height) & in_c
        _store_row(out_ptr + start, out, row - 1, column, width, CHANNELS, c, done, COLUMNS)
