"""The noise of a restoration: a function of the seed and the picture's size only, on every device and backend."""

from numbers import Integral

import torch
from torch import Tensor

from dtpm_fast.errors import UserError


def check_seed(seed: int) -> int:
    """The seed, if PyTorch's generators take it. Raises `UserError`."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= int(seed) < 2**64:
        raise UserError(f"seed {seed}: must be a whole number from -2^63 to 2^64 - 1")
    return int(seed)


def noise_fields(seed: int, height: int, width: int, fields: int = 1) -> Tensor:
    """(fields, 3, height, width) float32, standard normal, drawn on the CPU.

    Field 0 starts the sampler; eta > 0 adds one field after every step but the last. All pictures of a batch share the
    fields, so that a batch gives what its pictures give one by one.
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(fields, 3, height, width, dtype=torch.float32)
    for field in found:
        field.normal_(generator=generator)
    return found
