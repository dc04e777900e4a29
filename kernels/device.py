"""Where a call runs: Triton on CUDA tensors (and on CPU tensors under Triton's interpreter), the oracle elsewhere."""

import os

import torch

# Triton reads this variable when it is imported, so it cannot change later either.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(x: torch.Tensor) -> bool:
    """Whether `x` goes to a Triton kernel. Raises `TypeError` for what the interpreter would get silently wrong."""
    if INTERPRETED and not x.is_cuda:
        if x.dtype == torch.bfloat16:
            raise TypeError("bfloat16 is silently wrong in Triton's interpreter; use float16 or float32 there")
        return x.dtype != torch.float64
    return x.is_cuda


def cast_for_autocast(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Inputs in the dtype that torch.autocast asks for, as its convolutions would see them; unchanged without it."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, *weights
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in (x, *weights))
