"""Pictures with the noise of a camera's sensor, which whatever lifts contrast (haze above all) lifts as well."""

import numpy as np
import torch
from torchvision.transforms.v2.functional import gaussian_blur

# Lowest and highest of training's, in 8-bit levels: from none to what is plainly seen.
SIGMAS = (0.0, 8.0)
_GRAINS = (0.4, 1.0)  # pixels, the blur of a grain: between a sensor's single pixels and what denoising cameras leave


def with_noise(picture: np.ndarray, sigma: float, rng: np.random.Generator, grain: float | None = None) -> np.ndarray:
    """HxWx3 uint8 sRGB with normal noise of standard deviation `sigma` (8-bit levels), another in every channel.

    The same at every brightness: the shot noise of linear light grows with its square root, which sRGB's curve, nearly
    a square root, takes back (Anscombe 1948). `grain` is the standard deviation, in pixels, of a Gaussian that every
    grain is spread over, as demosaicing and a camera's denoising leave it; None is a grain a pixel.
    """
    noise = rng.standard_normal(picture.shape, dtype=np.float32)
    if grain is not None:
        noise = gaussian_blur(torch.from_numpy(noise.transpose(2, 0, 1)), 7, grain).numpy().transpose(1, 2, 0)
        noise /= noise.std()
    return np.clip(np.rint(picture + sigma * noise), 0, 255).astype(np.uint8)


def with_any_noise(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """HxWx3 uint8 sRGB with noise of a random strength, and in half of the pictures of a random grain."""
    sigma, grain = float(rng.uniform(*SIGMAS)), float(rng.uniform(*_GRAINS)) if rng.random() < 0.5 else None
    return with_noise(picture, sigma, rng, grain)
