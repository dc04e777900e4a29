"""The denoising block of figure 4 as one call, with the linear CG-adapter behind it.

h = AdaLN(x; shift1, scale1) → 1×1 C→2C → depth-wise 3×3 → SimpleGate → channel attention → 1×1 C→C
y = x + beta · h
h = AdaLN(y; shift2, scale2) → 1×1 C→2C → SimpleGate → 1×1 C→C
z = y + gamma · h
adapter: z + M_out (M_in z + condition)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpm_fast.kernels.adaln import adaln_ref
from dtpm_fast.kernels.adapter import Adapter, adapter_of, adapter_ref, check_adapter, tensors_of
from dtpm_fast.kernels.block_compute import BlockWeights, Modulation, block_backward, block_forward
from dtpm_fast.kernels.channel_attention import channel_attention_ref
from dtpm_fast.kernels.checks import check_map, check_modulation, check_parameter, check_vector
from dtpm_fast.kernels.device import cast_for_autocast, runs_triton
from dtpm_fast.kernels.simple_gate import simple_gate_ref


def denoising_block(
    x: Tensor,
    shift1: Tensor,
    scale1: Tensor,
    shift2: Tensor,
    scale2: Tensor,
    weights: BlockWeights,
    adapter: Adapter | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The block, differentiable in everything; the backward keeps x, y, g and (B, C) means, and recomputes the rest. It
    computes no gradient of the weights where none of them requires one, as in stage II.

    Args:
        x: (B, C, H, W); channels_last, or contiguous, which costs a copy on a GPU.
        shift1, scale1, shift2, scale2: (B, C), any floating dtype; chunks of a wider tensor will do.
        weights: `block_weights(module)`; the convolutions in `x`'s dtype, or any under torch.autocast.
        adapter: a linear CG-adapter of the picture.
        eps: of AdaLN.

    Returns: (B, C, H, W), channels_last on a GPU, in `x`'s dtype, or autocast's where that is on.
    Raises: `ValueError` for a wrong shape, stride or device, `TypeError` for a wrong dtype.
    """
    x, *cast = cast_for_autocast(x, *weights[:12], *tensors_of(adapter))  # beta and gamma are read in any dtype
    weights, adapter = BlockWeights._make([*cast[:12], *weights[12:]]), adapter_of(cast[12:])
    modulation = Modulation(shift1, scale1, shift2, scale2)
    _check(x, modulation, weights, adapter)
    if not runs_triton(x):
        return denoising_block_ref(x, *modulation, weights, adapter, eps)
    x = x.contiguous(memory_format=torch.channels_last)
    if adapter is not None:
        condition = adapter.condition.contiguous(memory_format=torch.channels_last)
        adapter = adapter._replace(condition=condition)
    # torch 2.11 compiles no other tuples than lists
    given = [list(modulation), list(weights), tensors_of(adapter)]
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for part in ([x], *given) for tensor in part)):
        return _block(x, *given, eps)
    z = _block_train(x, *given[:2], eps)[0]
    return z if adapter is None else adapter_ref(z, adapter)


