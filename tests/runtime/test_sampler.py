from collections.abc import Callable
from typing import cast

import pytest
import torch

from dtpm_fast.config import Config
from dtpm_fast.diffusion import ddim_gammas, restore
from dtpm_fast.errors import UserError
from dtpm_fast.runtime.cpu_unet import native_update
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.sampler import Conditions, Steps, make_steps, sample, update


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"parameterization": "eps"},
        {"clip": False},
        {"eta": 0.6},
        {"eta": 1.0, "spacing": "linspace"},
        {"condition": "predicted"},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 4])
def test_the_table_is_the_papers_ddim(random_model: Callable[..., tuple], steps: int, settings: dict) -> None:
    model, config = random_model(**settings)
    model.double()
    y_d = torch.rand(1, 3, 16, 24, dtype=torch.float64) * 2 - 1
    reference = Reference(model, make_steps(config, steps))
    noise = noise_fields(5, 16, 24, reference.steps.noise_fields)
    # diffusion.restore draws float64 noise of its own from a generator; these fields are given to both.
    with torch.inference_mode():
        mine = sample(reference, reference.prepare(y_d), noise.double())
        given = cast(torch.Generator, _Fields(noise[1:]))
        theirs, _ = restore(model, y_d, noise[:1].double(), steps, config.diffusion, given)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


class _Fields:
    """Stands in for the generator of `diffusion.ddim`: hands out given fields."""

    device = "cpu"

    def __init__(self, fields: torch.Tensor) -> None:
        self.fields = list(fields)


@pytest.fixture(autouse=True)
def _given_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.randn

    def randn(*size: object, **options: object) -> torch.Tensor:
        generator = options.get("generator")
        if isinstance(generator, _Fields):
            return generator.fields.pop(0)[None].double()
        return drawn(*size, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "randn", randn)


class _Gaussian:
    """The exact denoiser of residuals N(0, s^2): the posterior mean of the residual given x."""

    def __init__(self, steps: Steps, s: float) -> None:
        self.steps, self.s = steps, s

    def prepare(self, y_d: torch.Tensor) -> Conditions:
        return {"y_eps": torch.zeros_like(y_d)}

    def step(
        self, x: torch.Tensor, previous: torch.Tensor, i: int, conditions: Conditions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gamma, row = float(self.steps.gammas[i]), self.steps.table[i]
        x0 = gamma**0.5 * self.s**2 / (gamma * self.s**2 + 1 - gamma) * x
        output = (x0 - row[1] * x) / row[2]
        return update(row, x, output, previous, conditions["y_eps"])

    def restore(self, y_d: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return sample(self, self.prepare(y_d), noise)


def test_dpm_solver_follows_the_exact_flow_closer_than_ddim() -> None:
    """For a Gaussian the probability flow has a closed form: x(t) = x(T) sqrt(v_t / v_T), v = gamma s^2 + 1 - gamma.
    The last step, first order in both samplers, is left out."""
    config, s = Config.of(preset="tiny", clip=False), 0.5
    start = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    conditions = {"y_eps": torch.zeros_like(start)}

    def error(sampler: str, count: int) -> float:
        gaussian = _Gaussian(make_steps(config, count, sampler), s)
        x, previous = start, torch.zeros_like(start)
        for i in range(count - 1):
            x, previous = gaussian.step(x, previous, i, conditions)
        v = gaussian.steps.gammas * s**2 + 1 - gaussian.steps.gammas
        return float((x - start * (v[-1] / v[0]) ** 0.5).abs().max())

    for count in (20, 40, 80):
        assert error("dpm++2m", count) < 0.5 * error("ddim", count)
    assert error("dpm++2m", 160) < 0.4 * error("dpm++2m", 80)  # second order: a quarter in the limit


def test_both_samplers_are_ddim_for_one_step_and_land_on_x0() -> None:
    config = Config.of(preset="tiny")
    for sampler in ("ddim", "dpm++2m"):
        last = make_steps(config, 7, sampler).table[-1]
        assert last[3:6].tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(make_steps(config, 1, "ddim").table, make_steps(config, 1, "dpm++2m").table)


def test_noise_is_a_function_of_seed_and_size() -> None:
    first = noise_fields(3, 5, 7, fields=2)
    assert torch.equal(first, noise_fields(3, 5, 7, fields=2))
    assert torch.equal(first[:1], noise_fields(3, 5, 7))
    assert not torch.equal(first, noise_fields(4, 5, 7, fields=2))
    many = noise_fields(0, 200, 200)
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02


def test_a_program_s_default_dtype_does_not_matter() -> None:
    noise, row = noise_fields(3, 5, 7), make_steps(Config.of(preset="tiny"), 2).table[0].float()
    expected = native_update(row, *[noise[None, 0]] * 4)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(noise, noise_fields(3, 5, 7))
        for given, ours in zip(native_update(row, *[noise[None, 0]] * 4), expected, strict=True):
            assert torch.equal(given, ours) and given.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_eta_takes_a_field_for_every_step_but_the_last() -> None:
    assert make_steps(Config.of(preset="tiny", eta=0.5), 4).noise_fields == 4
    assert make_steps(Config.of(preset="tiny"), 4).noise_fields == 1
    assert len(ddim_gammas(4, Config.of(preset="tiny").diffusion)) == len(make_steps(Config.of(preset="tiny"), 4))


def test_unusable_samplers_are_refused() -> None:
    with pytest.raises(UserError, match="unknown sampler 'euler'"):
        make_steps(Config.of(preset="tiny"), 4, "euler")
    with pytest.raises(UserError, match="deterministic"):
        make_steps(Config.of(preset="tiny", eta=0.5), 4, "dpm++2m")
    with pytest.raises(UserError, match="steps = 0"):
        make_steps(Config.of(preset="tiny"), 0)
