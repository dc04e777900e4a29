"""Both samplers as one table: with the steps fixed, a step is linear in x, in x0 and in the x0 before it.

    x0   = clip(x0_x * x + x0_f * F(c_in * x), -limit - y_eps, limit - y_eps)
    next = a * x + b * x0 + c * previous x0 + sigma * fresh noise

DDIM has c = 0; its clipping of eps (eps = (x - sqrt(gamma) x0) / sqrt(1 - gamma)) is in a and b already.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtpm_fast.config import Config
from dtpm_fast.diffusion import ddim_gammas, scalings
from dtpm_fast.errors import UserError

SAMPLERS: tuple[str, ...] = ("ddim", "dpm++2m")
Conditions = dict[str, Tensor]  # what `prepare` found once for a picture: flat, so that it can leave Python
C_IN, X0_X, X0_F, A, B, C, LIMIT = range(7)  # the columns of `Steps.table`


@dataclass(frozen=True)
class Steps:
    """The S steps of a sampler."""

    gammas: Tensor  # (S,) float64, the paper's gamma of each step
    table: Tensor  # (S, 7) float64: c_in, x0_x, x0_f, a, b, c, limit
    sigmas: tuple[float, ...]  # of the fresh noise after each step, all 0 unless eta > 0

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def noise_fields(self) -> int:
        """How many noise fields the sampler takes: the start, and one more for every sigma > 0."""
        return 1 + sum(sigma > 0 for sigma in self.sigmas)


class Stepper(Protocol):
    """What every backend offers: conditions once for a picture, then the steps."""

    steps: Steps

    def prepare(self, y_d: Tensor) -> Conditions:
        """y_d (B, 3, H, W) in [-1, 1] to the conditions, "y_eps" among them."""

    def step(self, x: Tensor, previous: Tensor, i: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """x of step i and the x0 of the step before to x of step i + 1 (without fresh noise) and its x0."""

    def restore(self, y_d: Tensor, noise: Tensor) -> Tensor:
        """`prepare` and all steps: y_d (B, 3, H, W) in [-1, 1], noise (fields, 3, H, W), to the restored picture."""


def make_steps(config: Config, steps: int, sampler: str = "ddim") -> Steps:
    """The table of a sampler with S steps. Raises `UserError` unless 1 <= S <= T, for an unknown sampler, and for
    DPM-Solver++ with eta > 0."""
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if sampler != "ddim" and config.diffusion.eta > 0:
        raise UserError(f"sampler {sampler}: is deterministic, but these weights ask for eta = {config.diffusion.eta}")
    pairs = ddim_gammas(steps, config.diffusion)
    gammas = torch.tensor([gamma for gamma, _ in pairs], dtype=torch.float64)
    c_in, _, _, x0_x, x0_f = (s.flatten() for s in scalings(gammas, config.model))
    rows, sigmas = [], []
    for i, (gamma, gamma_next) in enumerate(pairs):
        if sampler == "ddim":
            a, b, c, sigma = _ddim(gamma, gamma_next, config.diffusion.eta)
        else:
            a, b, c, sigma = _dpm_solver(pairs[i - 1][0] if i else None, gamma, gamma_next)
        limit = 1.0 if config.diffusion.clip else math.inf
        rows.append([float(c_in[i]), float(x0_x[i]), float(x0_f[i]), a, b, c, limit])
        sigmas.append(sigma)
    return Steps(gammas, torch.tensor(rows, dtype=torch.float64), tuple(sigmas))


def sample(stepper: Stepper, conditions: Conditions, noise: Tensor) -> Tensor:
    """All steps: noise (fields, 3, H, W) to the restored picture clip(y_eps + residual, -1, 1), (B, 3, H, W)."""
    y_eps = conditions["y_eps"]
    x = torch.empty_like(y_eps).copy_(noise[:1])  # in y_eps's layout, or compilers take the first step for another
    previous = torch.zeros_like(y_eps)
    fresh = 1
    for i, sigma in enumerate(stepper.steps.sigmas):
        x, previous = stepper.step(x, previous, i, conditions)
        if sigma > 0:
            x = x + sigma * noise[fresh]
            fresh += 1
    return (y_eps + x).clamp(-1, 1)


def update(row: Tensor, x: Tensor, output: Tensor, previous: Tensor, y_eps: Tensor) -> tuple[Tensor, Tensor]:
    """The two equations above, for row i of the table and the network's output F."""
    x0 = row[X0_X] * x + row[X0_F] * output
    x0 = torch.minimum(torch.maximum(x0, -row[LIMIT] - y_eps), row[LIMIT] - y_eps)
    return row[A] * x + row[B] * x0 + row[C] * previous, x0


def _ddim(gamma: float, gamma_next: float, eta: float) -> tuple[float, float, float, float]:
    """Song et al. 2020, eq. 12, with eps = (x - sqrt(gamma) x0) / sqrt(1 - gamma) put in."""
    sigma = eta * ((1 - gamma_next) / (1 - gamma) * (1 - gamma / gamma_next)) ** 0.5
    a = max(0.0, 1 - gamma_next - sigma**2) ** 0.5 / (1 - gamma) ** 0.5
    return a, gamma_next**0.5 - a * gamma**0.5, 0.0, sigma


def _dpm_solver(gamma_before: float | None, gamma: float, gamma_next: float) -> tuple[float, float, float, float]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), first order in the first step and in the last, where its
    half-log-SNR step is infinite."""
    a, b, c, sigma = _ddim(gamma, gamma_next, 0.0)
    if gamma_before is None or gamma_next == 1.0:
        return a, b, c, sigma
    before, now, after = (0.5 * math.log(g / (1 - g)) for g in (gamma_before, gamma, gamma_next))
    ratio = (now - before) / (after - now)
    # -alpha' (exp(-h) - 1) is DDIM's b, and D = (1 + 1 / 2r) x0 - 1 / 2r previous x0.
    return a, b * (1 + 0.5 / ratio), -b * 0.5 / ratio, 0.0
