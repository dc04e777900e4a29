"""What a degradation does to pictures, in numbers: to hold a synthetic one against the pairs of a data set."""

from collections.abc import Sequence

import numpy as np

STATISTICS = {
    "psnr": "PSNR of the degraded picture, dB",
    "mean": "mean of the residual, 8-bit levels",
    "std": "standard deviation",
    "p90": "90 % of the pixels are below",
    "p99": "99 %",
    "p99.9": "99.9 %",
    "above5": "share of pixels above 5",
    "angle": "direction of the longest correlation, degrees from the vertical",
    "along": "correlation falls to 1/2 along it, pixels",
    "across": "and across it, pixels",
}


def residual_statistics(degraded: np.ndarray, clean: np.ndarray) -> dict[str, float]:
    """The `STATISTICS` of one pair of HxWx3 uint8 pictures. The residual is the largest difference over the channels,
    which is the rain itself where rain is grey and added, saturated channels aside."""
    difference = degraded.astype(np.float64) - clean.astype(np.float64)
    residual = difference.max(axis=2)
    p90, p99, p999 = np.percentile(residual, [90, 99, 99.9])
    angle, along, across = correlation_shape(residual)
    return {
        "psnr": float(10 * np.log10(255**2 / max(float((difference**2).mean()), 1e-6))),
        "mean": float(residual.mean()),
        "std": float(residual.std()),
        "p90": float(p90),
        "p99": float(p99),
        "p99.9": float(p999),
        "above5": float((residual > 5).mean()),
        "angle": angle,
        "along": along,
        "across": across,
    }


def correlation_shape(field: np.ndarray) -> tuple[float, float, float]:
    """(angle in degrees from the vertical, positive to the right when going down; half-length along it; and across it,
    in pixels) of the HxW field's autocorrelation. The lengths are at most a quarter of the shorter side."""
    height, width = field.shape
    centred = field - field.mean()
    if not centred.any():
        return 0.0, 0.0, 0.0
    power = np.abs(np.fft.rfft2(centred, (2 * height, 2 * width))) ** 2  # padded: not periodic
    correlation = np.fft.fftshift(np.fft.irfft2(power, (2 * height, 2 * width)))
    correlation /= correlation[height, width]

    def at(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
        down, right = height + radius * np.cos(angle), width + radius * np.sin(angle)
        top, left = np.floor(down).astype(int), np.floor(right).astype(int)
        below, beside = down - top, right - left
        upper = correlation[top, left] * (1 - beside) + correlation[top, left + 1] * beside
        lower = correlation[top + 1, left] * (1 - beside) + correlation[top + 1, left + 1] * beside
        return upper * (1 - below) + lower * below

    reach = min(height, width) // 4
    radii = np.linspace(0, reach, 4 * reach + 1)
    angles = np.deg2rad(np.arange(-90, 90, 0.5))
    sums = sum(at(np.full_like(angles, share * min(reach, 20)), angles) for share in (0.3, 0.5, 0.7, 0.9))
    angle = angles[int(np.argmax(sums))]

    def half(direction: float) -> float:
        below = at(radii, np.full_like(radii, direction)) < 0.5
        return float(radii[int(np.argmax(below))] if below.any() else reach)

    return float(np.rad2deg(angle)), half(angle), half(angle + np.pi / 2)


def quantile_table(columns: Sequence[tuple[str, Sequence[dict[str, float]]]]) -> str:
    """Markdown: for every statistic the 10, 50 and 90 % quantiles over the pictures of each named set."""
    heads = [f"{name} ({len(rows)})" for name, rows in columns]
    lines = ["| statistic | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for key, meaning in STATISTICS.items():
        digits = 2 if key == "above5" else 1
        cells = []
        for _, rows in columns:
            quantiles = np.percentile([row[key] for row in rows], [10, 50, 90])
            cells.append(" / ".join(f"{value:.{digits}f}" for value in quantiles))
        lines.append(f"| {meaning} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
