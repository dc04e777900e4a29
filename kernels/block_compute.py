"""The denoising block's forward and backward without autograd, group by group: fused where the table says so.

Few channels take K1, K2 and K3, many the products of `wide_conv1x1_triton`. What is not fused is made of matrix
products (cuBLAS) and the stand-alone kernels; on the CPU, of PyTorch alone, which is how its algebra is checked in
float64. All maps are channels_last.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpm_fast.kernels.adaln import compute_adaln, compute_adaln_backward
from dtpm_fast.kernels.adapter import Adapter, merge_conv5
from dtpm_fast.kernels.channel_attention import (
    attention_backward,
    attention_of,
    compute_channel_means,
    compute_scaling,
)
from dtpm_fast.kernels.device import runs_triton
from dtpm_fast.kernels.dispatch import Options, options_of
from dtpm_fast.kernels.simple_gate import compute_simple_gate, compute_simple_gate_backward


class BlockWeights(NamedTuple):
    """A block's parameters in NAFNet's shapes: 1×1 weights (outputs, inputs, 1, 1), beta and gamma (1, C, 1, 1)."""

    conv1_weight: Tensor  # (2C, C, 1, 1)
    conv1_bias: Tensor
    conv2_weight: Tensor  # (2C, 1, 3, 3)
    conv2_bias: Tensor
    sca_weight: Tensor  # (C, C, 1, 1)
    sca_bias: Tensor
    conv3_weight: Tensor  # (C, C, 1, 1)
    conv3_bias: Tensor
    conv4_weight: Tensor  # (2C, C, 1, 1)
    conv4_bias: Tensor
    conv5_weight: Tensor  # (C, C, 1, 1)
    conv5_bias: Tensor
    beta: Tensor
    gamma: Tensor


class Modulation(NamedTuple):
    """Shifts and scales of the block's two AdaLN, (B, C) each."""

    shift1: Tensor
    scale1: Tensor
    shift2: Tensor
    scale2: Tensor


