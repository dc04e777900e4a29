"""The noise of a restoration: a function of the seed and the picture's size only, on every device and backend."""

import torch
from torch import Tensor


def noise_fields(seed: int, height: int, width: int, fields: int = 1) -> Tensor:
    """(fields, 3, height, width) float32, standard normal, drawn on the CPU.

    Field 0 starts the sampler; eta > 0 adds one field after every step but the last. All pictures of a batch share the
    fields, so that a batch gives what its pictures give one by one.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(3, height, width, generator=generator) for _ in range(fields)])
