"""Equations 1, 2, 4 and 6, the parameterization and DDIM."""

import math
from itertools import pairwise

import pytest
import torch

from dtpm_fast.config import Config, DiffusionConfig, ModelConfig
from dtpm_fast.diffusion import (
    Estimate,
    add_noise,
    alphas_cumprod,
    ddim,
    ddim_gammas,
    ddim_timesteps,
    estimate,
    prior_gamma,
    restore,
    sample_gamma,
    scalings,
    stage1_loss,
    stage2_loss,
)
from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM, load_semantic_weights

SCHEDULE = DiffusionConfig()


def small_model(stage=2, **settings):
    """A tiny model whose every parameter has a value (fresh ones give zero), without a semantic encoder."""
    torch.manual_seed(1)
    config = Config.of(**{"preset": "tiny", "semantic_code": "none", **settings})
    model = DTPM(config.model, stage).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model, config


def test_equation_1_and_2_alphas_cumprod():
    product = 1.0
    bars = alphas_cumprod(SCHEDULE)
    assert bars[0] == 1 and len(bars) == 1001
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert bars[t + 1].item() == pytest.approx(product, rel=1e-12)
    assert bars[1000].sqrt().item() == pytest.approx(0.0064, abs=5e-5)


def test_equation_2_keeps_unit_variance():
    torch.manual_seed(0)
    x = add_noise(torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64), torch.tensor([0.0, 0.3, 0.8, 1.0]))
    assert x.std(dim=(1, 2, 3)) == pytest.approx(torch.ones(4), abs=0.02)


def test_gamma_is_drawn_between_neighbours_of_the_schedule():
    bars = alphas_cumprod(SCHEDULE)
    gamma = sample_gamma(4000, SCHEDULE, torch.Generator().manual_seed(0)).double()
    assert gamma.min() >= bars[-1] - 1e-6 and gamma.max() <= 1
    t = 1000 - torch.searchsorted(bars.flip(0), gamma)  # uniform in t: the schedule's inverse is uniform
    assert t.double().mean().item() == pytest.approx(500, abs=15)
    low, high = bars[t + 1].sqrt(), bars[t].sqrt()
    place = (gamma.sqrt() - low) / (high - low)
    assert place.mean().item() == pytest.approx(0.5, abs=0.03) and place.std().item() == pytest.approx(
        12**-0.5, abs=0.02
    )
    short = DiffusionConfig(gamma_sampling="discrete", timesteps=4)
    discrete = sample_gamma(400, short, torch.Generator().manual_seed(0))
    assert set(discrete.tolist()) == set(alphas_cumprod(short)[1:].float().tolist())  # t = 1..T: never without noise


@pytest.mark.parametrize("parameterization", ["preconditioned", "eps"])
def test_estimates_are_two_views_of_one(parameterization):
    """x_t = sqrt(gamma) x0_hat + sqrt(1 - gamma) eps_hat whatever the network says."""
    config = ModelConfig(parameterization=parameterization)
    gamma = torch.tensor([1e-4, 0.3, 0.99], dtype=torch.float64)
    x, output = torch.randn(3, 3, 4, 4).double(), torch.randn(3, 3, 4, 4).double()
    _, eps_x, eps_f, x0_x, x0_f = scalings(gamma, config)
    torch.testing.assert_close(add_noise(x0_x * x + x0_f * output, eps_x * x + eps_f * output, gamma), x)


def test_a_prior_is_asked_what_it_was_trained_for():
    """A residual of another spread, at the gamma where its signal-to-noise ratio is the prior's: the frozen network
    sees the same input and the same gamma, so its estimate is the same but for the spread."""
    prior, _ = small_model(1, sigma_data=0.1)
    settings = {"predictor": "none", "adapter_positions": "none", "prior_sigma_data": 0.1}
    task, config = small_model(2, sigma_data=0.035, **settings)
    task.load_state_dict(prior.state_dict())
    gamma = torch.tensor([0.3, 0.9, 0.999], dtype=torch.float64)
    told = prior_gamma(gamma, config.model)
    torch.testing.assert_close(told / (1 - told), gamma / (1 - gamma) * 0.35**2)
    residual, eps, y = (torch.randn(3, 3, 16, 16).double() for _ in range(3))
    ours = estimate(task, add_noise(0.35 * residual, eps, gamma), y, gamma, None, y)
    wanted = estimate(prior, add_noise(residual, eps, told), y, told, None)
    torch.testing.assert_close(ours.x0, 0.35 * wanted.x0)
    torch.testing.assert_close(ours.eps, wanted.eps)
    raw = Config.of(sigma_data=0.035, parameterization="eps", prior_sigma_data=0.1)
    assert torch.equal(prior_gamma(gamma, raw.model), gamma)  # knows no spread


