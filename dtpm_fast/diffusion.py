"""Equations 1, 2, 4 and 6, the network's parameterization, and DDIM. The paper's gamma is alphas_cumprod.

Tensors over pixels are (B, 3, H, W); per-sample scalars such as gamma are (B,) and broadcast by `_wide`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from dtpm_fast.config import DiffusionConfig, ModelConfig
from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM

# ---------------------------------------------------------------------------------------------- noise, eq. 1 and 2


def alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """alpha_bar_t = prod (1 - beta_i), beta linear, for t = 0..T with alpha_bar_0 = 1: (T + 1,) float64.  (eq. 1, 2)"""
    betas = torch.linspace(config.beta_start, config.beta_end, config.timesteps, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)])


def add_noise(residual: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
    """x_t = sqrt(gamma) r + sqrt(1 - gamma) eps                                                              (eq. 2)"""
    gamma = _wide(gamma)
    return gamma.sqrt() * residual + (1 - gamma).sqrt() * eps


def sample_gamma(batch: int, config: DiffusionConfig, generator: torch.Generator) -> Tensor:
    """gamma ~ p(gamma) of eq. 4, (B,) float32: t uniform in 1..T, then sqrt(gamma) uniform between its neighbours in
    the schedule ("continuous"), or gamma = alpha_bar_t ("discrete")."""
    schedule = alphas_cumprod(config)
    t = torch.randint(1, config.timesteps + 1, (batch,), generator=generator)
    if config.gamma_sampling == "discrete":
        return schedule[t].float()
    low, high = schedule[t].sqrt(), schedule[t - 1].sqrt()
    u = torch.rand(batch, generator=generator, dtype=torch.float64)
    return (low + u * (high - low)).square().float()


# ------------------------------------------------------------------------------- what the network's output F means


def scalings(gamma: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Five scalars (B, 1, 1, 1) that turn the network's output F into estimates, for network input c_in * x_t:

        eps_hat = eps_x * x_t + eps_f * F             x0_hat = x0_x * x_t + x0_f * F

    Preconditioned (EDM in variance-preserving form), with a = sqrt(gamma), s^2 = 1 - gamma, v = a^2 sigma_d^2 + s^2:
    x0_hat = (a sigma_d^2 / v) x_t + (sigma_d s / sqrt v) F and eps_hat = (x_t - a x0_hat) / s, multiplied out so that
    nothing is divided by s. Raw epsilon, the paper's letter: eps_hat = F, x0_hat = (x_t - s F) / a.
    """
    a, s = _wide(gamma).sqrt(), (1 - _wide(gamma)).sqrt()
    if config.parameterization == "eps":
        return torch.ones_like(a), torch.zeros_like(a), torch.ones_like(a), 1 / a, -s / a
    sigma = config.sigma_data
    v = a**2 * sigma**2 + s**2
    return 1 / v.sqrt(), s / v, -a * sigma / v.sqrt(), a * sigma**2 / v, sigma * s / v.sqrt()


def prior_gamma(gamma: Tensor, config: ModelConfig) -> Tensor:
    """The gamma that the network is told: that at which stage I met the signal-to-noise ratio gamma sigma_d^2 /
    (1 - gamma) of stage II's x_t, if stage II has another sigma_d. Its input c_in x_t and the F that is asked of it
    depend on that ratio alone, so the frozen prior is asked what it was trained for. Raw epsilon has no sigma_d."""
    if config.parameterization == "eps" or not config.prior_sigma_data:
        return gamma
    signal = gamma * (config.sigma_data / config.prior_sigma_data) ** 2
    return signal / (signal + 1 - gamma)


@dataclass(frozen=True)
class Estimate:
    """What one evaluation of the network says about x_t: the noise in it, and the clean residual."""

    eps: Tensor
    x0: Tensor