def block_forward(
    x: Tensor,
    modulation: Modulation,
    weights: BlockWeights,
    adapter: Adapter | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The block's output; y, the map between its halves, when `save`; the first gate's output g; g's means (B, C) in
    float64."""
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        h = adaln_conv1x1(x, modulation, weights, eps)
        g, mean, attention = dwconv_gate_attention(h, weights)
        z, y = attention_ffn(g, attention, x, modulation, weights, adapter, eps, save)
    return z, y, g, mean


def block_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    g: Tensor,
    mean: Tensor,
    modulation: Modulation,
    weights: BlockWeights,
    eps: float,
    frozen: bool = False,
) -> tuple[Tensor, Modulation, BlockWeights | None]:
    """Gradients of the block's input, modulation and weights, each in its own shape and dtype; of `frozen` weights, as
    in stage II, none, and what only they take is not computed.

    The other maps are computed once more from x, y and g. Every sum is taken in one fixed order.
    """
    pixels = x.shape[2] * x.shape[3]
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_y, shift2, scale2, *ffn = ffn_backward(grad, y, modulation, weights, eps, frozen)
        attention = attention_of(mean, weights.sca_weight, weights.sca_bias)
        grad_g, grad_attention, *conv3 = conv3_backward(grad_y, g, attention, weights, frozen)
        grad_mean, *sca = attention_backward(grad_attention, mean, weights.sca_weight)
        h = adaln_conv1x1(x, modulation, weights, eps)
        grad_h, *conv2 = gate_backward(grad_g, attention, grad_mean / pixels, h, weights, frozen)
        grad_h = dwconv_backward(grad_h, weights)
        grad_x, shift1, scale1, *conv1 = adaln_conv1x1_backward(grad_h, grad_y, x, modulation, weights, eps, frozen)
    modulations = zip((shift1, scale1, shift2, scale2), modulation, strict=True)
    grad_modulation = Modulation(*(g.to(v.dtype) for g, v in modulations))
    if frozen:
        return grad_x, grad_modulation, None
    *ffn, gamma = ffn
    *conv3, beta = conv3
    grads = zip((*conv1, *conv2, *sca, *conv3, *ffn, beta, gamma), weights, strict=True)
    return grad_x, grad_modulation, BlockWeights(*(g.reshape(w.shape).to(w.dtype) for g, w in grads))


def _fused(kernel: str, x: Tensor) -> Options | None:
    return options_of(kernel, x.shape[1], x.dtype) if runs_triton(x) else None


def _always_fused(kernel: str, x: Tensor) -> Options:
    options = options_of(kernel, x.shape[1], x.dtype)
    assert options is not None, f"the dispatch table has no entry for {kernel}, which has no other form"
    return options


def _conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _conv1x1_input(grad: Tensor, weight: Tensor) -> Tensor:
    return _conv1x1(grad, weight.flatten(1).t())


def _conv1x1_weight(grad: Tensor, x: Tensor) -> Tensor:
    rows = [tensor.permute(0, 2, 3, 1).flatten(0, 2) for tensor in (grad, x)]
    if grad.is_cuda and grad.dtype != torch.float32:  # cuBLAS may else add a split sum's parts in 16 bits
        return torch.mm(rows[0].t(), rows[1], out_dtype=torch.float32)
    return rows[0].t() @ rows[1]


def _sums(x: Tensor, other: Tensor | None = None) -> Tensor:
    """Sums over the pixels, (B, C) in float64."""
    return compute_channel_means(x, other) * (x.shape[2] * x.shape[3])


def adaln_conv1x1(x: Tensor, modulation: Modulation, weights: BlockWeights, eps: float) -> Tensor:
    """conv1 of the first AdaLN of x (B, C, H, W): (B, 2C, H, W)."""
    shift, scale = modulation.shift1, modulation.scale1
    options = _fused("adaln_conv1x1_forward", x)
    if options is None:
        conv1 = weights.conv1_weight, weights.conv1_bias
        return wide("wide_adaln_conv1x1", x, *conv1, adaln=(shift, scale, eps))
    from dtpm_fast.kernels.adaln_conv1x1_triton import adaln_conv1x1_forward

    return adaln_conv1x1_forward(x, shift, scale, weights.conv1_weight, weights.conv1_bias, eps, options)


def dwconv_gate_attention(h: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The gate's output g, its means over the pixels (B, C) in float64, and the attention (B, C) that follows."""
    if runs_triton(h):
        from dtpm_fast.kernels.channel_attention_triton import mean_and_attention

        g, sums = dwconv_gate_pool(h, weights)
        return g, *mean_and_attention(sums, h.shape[2] * h.shape[3], weights.sca_weight, weights.sca_bias)
    g = compute_simple_gate(F.conv2d(h, weights.conv2_weight, weights.conv2_bias, padding=1, groups=h.shape[1]))
    mean = compute_channel_means(g)
    return g, mean, attention_of(mean, weights.sca_weight, weights.sca_bias)


def dwconv_gate_pool(h: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor]:
    """K2 alone: the gate's output, and the sums that its strips leave."""
    from dtpm_fast.kernels.dwconv_triton import dwconv_gate_pool_forward

    options = _always_fused("dwconv_gate_pool_forward", h)
    return dwconv_gate_pool_forward(h, weights.conv2_weight, weights.conv2_bias, options)


def attention_ffn(
    g: Tensor,
    attention: Tensor,
    x: Tensor,
    modulation: Modulation,
    weights: BlockWeights,
    adapter: Adapter | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """All behind the attention (B, C), from the gate's output g and the block's input x: the block's output, and y, the
    map between its halves, when `save`."""
    conv3 = weights.conv3_weight, weights.conv3_bias
    conv4 = weights.conv4_weight, weights.conv4_bias
    conv5 = weights.conv5_weight, weights.conv5_bias
    options = _fused("attention_ffn_forward", x)
    if options is not None:
        from dtpm_fast.kernels.attention_ffn_triton import attention_ffn_forward

        return attention_ffn_forward(
            g,
            attention,
            x,
            conv3,
            weights.beta,
            (modulation.shift2, modulation.scale2),
            conv4,
            conv5,
            weights.gamma,
            adapter,
            eps,
            save,
            options,
        )
    y = wide("wide_attention_conv1x1_residual", g, *conv3, attention=attention, residual=x, factor=weights.beta)
    adaln = modulation.shift2, modulation.scale2, eps
    h = wide("wide_adaln_conv1x1_gate", y, *conv4, adaln=adaln, gate=True)
    if adapter is None:
        z = wide("wide_conv1x1_residual", h, *conv5, residual=y, factor=weights.gamma)
    else:
        z = conv5_adapter(h, y, conv5, weights.gamma, adapter)
    return z, y if save else None


def conv5_adapter(h: Tensor, y: Tensor, conv5: tuple[Tensor, Tensor], gamma: Tensor, adapter: Adapter) -> Tensor:
    """The adapter of `y + gamma · conv5(h)`: one product over h, y and the condition, or three in turn."""
    options = _fused("wide_conv1x1_adapter", h)
    if options is not None:
        from dtpm_fast.kernels.wide_conv1x1_triton import wide_conv1x1

        weight, bias, matrix = adapter.merged or merge_conv5(*conv5, gamma, adapter.m_in, adapter.m_out)
        behind = matrix, adapter.m_out, adapter.condition
        return wide_conv1x1(h, weight, bias, options, residual=y, adapter=behind)
    z = wide("wide_conv1x1_residual", h, *conv5, residual=y, factor=gamma)
    rows, condition = (tensor.permute(0, 2, 3, 1).flatten(0, 2) for tensor in (z, adapter.condition))
    inside = torch.addmm(condition, rows, adapter.m_in.t())
    return torch.addmm(rows, inside, adapter.m_out.t()).view(z.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def wide(
    kernel: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    adaln: tuple[Tensor, Tensor, float] | None = None,
    attention: Tensor | None = None,
    gate: bool = False,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """`residual + factor · gate(conv1x1(x'))`, x' being AdaLN(x), `attention` · x or x: one kernel, or one a step."""
    options = _fused(kernel, x)
    if options is not None:
        from dtpm_fast.kernels.wide_conv1x1_triton import wide_conv1x1

        return wide_conv1x1(
            x,
            weight,
            bias,
            options,
            adaln=adaln,
            attention=attention,
            gate=gate,
            residual=residual,
            factor=factor,
        )
    if adaln is not None:
        x = compute_adaln(x, *adaln)
    if attention is not None:
        x = compute_scaling(x, attention)
    x = _conv1x1(x, weight, bias)
    if gate:
        x = compute_simple_gate(x)
    if residual is not None:
        x = residual + x if factor is None else torch.addcmul(residual, x, factor.to(x.dtype))
    return x.contiguous(memory_format=torch.channels_last)


def ffn_backward(
    grad: Tensor, y: Tensor, modulation: Modulation, weights: BlockWeights, eps: float, frozen: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of y, shift2, scale2; unless frozen, conv4 (weight, bias), conv5 (weight, bias), gamma."""
    options = _fused("ffn_backward", y)
    if options is not None:
        from dtpm_fast.kernels import attention_ffn_triton

        found = attention_ffn_triton.ffn_backward(
            grad,
            y,
            (modulation.shift2, modulation.scale2),
            (weights.conv4_weight, weights.conv4_bias),
            weights.conv5_weight,
            weights.gamma,
            eps,
            frozen,
            options,
        )
        if frozen:
            return found
        *others, product, total = found
        return (
            *others,
            *_scaled_conv_backward(product, total, weights.conv5_weight, weights.conv5_bias, weights.gamma),
        )
    adaln = modulation.shift2, modulation.scale2, eps
    h4 = wide("wide_adaln_conv1x1", y, weights.conv4_weight, weights.conv4_bias, adaln=adaln)
    grad_q = _conv1x1_input(grad, _scaled_rows(weights.conv5_weight, weights.gamma))
    grad_h4 = compute_simple_gate_backward(grad_q, h4)
    grad_h = _conv1x1_input(grad_h4, weights.conv4_weight)
    found = compute_adaln_backward(grad_h, y, modulation.scale2, eps, residual=grad)
    if frozen:
        return found
    product, total = _conv1x1_weight(grad, compute_simple_gate(h4)), _sums(grad).sum(0)
    return (
        *found,
        _conv1x1_weight(grad_h4, compute_adaln(y, *adaln)),
        _sums(grad_h4).sum(0),
        *_scaled_conv_backward(product, total, weights.conv5_weight, weights.conv5_bias, weights.gamma),
    )


def conv3_backward(
    grad: Tensor, g: Tensor, attention: Tensor, weights: BlockWeights, frozen: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of conv3's input, attention (B, C); unless frozen, conv3 (weight, bias), beta; `grad` is y's."""
    options = _fused("conv3_backward", g)
    if options is not None:
        from dtpm_fast.kernels import attention_ffn_triton

        found = attention_ffn_triton.conv3_backward(grad, g, weights.conv3_weight, weights.beta, frozen, options)
        if frozen:
            return found
        grad_input, products, totals = found
        beta, conv3 = weights.beta.double().flatten(), weights.conv3_weight.double().flatten(1)
        grad_attention = (beta[:, None] * conv3 * products).sum(1)
        product = (products * attention[:, None, :]).sum(0)
        return (
            grad_input,
            grad_attention,
            *_scaled_conv_backward(product, totals.sum(0), weights.conv3_weight, weights.conv3_bias, weights.beta),
        )
    grad_input = _conv1x1_input(grad, _scaled_rows(weights.conv3_weight, weights.beta))
    grad_attention = _sums(grad_input, g)
    if frozen:
        return grad_input, grad_attention
    product, total = _conv1x1_weight(grad, compute_scaling(g, attention)), _sums(grad).sum(0)
    conv3_and_beta = _scaled_conv_backward(product, total, weights.conv3_weight, weights.conv3_bias, weights.beta)
    return grad_input, grad_attention, *conv3_and_beta


def _scaled_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """diag(s)·W: what `s · conv1x1(q)` multiplies by, so that a gradient need not be scaled before it."""
    return weight.flatten(1) * scale.to(weight.dtype).reshape(-1, 1)


def _scaled_conv_backward(
    product: Tensor, total: Tensor, weight: Tensor, bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W, b and s in `s · (W q + b)`, from Σ grad·qᵀ (C, C) and Σ grad (C) over the pixels, in float64."""
    weight, bias, scale = weight.double().flatten(1), bias.double(), scale.double().flatten()
    return scale[:, None] * product, scale * total, (weight * product).sum(1) + bias * total


def gate_backward(
    grad: Tensor, scale: Tensor, offset: Tensor, h: Tensor, weights: BlockWeights, frozen: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of the depth-wise convolution's output; unless frozen, weight and bias; the gate's is
    `grad · scale + offset`."""
    if runs_triton(h):
        from dtpm_fast.kernels import dwconv_triton

        options = _always_fused("gate_backward", h)
        convolution = weights.conv2_weight, weights.conv2_bias
        return dwconv_triton.gate_backward(grad, scale.float(), offset.float(), h, *convolution, frozen, options)
    gated = F.conv2d(h, weights.conv2_weight, weights.conv2_bias, padding=1, groups=h.shape[1])
    grad = compute_simple_gate_backward(compute_scaling(grad, scale, offset), gated)
    if frozen:
        return (grad,)
    _, conv2, conv2_bias = _convolution_backward(grad, h, weights.conv2_weight, [False, True, True])
    return grad, conv2, conv2_bias


def dwconv_backward(grad: Tensor, weights: BlockWeights) -> Tensor:
    """Gradient of the depth-wise convolution's input from that of its output."""
    if runs_triton(grad):
        from dtpm_fast.kernels import dwconv_triton

        return dwconv_triton.dwconv_backward(grad, weights.conv2_weight, _always_fused("dwconv_backward", grad))
    return _convolution_backward(grad, torch.empty_like(grad), weights.conv2_weight, [True, False, False])[0]


def _convolution_backward(grad: Tensor, h: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    groups = h.shape[1]
    grads: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad, h, weight, [groups], [1, 1], [1, 1], [1, 1], False, [0, 0], groups, wanted
    )
    return grads


def adaln_conv1x1_backward(
    grad: Tensor,
    residual: Tensor,
    x: Tensor,
    modulation: Modulation,
    weights: BlockWeights,
    eps: float,
    frozen: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of x (plus `residual`), shift1, scale1; unless frozen, conv1 (weight, bias)."""
    shift, scale = modulation.shift1, modulation.scale1
    options = _fused("adaln_conv1x1_backward", x)
    if options is not None:
        from dtpm_fast.kernels import adaln_conv1x1_triton

        return adaln_conv1x1_triton.adaln_conv1x1_backward(
            grad, residual, x, shift, scale, weights.conv1_weight, eps, frozen, options
        )
    grad_h = _conv1x1_input(grad, weights.conv1_weight)
    found = compute_adaln_backward(grad_h, x, scale, eps, residual)
    if frozen:
        return found
    return *found, _conv1x1_weight(grad, compute_adaln(x, shift, scale, eps)), _sums(grad).sum(0)
