"""An exported folder against the plain float32 model, on random input: what decides whether it is put in place."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.sampler import Stepper, sample

BOUND_DB = {"fp32": 60.0, "fp16": 45.0, "bf16": 45.0}


class ExportedStepper(Stepper, Protocol):
    device: torch.device


@dataclass(frozen=True)
class Difference:
    """Of two restorations of one random image, on [-1, 1]; `psnr_db` with a peak of 2."""

    batch: int
    height: int
    width: int
    max_abs: float
    psnr_db: float

    def __str__(self) -> str:
        size = f"{self.batch} x 3 x {self.height} x {self.width}"
        return f"{size:>20}   max difference {self.max_abs:.2e}   PSNR {self.psnr_db:.1f} dB"


def difference(
    restore: Callable[[Tensor, Tensor], Tensor], reference: Stepper, batch: int, height: int, width: int, seed: int = 0
) -> Difference:
    """`restore(image, noise)` against all steps of the reference. A quarter of the image lies at the extremes, -1 and
    1. Raises `UserError` when the result holds a NaN or an infinity."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    image[..., : width // 4] = image[..., : width // 4].sign()
    noise = noise_fields(seed, height, width, reference.steps.noise_fields)
    with torch.no_grad():
        expected = sample(reference, reference.prepare(image), noise).double()
        got = restore(image, noise).cpu().double()
    if not bool(got.isfinite().all()):
        raise UserError(f"the exported graph gives NaN or infinity at {height}x{width}: export with --precision fp32")
    error = got - expected
    mean = float(error.square().mean())
    psnr = 999.0 if mean == 0 else 10 * math.log10(4 / mean)
    return Difference(batch, height, width, float(error.abs().max()), psnr)


def stepped(stepper: ExportedStepper) -> Callable[[Tensor, Tensor], Tensor]:
    """All steps on the stepper's own device, from tensors on any."""
    to = stepper.device
    return lambda image, noise: stepper.restore(image.to(to), noise.to(to))


def check(found: Difference, precision: str, what: str = "the exported graph", so: str = "nothing was written") -> None:
    """Raises `UserError` when the difference is above the bound of the precision."""
    if not found.psnr_db >= BOUND_DB[precision]:
        raise UserError(
            f"{what} differs from the model: {str(found).strip()}, below the {BOUND_DB[precision]:.0f} dB "
            f"that {precision} must reach; {so}"
        )
