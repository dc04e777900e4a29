import numpy as np
import pytest

from dtpm_fast.data.noise import SIGMAS, with_any_noise, with_noise


@pytest.mark.parametrize("grain", [None, 0.5, 1.0])
def test_noise_has_its_strength_and_grain(grain: float | None) -> None:
    grey = np.full((120, 90, 3), 128, np.uint8)
    noise = with_noise(grey, 6.0, np.random.default_rng(3), grain).astype(np.float64) - 128
    assert abs(noise.std() - 6) < 0.2 and abs(noise.mean()) < 0.2
    beside = np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1]
    # A Gaussian of this standard deviation, sampled and folded with itself, one pixel off.
    taps = np.exp(-0.5 * (np.arange(-3, 4) / (grain or 1e-3)) ** 2)
    assert beside == pytest.approx((taps[1:] * taps[:-1]).sum() / (taps**2).sum(), abs=0.05)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.05  # channels on their own
    assert (with_noise(grey, 0.0, np.random.default_rng(3), grain) == grey).all()


def test_noise_of_training_is_of_every_strength() -> None:
    grey = np.full((32, 32, 3), 128, np.uint8)
    sigmas = [with_any_noise(grey, np.random.default_rng(seed)).astype(float).std() for seed in range(60)]
    assert min(sigmas) < SIGMAS[0] + 1 and max(sigmas) > SIGMAS[1] - 1 and max(sigmas) < SIGMAS[1] + 0.5
