"""K3: all of the block behind the depth-wise convolution in one pass, and the backward of its two halves.

Per pixel: channel attention's scale, 1×1, residual, AdaLN, 1×1, SimpleGate, 1×1, residual, adapter. Maps are
channels_last. Names: P pixels of a tile, C channels, R an adapter's rank, padded; a and b are the gate's halves.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.adaln_conv1x1_triton import block_of, load_weight, store_square
from dtpm_fast.kernels.adaln_triton import eps_of_pixels, load_modulation, load_row, normalise, normalise_backward
from dtpm_fast.kernels.adapter import Adapter
from dtpm_fast.kernels.dispatch import Options
from dtpm_fast.kernels.tiles import COMPILER, add_partials, empty_map, programs_per_sample, sum_pixels


def attention_ffn_forward(
    g: torch.Tensor,
    attention: torch.Tensor,
    x: torch.Tensor,
    conv3: tuple[torch.Tensor, torch.Tensor],
    beta: torch.Tensor,
    modulation: tuple[torch.Tensor, torch.Tensor],
    conv4: tuple[torch.Tensor, torch.Tensor],
    conv5: tuple[torch.Tensor, torch.Tensor],
    gamma: torch.Tensor,
    adapter: Adapter | None,
    eps: float,
    save_y: bool,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The block's output, and y when `save_y`. `attention` is (B, C) in float32."""
    samples, channels, height, width = x.shape
    pixels = height * width
    z = empty_map(x.shape, x)
    y = empty_map(x.shape, x) if save_y else None
    shift, scale = modulation
    inside = (x, x, x) if adapter is None else adapter[:3]  # x stands in for what is not read
    rank = 0 if adapter is None else adapter.m_in.shape[0]
    attention_ffn_forward_kernel[(triton.cdiv(pixels, options["BLOCK_P"]), samples)](
        g, attention, x, *conv3, beta, shift, scale, *conv4, *conv5, gamma, *inside, z, x if y is None else y,
        shift.stride(0), scale.stride(0), pixels, eps,
        CHANNELS=channels, BLOCK_C=block_of(channels), SAVE_Y=save_y, RANK=rank, BLOCK_R=block_of(rank),
        **options, **COMPILER,
    )  # fmt: skip
    return z, y


def ffn_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    modulation: tuple[torch.Tensor, torch.Tensor],
    conv4: tuple[torch.Tensor, torch.Tensor],
    conv5_weight: torch.Tensor,
    gamma: torch.Tensor,
    eps: float,
    frozen: bool,
    options: Options,
) -> tuple[torch.Tensor, ...]:
    """Backward of `z = y + gamma · conv5(gate(conv4(adaln(y))))`.

    Returns y's gradient; shift's and scale's, (B, C); and unless the weights are frozen conv4's weight's (2C, C) and
    bias'; and Σ grad·qᵀ (C, C) and Σ grad (C) over the pixels, q being the gate's output: conv5's and gamma's follow
    from them. All but y's in float64.
    """
    samples, channels, height, width = y.shape
    pixels = height * width
    programs = programs_per_sample(triton.cdiv(pixels, options["BLOCK_P"]), samples, total=264)
    shift, scale = modulation
    grad_y = empty_map(y.shape, y)
    vectors = y.new_empty((samples, programs, 2 if frozen else 5, channels), dtype=torch.float32)
    matrices = y.new_empty((samples, programs, 0 if frozen else 3, channels, channels), dtype=torch.float32)
    ffn_backward_kernel[(programs, samples)](
        grad, y, shift, scale, *conv4, conv5_weight, gamma, grad_y, vectors, matrices,
        shift.stride(0), scale.stride(0), pixels, eps, CHANNELS=channels, BLOCK_C=block_of(channels), FROZEN=frozen,
        **options, **COMPILER,
    )  # fmt: skip
    vector = add_partials(vectors)
    if frozen:
        return grad_y, vector[:, 0], vector[:, 1]
    matrix = add_partials(matrices).sum(0)
    grad_conv4_bias = vector[:, 2:4].sum(0).reshape(2 * channels)
    grad_conv4 = matrix[:2].reshape(2 * channels, channels)
    return grad_y, vector[:, 0], vector[:, 1], grad_conv4, grad_conv4_bias, matrix[2], vector[:, 4].sum(0)


