"""The figures of a validation, written out, and which of two validations is the better one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dtpm_fast.diffusion import Estimate, alphas_cumprod, ddim, estimate, restore
from dtpm_fast.training.validation import score, validate

CPU = torch.device("cpu")


@pytest.fixture
def pairs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    clean = [torch.rand(3, 16, 24, generator=generator) * 2 - 1 for _ in range(2)]
    return [(picture, (picture * 0.9 + 0.05).clamp(-1, 1)) for picture in clean]


def noise_of(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Drawn once for each pair, the same in every validation."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, *pair[0].shape, generator=generator) for pair in pairs]


def mean_psnr(images: list[Tensor], targets: list[Tensor]) -> float:
    """Of pictures in [-1, 1], as 8-bit ones."""
    found = []
    for image, target in zip(images, targets, strict=True):
        levels = [((x.double() + 1) / 2 * 255).round() for x in (image, target)]
        found.append(float(10 * torch.log10(255**2 / (levels[0] - levels[1]).square().mean())))
    return sum(found) / len(found)


@torch.no_grad()
def test_stage_1_written_out(random_model: Callable[..., tuple], pairs: list[tuple[Tensor, Tensor]]) -> None:
    model, config = random_model(0, 1, validation_steps=3, sigma_data=1.0)
    figures, picture = validate(model, config, pairs, CPU)
    drawn, losses = [], torch.zeros(5)
    for (x_g, y_s), noise in zip(pairs, noise_of(pairs), strict=True):
        y = y_s[None]

        def denoise(x: Tensor, gamma: Tensor, y: Tensor = y) -> Estimate:
            return estimate(model, x, y, gamma, None)

        drawn.append((y + ddim(denoise, noise, y, 3, config.diffusion)).clamp(-1, 1)[0])
        for level, t in enumerate((100, 300, 500, 700, 900)):  # the middles of five equal parts of the schedule
            gamma = alphas_cumprod(config.diffusion)[t].float()
            x_t = gamma.sqrt() * (x_g - y_s)[None] + (1 - gamma).sqrt() * noise
            losses[level] += (estimate(model, x_t, y, gamma[None], None).eps - noise).abs().mean() / 2
    photos = [x_g for x_g, _ in pairs]
    assert figures.pop("psnr_smoothed") == pytest.approx(mean_psnr([y_s for _, y_s in pairs], photos), abs=1e-3)
    assert figures.pop("psnr_texture") == pytest.approx(mean_psnr(drawn, photos), abs=1e-2)
    assert [figures[f"eps_loss_{level}"] for level in range(5)] == pytest.approx(losses.tolist(), rel=1e-4)
    assert score(figures) == pytest.approx(-losses.mean().item(), rel=1e-4)  # a smaller loss is better
    assert picture.min() >= 0 and picture.max() <= 1


@torch.no_grad()
def test_stage_2_written_out(random_model: Callable[..., tuple], pairs: list[tuple[Tensor, Tensor]]) -> None:
    pairs = [(degraded, clean) for clean, degraded in pairs]
    model, config = random_model(0, 2, validation_steps=3)
    restored = [
        restore(model, y_d[None], noise, 3, config.diffusion)
        for (y_d, _), noise in zip(pairs, noise_of(pairs), strict=True)
    ]
    targets = [y_g for _, y_g in pairs]
    wanted = {
        "psnr_input": mean_psnr([y_d for y_d, _ in pairs], targets),
        "psnr_predictor": mean_psnr([y_eps[0] for _, y_eps in restored], targets),
        "psnr_result": mean_psnr([result[0] for result, _ in restored], targets),
    }
    figures, _ = validate(model, config, pairs, CPU)
    assert figures == pytest.approx(wanted, abs=1e-2)
    assert score(figures) == figures["psnr_result"]
    alone, config = random_model(0, 2, tune="predictor")
    figures, _ = validate(alone, config, pairs, CPU)
    del wanted["psnr_result"]
    assert figures.keys() == wanted.keys() and figures["psnr_input"] == pytest.approx(wanted["psnr_input"], abs=1e-3)
    assert score(figures) == figures["psnr_predictor"]
