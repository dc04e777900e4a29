"""The linear CG-adapter (equation 5) behind a block's output z: z + M_out (M_in z + condition)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpm_fast.kernels.checks import check_map, check_parameter, check_tensor


class MergedConv5(NamedTuple):
    """conv5 and the adapter behind it multiplied out. With z = y + gamma · (W5 h + b5), the adapter's result is
    y + weight · h + bias + matrix · y + M_out · condition: one pass over h, y and the condition."""

    weight: Tensor  # (C, C): (I + M_out M_in) diag(gamma) W5
    bias: Tensor  # (C,)
    matrix: Tensor  # (C, C): M_out M_in


class Adapter(NamedTuple):
    """A linear adapter of rank R. Biases have their place in the condition, and in conv5's bias."""

    m_in: Tensor  # (R, C)
    m_out: Tensor  # (C, R)
    condition: Tensor  # (B, R, H, W): of the picture, the same in every step
    merged: MergedConv5 | None = None  # what many channels take; left out, it is made on every call


def adapter_ref(z: Tensor, adapter: Adapter) -> Tensor:
    """The definition. z: (B, C, H, W)."""
    inside = F.conv2d(z, adapter.m_in[:, :, None, None]) + adapter.condition
    return z + F.conv2d(inside, adapter.m_out[:, :, None, None])


def merge_conv5(weight: Tensor, bias: Tensor, gamma: Tensor, m_in: Tensor, m_out: Tensor) -> MergedConv5:
    """Of conv5's weight (C, C, 1, 1) and bias (C,), gamma (1, C, 1, 1) and the adapter; computed in float32, or in
    float64 from it, and given in the weight's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    w5, b5, scale, into, out = (tensor.to(wide) for tensor in (weight.flatten(1), bias, gamma.flatten(), m_in, m_out))
    matrix = out @ into
    w5, b5 = scale[:, None] * w5, scale * b5
    found = w5 + matrix @ w5, b5 + matrix @ b5, matrix
    return MergedConv5(*(tensor.to(weight.dtype) for tensor in found))


def tensors_of(adapter: Adapter | None) -> list[Tensor]:
    """As an operator takes them: none, three, or six with the merged. Raises: `TypeError` for another tuple."""
    if adapter is None:
        return []
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter(m_in, m_out, condition), not {type(adapter).__name__}")
    return [*adapter[:3], *(adapter.merged or ())]


def adapter_of(tensors: list[Tensor]) -> Adapter | None:
    """What `tensors_of` took apart."""
    if not tensors:
        return None
    m_in, m_out, condition, *merged = tensors
    return Adapter(m_in, m_out, condition, MergedConv5(*merged) if merged else None)


def check_adapter(adapter: Adapter, x: Tensor) -> None:
    """Raises: `ValueError` for a wrong shape, stride or device, `TypeError` for a wrong dtype, naming the field."""
    check_tensor("adapter.m_in", adapter.m_in)
    c, r = x.shape[1], adapter.m_in.numel() // x.shape[1]
    check_parameter("adapter.m_in", adapter.m_in, (r, c), x)
    check_parameter("adapter.m_out", adapter.m_out, (c, r), x)
    condition = adapter.condition
    check_map("adapter.condition", condition)
    if condition.shape != (x.shape[0], r, *x.shape[2:]) or (condition.dtype, condition.device) != (x.dtype, x.device):
        raise ValueError(
            f"adapter.condition must be {(x.shape[0], r, *x.shape[2:])} in the input's dtype, on its device; it is "
            f"{tuple(condition.shape)} in {condition.dtype} on {condition.device}"
        )
    for name, tensor in ({} if adapter.merged is None else adapter.merged._asdict()).items():
        check_parameter(f"adapter.merged.{name}", tensor, (c,) if name == "bias" else (c, c), x)