def test_preconditioning_as_in_edm():
    """With F at its ideal for a Gaussian residual (0), x0_hat is the posterior mean a sigma^2 x / v, and the network's
    input has unit variance."""
    gamma, sigma = torch.tensor([0.5], dtype=torch.float64), ModelConfig().sigma_data
    c_in, _, _, x0_x, _ = scalings(gamma, ModelConfig())
    v = 0.5 * sigma**2 + 0.5
    assert x0_x.item() == pytest.approx(math.sqrt(0.5) * sigma**2 / v, rel=1e-12)
    assert c_in.item() ** 2 * v == pytest.approx(1, rel=1e-12)


def test_equation_4_written_out():
    model, config = small_model(stage=1, parameterization="eps", semantic_code="compact")
    x_g, y_s, eps = (torch.randn(2, 3, 16, 16).double() for _ in range(3))
    gamma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    root, rest = gamma.sqrt().view(2, 1, 1, 1), (1 - gamma).sqrt().view(2, 1, 1, 1)
    load_semantic_weights(model)  # random ones tell no picture from another
    code = model.code(y_s)  # of what inference has, not of the photo
    assert (code - model.code(x_g)).abs().max() > 1e-6
    f = model.denoise(root * (x_g - y_s) + rest * eps, y_s, gamma, code)
    for loss, norm in (("l1", torch.abs), ("l2", torch.square)):
        expected = norm(eps - f).mean()
        actual = stage1_loss(model, DiffusionConfig(loss=loss), x_g, y_s, eps, gamma)
        assert actual.item() == pytest.approx(expected.item(), rel=1e-10)
    assert config.diffusion.loss == "l1"


@pytest.mark.parametrize(
    "settings", [{}, {"condition": "predicted", "code_source": "degraded"}], ids=["the paper's", "the other choices"]
)
def test_equation_6_written_out(settings):
    model, config = small_model(parameterization="eps", semantic_code="compact", **settings)
    load_semantic_weights(model)  # random ones tell no picture from another
    y_g, y_d, eps = (torch.randn(2, 3, 16, 16).double() for _ in range(3))
    gamma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    y_eps = model.predictor(y_d)
    x_t = gamma.sqrt().view(2, 1, 1, 1) * (y_g - y_eps) + (1 - gamma).sqrt().view(2, 1, 1, 1) * eps
    y, seen = (y_eps, y_d) if settings else (y_d, y_eps)
    expected = (eps - model.denoise(x_t, y, gamma, model.code(seen), y_eps)).abs().mean()
    actual, predicted = stage2_loss(model, config.diffusion, y_g, y_d, eps, gamma)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-10)
    assert torch.equal(predicted, y_eps)


def test_equation_6_reaches_predictor_and_adapters_without_a_loss_of_their_own():
    model, config = small_model()
    y_g, y_d, eps = (torch.randn(1, 3, 16, 16).double() for _ in range(3))
    loss, _ = stage2_loss(model, config.diffusion, y_g, y_d, eps, torch.tensor([0.5], dtype=torch.float64))
    loss.backward()
    for part in (model.predictor, model.adapters):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_min_snr_weights_only_clean_samples_less(loss):
    """SNR is sigma_d^2 gamma / (1 - gamma), and the weight one of squared errors."""
    model, _ = small_model(stage=1, sigma_data=0.5)
    x, eps = torch.randn(1, 3, 16, 16).double(), torch.randn(1, 3, 16, 16).double()

    def ratio(gamma):
        gamma = torch.tensor([gamma], dtype=torch.float64)
        plain, weighted = (
            stage1_loss(model, DiffusionConfig(loss=loss, loss_weighting=w), x, x * 0, eps, gamma)
            for w in ("none", "min_snr")
        )
        return (weighted / plain).item()

    assert ratio(0.9) == pytest.approx(1)  # SNR 2.25
    weight = 5 / (0.25 * 0.99 / 0.01)
    assert ratio(0.99) == pytest.approx(weight if loss == "l2" else weight**0.5)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("gamma", [4e-5, 0.3, 0.999])
