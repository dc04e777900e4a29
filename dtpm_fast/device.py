"""Which device runs, and why: said, never silent."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from dtpm_fast.errors import UserError


def choose_device(name: str = "auto") -> tuple[torch.device, str]:
    """The torch device for "auto", "cpu", "cuda" or "cuda:N", and one line that says why.

    Raises `UserError` when CUDA is asked for and absent, or the name is unknown.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"cuda ({torch.cuda.get_device_name()}): found and chosen by auto"
        return torch.device("cpu"), f"cpu ({torch.get_num_threads()} threads): no CUDA device was found"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {name}: no CUDA device is available here; use --device cpu or auto")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(f"device {name}: there are only {torch.cuda.device_count()} CUDA devices")
        return device, f"{name} ({torch.cuda.get_device_name(device)}): as asked"
    if device.type != "cpu":
        raise UserError(f"device {name}: only cpu and cuda are supported")
    return device, "cpu: as asked"


@contextmanager
def without_tf32() -> Iterator[None]:
    """float32 convolutions on CUDA in float32, where cuDNN's default is TF32. A program that chose a precision by
    PyTorch's newer names (`fp32_precision`) keeps its choice."""
    cudnn = torch.backends.cudnn
    with ExitStack() as kept:
        with suppress(RuntimeError):  # the newer names and these do not mix
            kept.enter_context(
                cudnn.flags(
                    enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
                )
            )
        yield


def free_cuda_memory(device: torch.device) -> int:
    """Bytes that are free on a CUDA device, those included that PyTorch keeps for the next tensors."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
