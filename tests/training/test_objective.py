"""The predictor's own loss in each of its norms."""

import math

import pytest
import torch

from dtpm_fast.config import Config
from dtpm_fast.diffusion import stage2_loss
from dtpm_fast.training.objective import PSNR_FLOOR, Objective


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(5)
    clean = torch.rand(3, 3, 16, 24, generator=generator) * 2 - 1
    noise = torch.randn(clean.shape, generator=generator) * torch.tensor([0.3, 0.03, 0.0])[:, None, None, None]
    return clean + noise, clean


def loss(random_model, norm, first, second):
    config = Config.of(preset="tiny", semantic_code="none", tune="predictor", predictor_norm=norm)
    objective = Objective(random_model(0, 2)[0], config)
    objective.model.predictor = None  # y_eps = y_d
    return objective(first, second, torch.zeros_like(first), torch.ones(len(first)))


def test_norms_are_what_they_are_called(random_model, pair):
    first, second = pair
    error = (first - second).double()
    found = {norm: loss(random_model, norm, first, second).item() for norm in ("l1", "l2", "psnr")}
    decibels = [10 * math.log10(one.square().mean().item() + PSNR_FLOOR) for one in error]
    wanted = {"l1": error.abs().mean().item(), "l2": error.square().mean().item(), "psnr": sum(decibels) / 3}
    assert found == pytest.approx(wanted, rel=1e-4)


def test_psnr_is_finite_and_flat_for_a_perfect_picture(random_model, pair):
    clean = pair[1].requires_grad_()
    value = loss(random_model, "psnr", clean, pair[1].detach())
    value.backward()
    assert value.item() == pytest.approx(10 * math.log10(PSNR_FLOOR))
    assert clean.grad.abs().max() == 0


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_predictors_loss_is_added_with_its_weight(random_model, pair, weight):
    model, config = random_model(0, 2, predictor_loss=weight, predictor_norm="l2")
    first, second = pair
    eps, gamma = torch.randn_like(first), torch.tensor([0.2, 0.5, 0.9])
    loss, y_eps = stage2_loss(model, config.diffusion, second, first, eps, gamma)
    wanted = loss + weight * (y_eps - second).square().mean()
    torch.testing.assert_close(Objective(model, config)(first, second, eps, gamma), wanted)
