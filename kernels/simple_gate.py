"""SimpleGate (NAFNet): the product of a map's two halves along the channels."""

import torch
from torch import Tensor

from dtpm_fast.kernels.checks import check_map, layout_of
from dtpm_fast.kernels.device import runs_triton


def simple_gate(x: Tensor) -> Tensor:
    """`a · b` where `x = a ⊕ b` along the channels, differentiable.

    Args:
        x: (B, 2C, H, W), channels_last or contiguous.

    Returns: (B, C, H, W) in `x`'s dtype; on a GPU in `x`'s layout.
    Raises: `ValueError` for a wrong shape or stride, `TypeError` for a wrong dtype.
    """
    check_map("x", x)
    if x.shape[1] % 2:
        raise ValueError(f"x must have an even number of channels, not {x.shape[1]}")
    if runs_triton(x):
        return _simple_gate(x)
    return simple_gate_ref(x)


def simple_gate_ref(x: Tensor) -> Tensor:
    """The oracle of `simple_gate`."""
    a, b = x.chunk(2, dim=1)
    return a * b


def compute_simple_gate(x: Tensor) -> Tensor:
    """`simple_gate` without autograd, in `x`'s layout on every device."""
    if runs_triton(x):
        from dtpm_fast.kernels.simple_gate_triton import simple_gate_forward

        return simple_gate_forward(x)
    return simple_gate_ref(x).contiguous(memory_format=layout_of(x))


def compute_simple_gate_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x, in its layout."""
    if runs_triton(x):
        from dtpm_fast.kernels.simple_gate_triton import simple_gate_backward

        return simple_gate_backward(grad.contiguous(memory_format=layout_of(x)), x)
    a, b = x.chunk(2, dim=1)
    return torch.cat((grad * b, grad * a), dim=1).contiguous(memory_format=layout_of(x))


@torch.library.custom_op("dtpm_fast::simple_gate", mutates_args=())
def _simple_gate(x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return compute_simple_gate(x)


@_simple_gate.register_fake
def _(x: Tensor) -> Tensor:
    samples, channels, height, width = x.shape
    return x.new_empty((samples, channels // 2, height, width)).contiguous(memory_format=layout_of(x))


@torch.library.custom_op("dtpm_fast::simple_gate_backward", mutates_args=())
def _simple_gate_backward(grad: Tensor, x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return compute_simple_gate_backward(grad, x)


@_simple_gate_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=layout_of(x))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return _simple_gate_backward(grad, *ctx.saved_tensors)


_simple_gate.register_autograd(_backward, setup_context=_setup_context)
