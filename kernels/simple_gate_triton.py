"""Triton kernels of SimpleGate. In both layouts a map is rows of two halves: of C (a pixel) or of C·H·W (a sample)."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.checks import is_channels_last, layout_of
from dtpm_fast.kernels.dispatch import Options
from dtpm_fast.kernels.tiles import COMPILER


def simple_gate_forward(x: torch.Tensor) -> torch.Tensor:
    """`simple_gate` of a dense map on a GPU, in its layout."""
    samples, channels, height, width = x.shape
    out = torch.empty(
        (samples, channels // 2, height, width), dtype=x.dtype, device=x.device, memory_format=layout_of(x)
    )
    grid, rows, half, options = _plan(x)
    simple_gate_forward_kernel[grid](x, out, rows, half, **options, **COMPILER)
    return out


def simple_gate_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient of `simple_gate`'s input; `grad` is in `x`'s layout."""
    grad_x = torch.empty_like(x, memory_format=layout_of(x))
    grid, rows, half, options = _plan(x)
    simple_gate_backward_kernel[grid](grad, x, grad_x, rows, half, **options, **COMPILER)
    return grad_x


def _plan(x: torch.Tensor) -> tuple[tuple[int], int, int, Options]:
    samples, channels, height, width = x.shape
    rows, half = samples, channels // 2 * height * width
    if is_channels_last(x):
        rows, half = samples * height * width, channels // 2
    options = launch_options(half)
    grid = (triton.cdiv(rows, options["BLOCK_ROWS"]) * triton.cdiv(half, options["BLOCK_HALF"]),)
    return grid, rows, half, options


def launch_options(half: int) -> Options:
    """Rows of `half` elements and how much of each make a tile of 2,048, eight a thread as in channel attention."""
    block_half = min(triton.next_power_of_2(half), 1024)
    return {"BLOCK_ROWS": 2048 // block_half, "BLOCK_HALF": block_half, "num_warps": 8}


@triton.jit
def _tile(rows, half, BLOCK_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Row numbers (64-bit), places in the half, and which of them exist."""
    across = tl.cdiv(half, BLOCK_HALF)
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    place = (tl.program_id(0) % across) * BLOCK_HALF + tl.arange(0, BLOCK_HALF)[None, :]
    return row, place, (row < rows) & (place < half)


@triton.jit
def simple_gate_forward_kernel(x_ptr, out_ptr, rows, half, BLOCK_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    row, place, mask = _tile(rows, half, BLOCK_ROWS, BLOCK_HALF)
    at = row * 2 * half + place
    a = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * half + place, (a * b).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def simple_gate_backward_kernel(
    grad_ptr, x_ptr, grad_x_ptr, rows, half, BLOCK_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    row, place, mask = _tile(rows, half, BLOCK_ROWS, BLOCK_HALF)
    at = row * 2 * half + place
    a = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + half, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * half + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + at, (grad * b).to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_x_ptr + at + half, (grad * a).to(grad_x_ptr.dtype.element_ty), mask=mask)
