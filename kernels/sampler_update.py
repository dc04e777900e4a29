"""What a sampler does between two evaluations of the network, in one pass over its pictures."""

import torch
from torch import Tensor

from dtpm_fast.kernels.checks import check_map, check_vector
from dtpm_fast.kernels.device import runs_triton


def sampler_update(row: Tensor, x: Tensor, output: Tensor, previous: Tensor, y_eps: Tensor) -> tuple[Tensor, Tensor]:
    """`x0 = clip(x0_x · x + x0_f · output, -limit - y_eps, limit - y_eps)`, and the next x, `a · x + b · x0 + c ·
    previous`. Without gradients.

    Args:
        row: (7,), a sampler's step: c_in (not used here), x0_x, x0_f, a, b, c, limit.
        x, previous, y_eps: (B, C, H, W); x of this step, the x0 of the step before, the picture that x0 is added to.
        output: (B, C, H, W), the network's, in any dtype.

    Returns: the next x and x0, in `x`'s dtype; channels_last on a GPU.
    Raises: `ValueError` for a wrong shape or device, `TypeError` for a wrong dtype.
    """
    check_vector("row", row, (7,), x)
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), not {tuple(x.shape)}")
    for name, tensor in (("output", output), ("previous", previous), ("y_eps", y_eps)):
        if tensor.shape != x.shape:
            raise ValueError(f"{name} must have shape {tuple(x.shape)}, not {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move one of them")
        if tensor.dtype != x.dtype and name != "output":
            raise TypeError(f"{name} is {tensor.dtype} but x is {x.dtype}")
    if not runs_triton(x):
        return sampler_update_ref(row, x, output, previous, y_eps)
    maps = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, output, previous, y_eps)]
    for name, tensor in zip(("x", "output", "previous", "y_eps"), maps, strict=True):
        check_map(name, tensor)
    return _sampler_update(row, *maps)


def sampler_update_ref(
    row: Tensor, x: Tensor, output: Tensor, previous: Tensor, y_eps: Tensor
) -> tuple[Tensor, Tensor]:
    """The oracle of `sampler_update`."""
    _, x0_x, x0_f, a, b, c, limit = row
    x0 = x0_x * x + x0_f * output.to(x.dtype)
    x0 = torch.minimum(torch.maximum(x0, -limit - y_eps), limit - y_eps)
    return a * x + b * x0 + c * previous, x0


@torch.library.custom_op("dtpm_fast::sampler_update", mutates_args=())
def _sampler_update(row: Tensor, x: Tensor, output: Tensor, previous: Tensor, y_eps: Tensor) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):
        if not runs_triton(x):
            following, x0 = sampler_update_ref(row, x, output, previous, y_eps)
            layout = torch.channels_last
            return following.contiguous(memory_format=layout), x0.contiguous(memory_format=layout)
        from dtpm_fast.kernels.sampler_update_triton import launch

        return launch(row, x, output, previous, y_eps)


@_sampler_update.register_fake
def _(row: Tensor, x: Tensor, output: Tensor, previous: Tensor, y_eps: Tensor) -> tuple[Tensor, Tensor]:
    following, x0 = (torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2))
    return following, x0
