"""Argument checks: what a kernel would read out of bounds or misread becomes an error that names the argument.

A wrong shape, stride or device is a `ValueError`, a wrong type or dtype a `TypeError`.
"""

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SAMPLES = 65535  # CUDA's limit for the second axis of a grid


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """A tensor of a floating dtype that the kernels know; float64 runs on the CPU only."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, not {_dtype(tensor)}")
    if tensor.is_cuda and tensor.dtype == torch.float64:
        raise TypeError(f"{name} is float64, which runs on the CPU only; use float32 on {tensor.device}")


def check_map(name: str, x: torch.Tensor) -> None:
    """A feature map (B, C, H, W), not empty, laid out densely: channels_last, or contiguous NCHW."""
    check_tensor(name, x)
    if x.is_cuda and x.dim() == 4 and x.shape[0] > SAMPLES:
        raise ValueError(f"{name} has {x.shape[0]} samples, and a launch takes {SAMPLES} at most; split the batch")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{name} must be a (B, C, H, W) map with no empty side, not {tuple(x.shape)}")
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(
            f"{name} has strides {tuple(x.stride())}; make it dense with "
            f"{name}.contiguous(memory_format=torch.channels_last)"
        )


def check_parameter(name: str, tensor: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor) -> None:
    """A dense weight of this shape, in `x`'s dtype, on `x`'s device."""
    check_vector(name, tensor, shape, x)
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} is {_dtype(tensor)} but the input is {_dtype(x)}; cast one, or use torch.autocast")


def check_vector(name: str, tensor: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor) -> None:
    """A dense small tensor of this shape on `x`'s device, of any floating dtype: it is read into float32."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but the input is on {x.device}; move one of them")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tuple(tensor.stride())}; make it contiguous with {name}.contiguous()")


def check_modulation(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    """One value per sample and channel, (B, C); rows may be strided or expanded, as a chunk's are."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(x.shape[:2]):
        raise ValueError(f"{name} must have shape (B, C) = {tuple(x.shape[:2])}, not {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but the input is on {x.device}; move one of them")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} has strides {tuple(tensor.stride())}; its channels must be adjacent")


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a dense map's channels are its contiguous axis (also where one pixel or channel makes both true)."""
    return x.is_contiguous(memory_format=torch.channels_last)


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """The memory format that a kernel reads `x` in, and writes its result in."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