def conv3_backward(
    grad: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, beta: torch.Tensor, frozen: bool, options: Options
) -> tuple[torch.Tensor, ...]:
    """`(beta · grad) @ W3` as a map; and in float64 Σ grad·gᵀ (B, C, C) and Σ grad (B, C) over each sample's pixels.
    With frozen weights instead of these two: that map times g, summed over the pixels, (B, C)."""
    samples, channels, height, width = g.shape
    pixels = height * width
    programs = programs_per_sample(triton.cdiv(pixels, options["BLOCK_P"]), samples, total=264)
    out = empty_map(g.shape, g)
    vectors = g.new_empty((samples, programs, channels), dtype=torch.float32)
    matrices = g.new_empty((samples, 0 if frozen else programs, channels, channels), dtype=torch.float32)
    conv3_backward_kernel[(programs, samples)](
        grad, g, weight, beta, out, vectors, matrices, pixels,
        CHANNELS=channels, BLOCK_C=block_of(channels), FROZEN=frozen,
        **options, **COMPILER,
    )  # fmt: skip
    return (out, add_partials(vectors)) if frozen else (out, add_partials(matrices), add_partials(vectors))


@triton.jit
def attention_ffn_forward_kernel(
    g_ptr, attention_ptr, x_ptr, weight3_ptr, bias3_ptr, beta_ptr, shift_ptr, scale_ptr, weight4_ptr, bias4_ptr,
    weight5_ptr, bias5_ptr, gamma_ptr, m_in_ptr, m_out_ptr, condition_ptr, z_ptr, y_ptr, shift_stride, scale_stride,
    pixels, eps, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SAVE_Y: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)[None, :]
    in_c = c < CHANNELS
    first = tl.program_id(0) * BLOCK_P
    p = tl.arange(0, BLOCK_P)[:, None]
    mask = (first + p < pixels) & in_c
    start = (tl.program_id(1).to(tl.int64) * pixels + first) * CHANNELS
    at = p * CHANNELS + c
    g = tl.load(g_ptr + start + at, mask=mask, other=0.0)
    h = (g.to(tl.float32) * load_row(attention_ptr + tl.program_id(1) * CHANNELS, c, in_c)).to(g.dtype)
    weight = load_weight(weight3_ptr, 0, BLOCK_C, CHANNELS, CHANNELS, BLOCK_C)
    y = tl.dot(h, tl.trans(weight), input_precision="ieee") + load_row(bias3_ptr, c, in_c)
    y = y * load_row(beta_ptr, c, in_c) + tl.load(x_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    if SAVE_Y:
        tl.store(y_ptr + start + at, y.to(g.dtype), mask=mask)

    shift, scale = load_modulation(shift_ptr, scale_ptr, shift_stride, scale_stride, c, in_c)
    normal, _ = normalise(y, in_c, CHANNELS, eps)
    h = (normal * scale + shift).to(g.dtype)
    weight = load_weight(weight4_ptr, 0, BLOCK_C, CHANNELS, CHANNELS, BLOCK_C)
    a = tl.dot(h, tl.trans(weight), input_precision="ieee") + load_row(bias4_ptr, c, in_c)
    weight = load_weight(weight4_ptr + CHANNELS * CHANNELS, 0, BLOCK_C, CHANNELS, CHANNELS, BLOCK_C)
    b = tl.dot(h, tl.trans(weight), input_precision="ieee") + load_row(bias4_ptr + CHANNELS, c, in_c)
    weight = load_weight(weight5_ptr, 0, BLOCK_C, CHANNELS, CHANNELS, BLOCK_C)
    h = tl.dot((a * b).to(g.dtype), tl.trans(weight), input_precision="ieee") + load_row(bias5_ptr, c, in_c)
    z = y + h * load_row(gamma_ptr, c, in_c)
    if RANK > 0:
        r = tl.arange(0, BLOCK_R)[None, :]
        condition_ptr += (tl.program_id(1).to(tl.int64) * pixels + first) * RANK
        weight = load_weight(m_in_ptr, 0, BLOCK_R, RANK, CHANNELS, BLOCK_C)
        h = tl.dot(z.to(g.dtype), tl.trans(weight), input_precision="ieee")
        h += tl.load(condition_ptr + p * RANK + r, mask=(first + p < pixels) & (r < RANK), other=0.0).to(tl.float32)
        weight = load_weight(m_out_ptr, 0, BLOCK_C, CHANNELS, RANK, BLOCK_R)
        z += tl.dot(h.to(g.dtype), tl.trans(weight), input_precision="ieee")
    tl.store(z_ptr + start + at, z.to(g.dtype), mask=mask)


@triton.jit
def ffn_backward_kernel(
    grad_ptr, y_ptr, shift_ptr, scale_ptr, weight4_ptr, bias4_ptr, weight5_ptr, gamma_ptr,
    grad_y_ptr, vectors_ptr, matrices_ptr, shift_stride, scale_stride, pixels, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FROZEN: tl.constexpr,
):  # fmt: skip
    """A program walks over tiles of one sample, keeps its sums in registers and writes them once."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :]
    in_c = c < CHANNELS
    shift, scale = load_modulation(shift_ptr, scale_ptr, shift_stride, scale_stride, c, in_c)
    gamma = load_row(gamma_ptr, c, in_c)
    p = tl.arange(0, BLOCK_P)[:, None]
    grad_shift = tl.zeros((1, BLOCK_C), tl.float32)
    grad_scale = tl.zeros((1, BLOCK_C), tl.float32)
    grad_bias_a = tl.zeros((1, BLOCK_C), tl.float32)
    grad_bias_b = tl.zeros((1, BLOCK_C), tl.float32)
    grad_sum = tl.zeros((1, BLOCK_C), tl.float32)
    grad_weight_a = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    grad_weight_b = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    grad_gate = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(pixels, BLOCK_P), programs):
        mask = (tile * BLOCK_P + p < pixels) & in_c
        start = (sample * pixels + tile * BLOCK_P) * CHANNELS
        at = p * CHANNELS + c
        y = tl.load(y_ptr + start + at, mask=mask, other=0.0)
        eps_p = eps_of_pixels(tile * BLOCK_P, BLOCK_P, pixels, eps)
        normal, rstd = normalise(y.to(tl.float32), in_c, CHANNELS, eps_p)
        h = (normal * scale + shift).to(y.dtype)
        weight_a = load_weight(weight4_ptr, 0, BLOCK_C, CHANNELS, CHANNELS, BLOCK_C)
        weight_b = load_weight(weight4_ptr + CHANNELS * CHANNELS, 0, BLOCK_C, CHANNELS, CHANNELS, BLOCK_C)
        a = tl.dot(h, tl.trans(weight_a), input_precision="ieee") + load_row(bias4_ptr, c, in_c)
        b = tl.dot(h, tl.trans(weight_b), input_precision="ieee") + load_row(bias4_ptr + CHANNELS, c, in_c)

        grad = tl.load(grad_ptr + start + at, mask=mask, other=0.0)
        if not FROZEN:
            grad_sum += sum_pixels(grad.to(tl.float32))
            grad_gate = tl.dot(tl.trans(grad), (a * b).to(y.dtype), grad_gate, input_precision="ieee")
        weight = load_weight(weight5_ptr, 0, BLOCK_C, CHANNELS, CHANNELS, BLOCK_C)
        grad_q = tl.dot((grad.to(tl.float32) * gamma).to(y.dtype), weight, input_precision="ieee")
        grad_a = grad_q * b
        grad_b = grad_q * a
        if not FROZEN:
            grad_bias_a += sum_pixels(grad_a)
            grad_bias_b += sum_pixels(grad_b)
        grad_a = grad_a.to(y.dtype)
        grad_b = grad_b.to(y.dtype)
        if not FROZEN:
            grad_weight_a = tl.dot(tl.trans(grad_a), h, grad_weight_a, input_precision="ieee")
            grad_weight_b = tl.dot(tl.trans(grad_b), h, grad_weight_b, input_precision="ieee")
        grad_h = tl.dot(grad_a, weight_a, input_precision="ieee")
        grad_h = tl.dot(grad_b, weight_b, grad_h, input_precision="ieee")
        grad_shift += sum_pixels(grad_h)
        grad_scale += sum_pixels(grad_h * normal)
        grad_y = grad.to(tl.float32) + normalise_backward(grad_h * scale, normal, rstd, CHANNELS)
        tl.store(grad_y_ptr + start + at, grad_y.to(y.dtype), mask=mask)
    out = sample * programs + program
    vectors_ptr += out * (2 if FROZEN else 5) * CHANNELS
    tl.store(vectors_ptr + c, grad_shift, mask=in_c)
    tl.store(vectors_ptr + CHANNELS + c, grad_scale, mask=in_c)
    if not FROZEN:
        tl.store(vectors_ptr + 2 * CHANNELS + c, grad_bias_a, mask=in_c)
        tl.store(vectors_ptr + 3 * CHANNELS + c, grad_bias_b, mask=in_c)
        tl.store(vectors_ptr + 4 * CHANNELS + c, grad_sum, mask=in_c)
        matrices_ptr += out * 3 * CHANNELS * CHANNELS
        store_square(matrices_ptr, grad_weight_a, CHANNELS, BLOCK_C)
        store_square(matrices_ptr + CHANNELS * CHANNELS, grad_weight_b, CHANNELS, BLOCK_C)
        store_square(matrices_ptr + 2 * CHANNELS * CHANNELS, grad_gate, CHANNELS, BLOCK_C)


@triton.jit
def conv3_backward_kernel(
    grad_ptr, g_ptr, weight_ptr, beta_ptr, out_ptr, vectors_ptr, matrices_ptr, pixels,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FROZEN: tl.constexpr,
):  # fmt: skip
    """A program walks over tiles of one sample, keeps its sums in registers and writes them once."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :]
    in_c = c < CHANNELS
    beta = load_row(beta_ptr, c, in_c)
    p = tl.arange(0, BLOCK_P)[:, None]
    weight = load_weight(weight_ptr, 0, BLOCK_C, CHANNELS, CHANNELS, BLOCK_C)
    total = tl.zeros((1, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(pixels, BLOCK_P), programs):
        mask = (tile * BLOCK_P + p < pixels) & in_c
        start = (sample * pixels + tile * BLOCK_P) * CHANNELS
        at = p * CHANNELS + c
        grad = tl.load(grad_ptr + start + at, mask=mask, other=0.0)
        g = tl.load(g_ptr + start + at, mask=mask, other=0.0)
        if not FROZEN:
            product = tl.dot(tl.trans(grad), g, product, input_precision="ieee")
            total += sum_pixels(grad.to(tl.float32))
        out = tl.dot((grad.to(tl.float32) * beta).to(g.dtype), weight, input_precision="ieee")
        tl.store(out_ptr + start + at, out.to(g.dtype), mask=mask)
        if FROZEN:
            total += sum_pixels(out * g.to(tl.float32))
    out = sample * programs + program
    tl.store(vectors_ptr + out * CHANNELS + c, total, mask=in_c)
    if not FROZEN:
        store_square(matrices_ptr + out * CHANNELS * CHANNELS, product, CHANNELS, BLOCK_C)
