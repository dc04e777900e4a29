"""The kinds of photo that a Restorer takes, and their way to the network and back.

Inside, a photo is a batch (B, 3, H, W), uint8 or float32 in [0, 1]; the network sees float32 in [-1, 1].
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dtpm_fast.images import read_image, to_rgb8


def open_photo(photo: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A batch (B, 3, H, W), uint8 or float32 in [0, 1], and the way back from a restored batch of the same dtype.

    A path or a Pillow image comes back as a Pillow image, an HxWx3 uint8 array as an array, an NCHW tensor as a tensor
    on its own device. Raises `UserError` for an unreadable file, `TypeError` and `ValueError` for a wrong object.
    """
    if isinstance(photo, (str, Path)):
        return _from_array(read_image(photo)), lambda batch: Image.fromarray(_to_array(batch))
    if isinstance(photo, Image.Image):
        return _from_array(to_rgb8(photo)), lambda batch: Image.fromarray(_to_array(batch))
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or photo.size == 0:
            raise ValueError(f"an array must be HxWx3 uint8 and not empty, got shape {photo.shape} of {photo.dtype}")
        return _from_array(photo), _to_array
    if isinstance(photo, Tensor):
        if not photo.is_floating_point() or photo.ndim != 4 or photo.shape[1] != 3 or photo.numel() == 0:
            raise ValueError(
                "a tensor must be (B, 3, H, W), floating point in [0, 1] and not empty, got shape "
                f"{tuple(photo.shape)} of {photo.dtype}"
            )
        low, high = (float(v) for v in photo.detach().aminmax())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"a tensor's values must lie in [0, 1], got {low} to {high}")
        return photo.detach().float(), lambda batch: batch.to(photo.device, photo.dtype)
    kind = type(photo).__name__
    raise TypeError(f"a photo is a path, a Pillow image, an HxWx3 uint8 array or an NCHW tensor, not {kind}")


def to_network(batch: Tensor) -> Tensor:
    """uint8 or [0, 1] to float32 in [-1, 1]."""
    return batch.float() / 127.5 - 1 if batch.dtype == torch.uint8 else batch * 2 - 1


def from_network(image: Tensor, dtype: torch.dtype) -> Tensor:
    """[-1, 1] to uint8, rounded to the nearest, or to float32 in [0, 1]."""
    image = image.float()
    if dtype == torch.uint8:
        return (image * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return (image * 0.5 + 0.5).clamp(0, 1)


def pad_to(image: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) to (B, C, height, width): mirrored at the lower and right border, as often as it takes (a side of
    one pixel is repeated)."""
    for dim, size in ((2, height), (3, width)):
        side = image.shape[dim]
        if side < size:
            mirrored = np.pad(np.arange(side), (0, size - side), mode="reflect" if side > 1 else "edge")
            image = image.index_select(dim, torch.from_numpy(mirrored).to(image.device))
    return image


def round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _from_array(rgb: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(rgb.transpose(2, 0, 1), order="C"))[None]  # a flipped view has negative strides


def _to_array(batch: Tensor) -> np.ndarray:
    return np.ascontiguousarray(batch[0].permute(1, 2, 0).cpu().numpy())
