"""Which number format the maps have: bfloat16 where the hardware multiplies it, and measured to win."""

from collections.abc import Callable

import torch

from dtpm_fast.errors import UserError

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_precision(
    name: str, device: torch.device, native_for: Callable[[torch.dtype], str | None] = lambda _: None
) -> tuple[torch.dtype, str]:
    """The dtype of maps and weights, and why; on a CPU, `native_for` says which instruction set the C++ blocks take
    for a dtype, if they run in it. Raises `UserError` for an unknown name.

    The sampler's update, the picture and LN's statistics are float32 in either case.
    """
    if name not in PRECISIONS:
        raise UserError(f"unknown precision {name!r}; choose one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "this GPU multiplies it"
        return torch.float32, "this GPU does not multiply bfloat16"
    if native_for(torch.bfloat16):
        return torch.bfloat16, f"this CPU multiplies it ({native_for(torch.bfloat16)})"
    if native_for(torch.float32):  # no slower than PyTorch's operators in bfloat16 (docs/runtime.md), and exact
        return torch.float32, "what the C++ blocks take on this CPU"
    for unit in ("amx_bf16", "avx512_bf16"):
        if _cpu_has(unit):
            return torch.bfloat16, f"this CPU multiplies it ({unit})"
    return torch.float32, "this CPU does not multiply bfloat16"


def _cpu_has(unit: str) -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # newer than torch 2.11's first releases
    return capabilities is not None and bool(capabilities().get(unit, False))
