"""Simplified channel attention (NAFNet): every channel times a linear function of all channels' means."""

import torch
from torch import Tensor

from dtpm_fast.kernels.checks import check_map, check_parameter, layout_of
from dtpm_fast.kernels.device import cast_for_autocast, runs_triton


def channel_attention(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x · (W · mean_HW(x) + b)`, differentiable; means and the product with W are wider than `x`.

    Args:
        x: (B, C, H, W), channels_last or contiguous.
        weight: (C, C), or (C, C, 1, 1) as a 1×1 convolution keeps it; in `x`'s dtype, as is `bias` (C,).

    Returns: (B, C, H, W) in `x`'s dtype; on a GPU in `x`'s layout. The sums are taken in one fixed order.
    Raises: `ValueError` for a wrong shape, stride or device, `TypeError` for a wrong dtype.
    """
    check_map("x", x)
    channels = x.shape[1]
    x, weight, bias = cast_for_autocast(x, weight, bias)
    check_parameter("weight", weight, (channels, channels, 1, 1)[: max(weight.dim(), 2)], x)
    check_parameter("bias", bias, (channels,), x)
    if runs_triton(x):
        return _channel_attention(x, weight.view(channels, channels), bias)[0]
    return channel_attention_ref(x, weight, bias)


def channel_attention_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The oracle of `channel_attention`."""
    attention = torch.addmm(bias, x.mean((2, 3)), weight.flatten(1).t())
    return x * attention[:, :, None, None]


def attention_of(mean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`W · mean + b` for means (B, C) in float64: one small product, in float64 as well, autocast or not."""
    with torch.autocast(mean.device.type, enabled=False):
        return torch.addmm(bias.to(mean.dtype), mean, weight.flatten(1).to(mean.dtype).t())


def attention_backward(grad_attention: Tensor, mean: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of mean (B, C), weight (C, C) and bias (C,) from the attention's (B, C)."""
    with torch.autocast(mean.device.type, enabled=False):
        grad_mean = grad_attention @ weight.flatten(1).to(mean.dtype)
        return grad_mean, grad_attention.t() @ mean, grad_attention.sum(0)


def compute_channel_means(x: Tensor, other: Tensor | None = None) -> Tensor:
    """Means over the pixels of `x`, or of `x · other` in the same layout: (B, C) in float64."""
    if runs_triton(x):
        from dtpm_fast.kernels.channel_attention_triton import channel_means

        return channel_means(x, other)
    return (x.double() if other is None else x.double() * other).mean((2, 3))


def compute_scaling(x: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """`x · scale + offset` with scale and offset (B, C) in float64 or float32, in `x`'s dtype and layout."""
    if runs_triton(x):
        from dtpm_fast.kernels.channel_attention_triton import scale_channels

        return scale_channels(x, scale.float(), None if offset is None else offset.float())
    out = x.double() * scale[:, :, None, None]
    out = out if offset is None else out + offset[:, :, None, None]
    return out.to(x.dtype).contiguous(memory_format=layout_of(x))


@torch.library.custom_op("dtpm_fast::channel_attention", mutates_args=())
def _channel_attention(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the means (B, C) in float64, which the backward needs."""
    with torch.cuda.device_of(x):
        if not runs_triton(x):
            mean = compute_channel_means(x)
            return compute_scaling(x, attention_of(mean, weight, bias)), mean
        from dtpm_fast.kernels.channel_attention_triton import channel_sums, mean_and_attention

        mean, attention = mean_and_attention(channel_sums(x), x.shape[2] * x.shape[3], weight, bias)
        return compute_scaling(x, attention), mean


@_channel_attention.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=torch.float64)
    return torch.empty_like(x, memory_format=layout_of(x)), mean


@torch.library.custom_op("dtpm_fast::channel_attention_backward", mutates_args=())
def _channel_attention_backward(
    grad: Tensor, x: Tensor, mean: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    pixels = x.shape[2] * x.shape[3]
    grad = grad.contiguous(memory_format=layout_of(x))
    with torch.cuda.device_of(x):
        grad_attention = compute_channel_means(x, grad) * pixels
        grad_mean, grad_weight, grad_bias = attention_backward(grad_attention, mean, weight)
        grad_x = compute_scaling(grad, attention_of(mean, weight, bias), grad_mean / pixels)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


@_channel_attention_backward.register_fake
def _(grad: Tensor, x: Tensor, mean: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=layout_of(x)), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_mean):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None
    x, weight, bias, mean = ctx.saved_tensors
    return _channel_attention_backward(grad, x, mean, weight, bias)


_channel_attention.register_autograd(_backward, setup_context=_setup_context)