def denoising_block_ref(
    x: Tensor,
    shift1: Tensor,
    scale1: Tensor,
    shift2: Tensor,
    scale2: Tensor,
    weights: BlockWeights,
    adapter: Adapter | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The oracle of `denoising_block`."""
    w = weights
    h = F.conv2d(adaln_ref(x, shift1, scale1, eps), w.conv1_weight, w.conv1_bias)
    h = simple_gate_ref(F.conv2d(h, w.conv2_weight, w.conv2_bias, padding=1, groups=h.shape[1]))
    h = channel_attention_ref(h, w.sca_weight, w.sca_bias)
    y = x + w.beta.to(x.dtype) * F.conv2d(h, w.conv3_weight, w.conv3_bias)
    h = simple_gate_ref(F.conv2d(adaln_ref(y, shift2, scale2, eps), w.conv4_weight, w.conv4_bias))
    z = y + w.gamma.to(x.dtype) * F.conv2d(h, w.conv5_weight, w.conv5_bias)
    return z if adapter is None else adapter_ref(z, adapter)


def block_weights(module: nn.Module) -> BlockWeights:
    """The parameters of a module with NAFNet's names: conv1 to conv5, sca.1, beta, gamma.

    Raises: `ValueError` naming the parameter that is missing.
    """
    found = []
    for name in BlockWeights._fields:
        path = name.replace("sca_", "sca.1_").replace("_", ".")
        try:
            parameter = module.get_parameter(path)
        except AttributeError as error:
            raise ValueError(
                f"module {type(module).__name__} is no NAFNet block: it has no parameter {path}"
            ) from error
        found.append(parameter)
    return BlockWeights(*found)


def check_weights(weights: BlockWeights, like: Tensor) -> None:
    """A block's weights for the C channels of `like`, (N, C, ...); the convolutions' in its dtype and on its device.

    Raises: `ValueError` for a wrong shape, stride or device, `TypeError` for a wrong dtype.
    """
    c = like.shape[1]
    square, doubled = (c, c, 1, 1), (2 * c, c, 1, 1)
    shapes: list[tuple[int, ...]] = [doubled, (2 * c,), (2 * c, 1, 3, 3), (2 * c,), square, (c,)]
    shapes += [square, (c,), doubled, (2 * c,), square, (c,)]
    for name, weight, shape in zip(BlockWeights._fields, weights, shapes, strict=False):
        check_parameter(name, weight, shape, like)
    check_vector("beta", weights.beta, (1, c, 1, 1), like)
    check_vector("gamma", weights.gamma, (1, c, 1, 1), like)


def _check(x: Tensor, modulation: Modulation, weights: BlockWeights, adapter: Adapter | None) -> None:
    check_map("x", x)
    for name, vector in zip(Modulation._fields, modulation, strict=True):
        check_modulation(name, vector, x)
    check_weights(weights, x)
    if adapter is not None:
        check_adapter(adapter, x)


@torch.library.custom_op("dtpm_fast::denoising_block", mutates_args=())
def _block(
    x: Tensor,
    modulation: list[Tensor],
    weights: list[Tensor],
    adapter: list[Tensor],
    eps: float,
) -> Tensor:
    given = Modulation(*modulation), BlockWeights(*weights), adapter_of(adapter)
    return block_forward(x, *given, eps, save=False)[0]


@_block.register_fake
def _(
    x: Tensor,
    modulation: list[Tensor],
    weights: list[Tensor],
    adapter: list[Tensor],
    eps: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op("dtpm_fast::denoising_block_train", mutates_args=())
def _block_train(
    x: Tensor, modulation: list[Tensor], weights: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output and what the backward keeps: y, the first gate's output and its means."""
    z, y, g, mean = block_forward(x, Modulation(*modulation), BlockWeights(*weights), None, eps, save=True)
    assert y is not None
    return z, y, g, mean


@_block_train.register_fake
def _(
    x: Tensor,
    modulation: list[Tensor],
    weights: list[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, y, g = (torch.empty_like(x, memory_format=torch.channels_last) for _ in range(3))
    return z, y, g, x.new_empty(x.shape[:2], dtype=torch.float64)


@torch.library.custom_op("dtpm_fast::denoising_block_backward", mutates_args=())
def _block_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    g: Tensor,
    mean: Tensor,
    modulation: list[Tensor],
    weights: list[Tensor],
    eps: float,
    frozen: bool,
) -> list[Tensor]:
    """Gradients of x, the modulation and, unless they are frozen, the weights, in this order."""
    grad_x, grad_modulation, grad_weights = block_backward(
        grad, x, y, g, mean, Modulation(*modulation), BlockWeights(*weights), eps, frozen
    )
    return [grad_x, *grad_modulation, *(grad_weights or ())]


@_block_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    g: Tensor,
    mean: Tensor,
    modulation: list[Tensor],
    weights: list[Tensor],
    eps: float,
    frozen: bool,
) -> list[Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    return [grad_x, *(v.new_empty(v.shape) for v in (*modulation, *(() if frozen else weights)))]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, modulation, weights, ctx.eps = inputs
    _, y, g, mean = output
    ctx.mark_non_differentiable(y, g, mean)
    ctx.set_materialize_grads(False)  # else autograd fills maps of zeros for y and g, which nobody reads
    ctx.save_for_backward(x, y, g, mean, *modulation, *weights)


def _backward(ctx, grad, *unused):  # type: ignore[no-untyped-def]
    x, y, g, mean, *rest = ctx.saved_tensors
    if grad is None:
        return None, [None] * 4, [None] * len(rest[4:]), None
    frozen = not any(ctx.needs_input_grad[2])
    grad_x, *grads = _block_backward(grad, x, y, g, mean, rest[:4], rest[4:], ctx.eps, frozen)
    return grad_x, grads[:4], grads[4:] or [None] * len(rest[4:]), None


_block_train.register_autograd(_backward, setup_context=_setup_context)