def test_edm_weighs_the_output_of_the_network_equally(loss: str, gamma: float):
    """Karras et al. 2022, table 1: against the target of F itself, F = (x0 - x0_x x_t) / x0_f."""
    model, _ = small_model(stage=1)
    residual, y, eps = (torch.randn(2, 3, 16, 16).double() for _ in range(3))
    gammas = torch.full((2,), gamma, dtype=torch.float64)
    x_t = add_noise(residual, eps, gammas)
    c_in, _, _, x0_x, x0_f = scalings(gammas, model.config)
    error = model.denoise(c_in * x_t, y, gammas, model.code(y)) - (residual - x0_x * x_t) / x0_f
    expected = error.abs().mean() if loss == "l1" else error.square().mean()
    found = stage1_loss(model, DiffusionConfig(loss_weighting="edm", loss=loss), y + residual, y, eps, gammas)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_trailing_timesteps():
    assert ddim_timesteps(4, SCHEDULE) == [999, 749, 499, 249]
    assert ddim_timesteps(7, SCHEDULE) == [999, 856, 713, 570, 428, 285, 142]  # rounded, not cut off
    assert ddim_timesteps(1, SCHEDULE) == [999]
    assert ddim_timesteps(1000, SCHEDULE) == list(range(999, -1, -1))
    assert ddim_gammas(10, SCHEDULE)[-1][1] == 1.0
    for steps in (0, 1001, -3, 2.5):
        with pytest.raises(UserError, match="from 1 to 1000"):
            ddim_timesteps(steps, SCHEDULE)


def test_other_timesteps():
    assert ddim_timesteps(4, DiffusionConfig(spacing="leading")) == [750, 500, 250, 0]
    assert ddim_timesteps(4, DiffusionConfig(spacing="linspace")) == [999, 666, 333, 0]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 7, 10, 50])
def test_timesteps_fall(spacing, steps):
    t = ddim_timesteps(steps, DiffusionConfig(spacing=spacing))
    assert len(t) == steps and all(a > b for a, b in pairwise(t)) and 0 <= t[-1] <= t[0] <= 999


@pytest.mark.parametrize("steps", [1, 4, 10, 1000])
def test_ddim_with_an_oracle_recovers_the_residual(steps):
    """An oracle knows r, and its eps is what is left of x_t: DDIM lands on r to 1e-5 for any number of steps."""
    torch.manual_seed(0)
    r = torch.rand(1, 3, 8, 8).double() * 2 - 1

    def oracle(x, gamma):
        gamma = gamma.view(-1, 1, 1, 1)
        eps = (x - gamma.sqrt() * r) / (1 - gamma).sqrt()
        return Estimate(eps, (x - (1 - gamma).sqrt() * eps) / gamma.sqrt())

    found = ddim(oracle, torch.randn(1, 3, 8, 8).double(), None, steps, SCHEDULE)
    assert (found - r).abs().max() < 1e-5


def test_ddim_in_t_steps_with_the_true_noise_inverts_the_forward_process():
    """x_T = sqrt(gamma) r + sqrt(1 - gamma) eps and a network that says eps: the path leads back to r."""
    r, eps = torch.rand(1, 3, 8, 8).double() - 0.5, torch.randn(1, 3, 8, 8).double()
    start = add_noise(r, eps, alphas_cumprod(SCHEDULE)[-1:])

    def oracle(x, gamma):
        gamma = gamma.view(-1, 1, 1, 1)
        return Estimate(eps, (x - (1 - gamma).sqrt() * eps) / gamma.sqrt())

    assert (ddim(oracle, start, None, 1000, SCHEDULE) - r).abs().max() < 1e-5


