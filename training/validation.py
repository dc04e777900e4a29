"""How a run is doing on pictures that it does not train on."""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision.utils import make_grid

from dtpm_fast.config import Config
from dtpm_fast.diffusion import add_noise, estimate, noise_levels, restore, texture
from dtpm_fast.model.dtpm import DTPM

LEVELS = 5


@torch.no_grad()
def validate(
    model: DTPM, config: Config, pairs: list[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Mean figures over the pairs, always with the same noise, and a picture (3, H, W) in [0, 1] of the first ones.

    Stage I: the epsilon loss at 5 noise levels (`eps_loss_0` the cleanest), and how near the texture drawn from the
    prior comes to the photo (PSNR over RGB in dB), next to the smoothed picture's own. Stage II: PSNR over RGB of the
    input, of the predictor's picture and, unless the predictor trains alone, of the result.
    """
    generator = torch.Generator().manual_seed(0)
    steps = config.train.validation_steps
    figures: list[dict[str, float]] = []
    rows: list[Tensor] = []
    for first, second in pairs:
        a, b = (x[None].to(device, memory_format=torch.channels_last) for x in (first, second))
        noise = torch.randn(a.shape, generator=generator).to(device)
        if model.stage == 1:
            x_g, y_s = a, b
            drawn = texture(model, y_s, noise, steps, config.diffusion, generator)
            figure = {"psnr_smoothed": _psnr(y_s, x_g), "psnr_texture": _psnr(drawn, x_g)}
            for level, gamma in enumerate(noise_levels(config.diffusion, LEVELS)):
                gammas = torch.full((1,), gamma, device=device)
                found = estimate(model, add_noise(x_g - y_s, noise, gammas), y_s, gammas, model.code(y_s))
                figure[f"eps_loss_{level}"] = (found.eps - noise).abs().mean().item()
            row = [y_s, drawn, drawn - y_s, x_g]
        else:
            y_d, y_g = a, b
            if config.train.tune == "predictor":
                named = {"input": y_d, "predictor": model.predict(y_d)}
            else:
                result, y_eps = restore(model, y_d, noise, steps, config.diffusion, generator)
                named = {"input": y_d, "predictor": y_eps, "result": result}
            figure = {f"psnr_{name}": _psnr(image, y_g) for name, image in named.items()}
            row = [*named.values(), y_g]
        figures.append(figure)
        if len(rows) < 4:
            rows.append(torch.cat(row).float().cpu())
    means = {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}
    return means, make_grid(torch.cat(rows) * 0.5 + 0.5, nrow=len(row)).clamp(0, 1)


def score(figures: dict[str, float]) -> float:
    """How good a validation is, higher is better: PSNR of stage II's result (of the predictor, where it trains alone);
    in stage I, where each level counts the same, the mean epsilon loss with its sign changed."""
    for name in ("psnr_result", "psnr_predictor"):
        if name in figures:
            return figures[name]
    return -sum(figures[f"eps_loss_{level}"] for level in range(LEVELS)) / LEVELS


def _psnr(image: Tensor, target: Tensor) -> float:
    """PSNR over RGB in dB, after rounding to 8 bits, of pictures in [-1, 1]."""
    image, target = ((x.float() * 127.5 + 127.5).round().clamp(0, 255) for x in (image, target))
    return peak_signal_noise_ratio(image, target, data_range=255.0).clamp(max=100.0).item()