def estimate(
    model: DTPM, x_t: Tensor, y: Tensor, gamma: Tensor, code: Tensor | None, y_eps: Tensor | None = None
) -> Estimate:
    """f_theta(x_t, y, gamma) of eq. 4 and 6 as estimates of eps and of the residual."""
    c_in, eps_x, eps_f, x0_x, x0_f = scalings(gamma, model.config)
    output = model.denoise(c_in * x_t, y, prior_gamma(gamma, model.config), code, y_eps).to(
        x_t.dtype
    )  # autocast's may be narrower
    return Estimate(eps=eps_x * x_t + eps_f * output, x0=x0_x * x_t + x0_f * output)


# ------------------------------------------------------------------------------------------ objectives, eq. 4 and 6


def stage1_loss(model: DTPM, config: DiffusionConfig, x_g: Tensor, y_s: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
    """E || eps - f_theta( sqrt(gamma) (x_g - y_s) + sqrt(1 - gamma) eps, y_s, gamma ) ||               (eq. 4)

    x_g: the photo, y_s: its RTV-smoothed self. The semantic code is y_s's. Returns the mean, a scalar.
    """
    x_t = add_noise(x_g - y_s, eps, gamma)
    return _distance(eps, estimate(model, x_t, y_s, gamma, model.code(y_s)).eps, gamma, config, model.config.sigma_data)


def stage2_loss(
    model: DTPM, config: DiffusionConfig, y_g: Tensor, y_d: Tensor, eps: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """E || eps - f_theta( sqrt(gamma) (y_g - g(y_d)) + sqrt(1 - gamma) eps, y_d, gamma ) ||            (eq. 6)

    y_d: the degraded picture, y_g: the ground truth. The gradient reaches the predictor g through the residual and
    through the adapters. Returns the mean loss and y_eps = g(y_d).
    """
    y_eps = model.predict(y_d)
    x_t = add_noise(y_g - y_eps, eps, gamma)
    found = estimate(model, x_t, model.condition_of(y_d, y_eps), gamma, model.code_of(y_d, y_eps), y_eps)
    return _distance(eps, found.eps, gamma, config, model.config.sigma_data), y_eps


def _distance(eps: Tensor, eps_hat: Tensor, gamma: Tensor, config: DiffusionConfig, sigma_data: float) -> Tensor:
    difference = eps_hat - eps
    if config.loss_weighting == "edm":
        # An error of eps is a sigma_d / sqrt(v) times one of F (`scalings`): equal in F (Karras et al. 2022, table 1).
        a = _wide(gamma).sqrt().clamp_min(1e-10)
        difference = difference * (a**2 * sigma_data**2 + 1 - a**2).sqrt() / (a * sigma_data)
    if config.loss_weighting == "min_snr":
        # min(SNR, 5) / SNR on a squared epsilon loss (Hang et al. 2023, "Min-SNR", eq. 8), its root on an absolute one;
        # SNR = sigma_d^2 gamma / (1 - gamma): theirs, for data whose variance is sigma_d^2.
        inverse = (1 - _wide(gamma)) / (sigma_data**2 * _wide(gamma)).clamp_min(1e-20)
        difference = difference * (5 * inverse).clamp(max=1).sqrt()
    return (difference.abs() if config.loss == "l1" else difference.square()).mean()


# ------------------------------------------------------------------------------------------------------------ DDIM


def ddim_timesteps(steps: int, config: DiffusionConfig) -> list[int]:
    """The t (0-based, as in 0..T-1) that a sampler of S steps visits, from noise to clean.

    Trailing spacing, the default: t_i = round(T - i T/S) - 1, 999, 749, 499, 249 for S = 4. Raises `UserError`
    unless S is a whole number and 1 <= S <= T.
    """
    total = config.timesteps
    if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= steps <= total:
        raise UserError(f"steps = {steps!r}: must be a whole number from 1 to {total}")
    if config.spacing == "trailing":
        return [round(total - i * total / steps) - 1 for i in range(steps)]
    if config.spacing == "leading":
        return [(steps - 1 - i) * (total // steps) for i in range(steps)]
    return [round(t) for t in torch.linspace(total - 1, 0, steps, dtype=torch.float64).tolist()]


def ddim_gammas(steps: int, config: DiffusionConfig) -> list[tuple[float, float]]:
    """(gamma, gamma of the next step) for each of the S steps; the last one lands on 1."""
    schedule = alphas_cumprod(config)
    gammas = [float(schedule[t + 1]) for t in ddim_timesteps(steps, config)]
    return list(zip(gammas, [*gammas[1:], 1.0], strict=True))


def ddim(
    denoise: Callable[[Tensor, Tensor], Estimate],
    noise: Tensor,
    base: Tensor | None,
    steps: int,
    config: DiffusionConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Denoising diffusion implicit models (Song et al. 2020, eq. 12): noise (B, 3, H, W) to a residual.

    Args:
        denoise: estimates (eps, x0) for x_t and gamma (B,).
        base: the picture that the residual is added to; x0 is clipped to [-1 - base, 1 - base] at every step, because
            sqrt(alpha_bar_999) = 0.0064 multiplies an error of eps by 157. None does not clip.
        generator: source of the fresh noise of eta > 0.
    """
    x = noise
    for gamma, gamma_next in ddim_gammas(steps, config):
        found = denoise(x, torch.full((x.shape[0],), gamma, device=x.device, dtype=x.dtype))
        x0, eps = found.x0, found.eps
        if base is not None and config.clip:
            x0 = torch.minimum(torch.maximum(x0, -1 - base), 1 - base)
            eps = (x - gamma**0.5 * x0) / (1 - gamma) ** 0.5
        sigma = config.eta * ((1 - gamma_next) / (1 - gamma) * (1 - gamma / gamma_next)) ** 0.5
        x = gamma_next**0.5 * x0 + max(0.0, 1 - gamma_next - sigma**2) ** 0.5 * eps
        if sigma > 0:
            fresh = torch.randn(
                x.shape, generator=generator, dtype=x.dtype, device=generator.device if generator else "cpu"
            )
            x = x + sigma * fresh.to(x.device)
    return x


def restore(
    model: DTPM,
    y_d: Tensor,
    noise: Tensor,
    steps: int,
    config: DiffusionConfig,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Stage II's inference, the plain reference: clip(y_eps + DDIM residual, -1, 1), and y_eps clipped likewise.

    y_d, noise: (B, 3, H, W), H and W multiples of `model.multiple`, y_d in [-1, 1], noise standard normal.
    """
    y_eps = model.predict(y_d)
    y, code = model.condition_of(y_d, y_eps), model.code_of(y_d, y_eps)
    residual = ddim(lambda x, gamma: estimate(model, x, y, gamma, code, y_eps), noise, y_eps, steps, config, generator)
    return (y_eps + residual).clamp(-1, 1), y_eps.clamp(-1, 1)


def texture(
    model: DTPM,
    y_s: Tensor,
    noise: Tensor,
    steps: int,
    config: DiffusionConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Stage I's inference: texture drawn from the prior onto the smoothed picture y_s, clip(y_s + residual, -1, 1)."""
    code = model.code(y_s)
    residual = ddim(lambda x, gamma: estimate(model, x, y_s, gamma, code), noise, y_s, steps, config, generator)
    return (y_s + residual).clamp(-1, 1)


def noise_levels(config: DiffusionConfig, count: int) -> Iterator[float]:
    """`count` gammas spread evenly over the schedule, noisiest last: for validation by noise level."""
    schedule = alphas_cumprod(config)
    for i in range(count):
        yield float(schedule[round((i + 0.5) * config.timesteps / count)])


def _wide(gamma: Tensor) -> Tensor:
    return gamma.view(-1, 1, 1, 1)
