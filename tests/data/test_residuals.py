import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dtpm_fast.data.command import main
from dtpm_fast.data.crops import SyntheticCrops
from dtpm_fast.data.degradations.fields import grainy_noise, spectrum_frequencies
from dtpm_fast.data.layouts import find_pairs
from dtpm_fast.data.residuals import STATISTICS, correlation_shape, quantile_table, residual_statistics
from dtpm_fast.images import read_image

SHARED = Path(os.environ.get("DTPM_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize("angle", [-25.0, 0.0, 20.0])
def test_correlation_shape_of_known_noise(angle: float) -> None:
    """Gaussian smoothing of standard deviation s gives the correlation exp(-d² / 4 s²): half at 1.665 s."""
    shape = (240, 260)
    noise = grainy_noise(
        spectrum_frequencies(*shape), np.random.default_rng(5), shape, 8.0, 2.0, float(np.deg2rad(angle))
    )
    found, along, across = correlation_shape(noise)
    assert found == pytest.approx(angle, abs=4)
    assert along == pytest.approx(1.665 * 8, rel=0.2)
    assert across == pytest.approx(1.665 * 2, rel=0.2)


def test_statistics_of_a_known_pair() -> None:
    clean = np.full((40, 50, 3), 100, dtype=np.uint8)
    degraded = clean.copy()
    degraded[:10] += 20  # a quarter of the rows
    found = residual_statistics(degraded, clean)
    assert found.keys() == STATISTICS.keys()
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / 100))
    assert found["mean"] == pytest.approx(5)
    assert found["above5"] == pytest.approx(0.25)
    assert found["p90"] == 20
    unchanged = residual_statistics(clean, clean)
    assert unchanged["along"] == 0
    assert unchanged["psnr"] > 90


def test_quantile_table_is_markdown() -> None:
    rows = [dict.fromkeys(STATISTICS, value) for value in (1.0, 2.0, 3.0)]
    table = quantile_table([("a", rows), ("b", rows[:1])]).splitlines()
    assert len(table) == 2 + len(STATISTICS)
    assert table[0] == "| statistic | a (3) | b (1) |"
    assert "1.2 / 2.0 / 2.8 | 1.0 / 1.0 / 1.0" in table[2]


def test_measure_command(
    photos: Path, tmp_path: Path, picture: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("input", "target"):
        picture(tmp_path / "pairs" / side / "a.png", 40, 40, seed=len(side))
    arguments = ["measure", "--task", "derain", "--photos", str(photos), "--count", "3", "--crop", "32"]
    assert main([*arguments, "--pairs", str(tmp_path / "pairs")]) == 0
    printed = capsys.readouterr().out
    assert "| statistic | synthetic (3) | pairs (1) |" in printed
    assert "32x32 sample" in printed


@pytest.mark.skipif(not (SHARED / "rain100L").is_dir(), reason=f"no rain100L in {SHARED} (set DTPM_SHARED_DATA)")
def test_synthetic_rain_is_like_rain100l() -> None:
    """Medians over pictures, held against the training pairs only."""
    pairs = find_pairs("derain", SHARED / "rain100L", "train", SHARED / "rain100_project_split.csv").pairs[::3]
    real = [residual_statistics(read_image(degraded), read_image(clean)) for degraded, clean in pairs]
    crops = SyntheticCrops(sorted((SHARED / "stage1/val").glob("*.webp")), "derain", 320, seed=0, augment="none")
    synthetic = []
    for index in range(40):
        degraded, clean = (((each + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for each in crops[index])
        synthetic.append(residual_statistics(degraded, clean))

    def median(rows: list[dict[str, float]], key: str) -> float:
        return float(np.median([row[key] for row in rows]))

    assert median(synthetic, "psnr") == pytest.approx(median(real, "psnr"), abs=2.5)
    for key in ("mean", "std", "p99", "p99.9", "above5", "along", "across"):
        assert median(synthetic, key) == pytest.approx(median(real, key), rel=0.4), key
    assert max(abs(row["angle"]) for row in real + synthetic) < 36