def test_as_gamma_goes_to_1_the_estimate_is_the_input():
    """Nothing is left of the noise: the clean estimate is x_t itself, the residual."""
    model, _ = small_model(stage=1)
    r = torch.rand(1, 3, 16, 16).double() - 0.5
    found = estimate(model, r, r * 0, torch.ones(1, dtype=torch.float64) - 1e-14, None)
    torch.testing.assert_close(found.x0, r, atol=1e-5, rtol=0)


def test_the_clipped_sampler_stays_in_the_picture():
    torch.manual_seed(0)
    base = torch.rand(1, 3, 8, 8) * 2 - 1
    wild = lambda x, gamma: Estimate(torch.randn_like(x), torch.randn_like(x) * 50)  # noqa: E731
    assert (base + ddim(wild, torch.randn(1, 3, 8, 8), base, 4, SCHEDULE)).abs().max() <= 1 + 1e-6


def test_a_step_from_a_clipped_estimate_takes_the_noise_that_is_left():
    """Clipping x0 changes eps with it, so that the two still make x_t."""
    seen: list[torch.Tensor] = []

    def wild(x, gamma):
        seen.append(x)
        return Estimate(torch.zeros_like(x), torch.full_like(x, 50))

    noise, base = torch.randn(1, 3, 8, 8).double(), torch.full((1, 3, 8, 8), 0.25, dtype=torch.float64)
    found = ddim(wild, noise, base, 2, SCHEDULE)
    (first, second), (_, last) = ddim_gammas(2, SCHEDULE)
    eps = (noise - first**0.5 * 0.75) / (1 - first) ** 0.5
    assert last == 1
    torch.testing.assert_close(seen[1], second**0.5 * 0.75 + (1 - second) ** 0.5 * eps)
    torch.testing.assert_close(found, torch.full_like(base, 0.75))
    free = ddim(wild, noise, base, 2, DiffusionConfig(clip=False))
    assert (free == 50).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_samples_have_the_residuals_variance_for_any_eta(eta):
    """The ideal denoiser of a Gaussian residual of deviation 0.1 (x0_hat = a sigma^2 x / v) makes such residuals."""
    sigma2, generator = 0.01, torch.Generator().manual_seed(0)

    def ideal(x, gamma):
        a, s2 = gamma.view(-1, 1, 1, 1).sqrt(), 1 - gamma.view(-1, 1, 1, 1)
        v = a**2 * sigma2 + s2
        return Estimate(s2.sqrt() / v * x, a * sigma2 / v * x)

    noise = torch.randn(1, 3, 64, 64, generator=generator).double()
    one, two = (
        ddim(ideal, noise, None, 1000, DiffusionConfig(eta=eta), torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(one, two)
    assert one.std().item() == pytest.approx(0.1, rel=0.05)


def test_restore_is_deterministic_and_in_range():
    model, config = small_model()
    model = model.float()
    y_d, noise = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 3, 16, 24)
    (a, y_eps), (b, _) = (restore(model, y_d, noise, 4, config.diffusion) for _ in range(2))
    assert torch.equal(a, b) and a.abs().max() <= 1 and y_eps.abs().max() <= 1 and not torch.equal(a, y_eps)


@pytest.mark.parametrize(
    "settings",
    [
        {"predictor": "none"}, {"condition": "predicted"}, {"code_source": "degraded"}, {"adapter_kind": "gated"},
        {"adapter_positions": "none"}, {"adapter_positions": "decoder"}, {"parameterization": "eps"},
        {"semantic_code": "compact"},
    ],
)  # fmt: skip
def test_every_open_choice_runs(settings):
    torch.manual_seed(0)
    config = Config.of(**{"preset": "tiny", "semantic_code": "none", **settings})
    model = DTPM(config.model, 2).eval()
    y_d, noise = torch.rand(1, 3, 16, 24) * 2 - 1, torch.randn(1, 3, 16, 24)
    result, _ = restore(model, y_d, noise, 2, config.diffusion)
    assert torch.isfinite(result).all()
    assert torch.isfinite(stage2_loss(model, config.diffusion, y_d, y_d, noise, torch.tensor([0.5]))[0])
