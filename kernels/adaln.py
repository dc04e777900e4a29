"""AdaLN (DTPM, figure 4): layer normalisation over the channels of every pixel, then a shift and a scale per sample."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpm_fast.kernels.checks import check_map, check_modulation, layout_of
from dtpm_fast.kernels.device import runs_triton


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """`LN_C(x) · (1 + scale) + shift`, statistics in float32 (float64 for float64), differentiable.

    Args:
        x: (B, C, H, W), channels_last or contiguous.
        shift, scale: (B, C), any floating dtype.
        eps: added to the variance.

    Returns: (B, C, H, W) in `x`'s dtype; on a GPU in `x`'s layout.
    Raises: `ValueError` for a wrong shape, stride or device, `TypeError` for a wrong dtype.
    """
    check_map("x", x)
    check_modulation("shift", shift, x)
    check_modulation("scale", scale, x)
    if runs_triton(x):
        return _adaln(x, shift, scale, eps)
    return adaln_ref(x, shift, scale, eps)


def adaln_ref(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """The oracle of `adaln`: PyTorch's own layer norm, whose sums are float32, on the permuted view."""
    h = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=eps).to(x.dtype)  # autocast widens it
    h = h * (1 + scale.to(x.dtype)[:, None, None, :]) + shift.to(x.dtype)[:, None, None, :]
    return h.permute(0, 3, 1, 2)


def adaln_backward_ref(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale, written out; the Triton kernel computes the same expression."""
    precise = torch.promote_types(x.dtype, torch.float32)
    x, grad, wide_scale = x.to(precise), grad.to(precise), scale.to(precise)
    centred = x - x.mean(1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(1, keepdim=True) + eps)
    normal = centred * rstd
    inner = grad * (1 + wide_scale[:, :, None, None])
    grad_x = rstd * (inner - inner.mean(1, keepdim=True) - normal * (inner * normal).mean(1, keepdim=True))
    return grad_x, grad.sum((2, 3)), (grad * normal).sum((2, 3))


def compute_adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`adaln` without autograd, in `x`'s layout on every device."""
    if runs_triton(x):
        from dtpm_fast.kernels.adaln_triton import adaln_forward

        return adaln_forward(x, shift, scale, eps)
    return adaln_ref(x, shift, scale, eps).contiguous(memory_format=layout_of(x))


def compute_adaln_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (plus `residual`), in its dtype and layout, and of shift and scale, (B, C), in a wider dtype."""
    if runs_triton(x):
        from dtpm_fast.kernels.adaln_triton import adaln_backward

        return adaln_backward(grad.contiguous(memory_format=layout_of(x)), x, scale, eps, residual)
    grad_x, grad_shift, grad_scale = adaln_backward_ref(grad, x, scale, eps)
    if residual is not None:
        grad_x = residual + grad_x
    return grad_x.to(x.dtype).contiguous(memory_format=layout_of(x)), grad_shift, grad_scale


@torch.library.custom_op("dtpm_fast::adaln", mutates_args=())
def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    with torch.cuda.device_of(x):
        return compute_adaln(x, shift, scale, eps)


@_adaln.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=layout_of(x))


@torch.library.custom_op("dtpm_fast::adaln_backward", mutates_args=())
def _adaln_backward(grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):
        grad_x, grad_shift, grad_scale = compute_adaln_backward(grad, x, scale, eps)
    return grad_x, grad_shift.to(shift.dtype), grad_scale.to(scale.dtype)


@_adaln_backward.register_fake
def _(grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=layout_of(x)), shift.new_empty(shift.shape), scale.new_empty(scale.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, shift, scale, ctx.eps = inputs
    ctx.save_for_backward(x, shift, scale)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, shift, scale = ctx.saved_tensors
    return *_adaln_backward(grad, x, shift, scale, ctx.eps), None


_adaln.register_autograd(_backward, setup_context=_setup_context)
