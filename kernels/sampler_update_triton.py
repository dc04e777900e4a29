"""The Triton kernel of the sampler's update: every value of a picture by itself."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.dispatch import Options
from dtpm_fast.kernels.tiles import COMPILER

LAUNCH_OPTIONS: Options = {"BLOCK": 1024, "num_warps": 4}


def launch(
    row: torch.Tensor, x: torch.Tensor, output: torch.Tensor, previous: torch.Tensor, y_eps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next x and x0; all maps channels_last."""
    following, x0 = (torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2))
    sampler_update_kernel[(triton.cdiv(x.numel(), LAUNCH_OPTIONS["BLOCK"]),)](
        row, x, output, previous, y_eps, following, x0, x.numel(), **LAUNCH_OPTIONS, **COMPILER
    )
    return following, x0


@triton.jit
def sampler_update_kernel(
    row_ptr, x_ptr, output_ptr, previous_ptr, y_eps_ptr, following_ptr, x0_ptr, size, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x0_x, x0_f = tl.load(row_ptr + 1).to(tl.float32), tl.load(row_ptr + 2).to(tl.float32)
    a, b, c = (
        tl.load(row_ptr + 3).to(tl.float32),
        tl.load(row_ptr + 4).to(tl.float32),
        tl.load(row_ptr + 5).to(tl.float32),
    )
    limit = tl.load(row_ptr + 6).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    output = tl.load(output_ptr + at, mask=mask, other=0.0).to(tl.float32)
    previous = tl.load(previous_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y_eps = tl.load(y_eps_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x0 = x0_x * x + x0_f * output
    x0 = tl.maximum(x0, -limit - y_eps, propagate_nan=tl.PropagateNan.ALL)  # as torch.maximum: NaN stays visible
    x0 = tl.minimum(x0, limit - y_eps, propagate_nan=tl.PropagateNan.ALL)
    tl.store(x0_ptr + at, x0.to(x0_ptr.dtype.element_ty), mask=mask)
    following = a * x + b * x0 + c * previous
    tl.store(following_ptr + at, following.to(following_ptr.dtype.element_ty), mask=mask)
