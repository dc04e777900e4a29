"""Figure 8 of the paper: distortion and perception over the number of steps, drawn as an SVG file."""

import html
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from dtpm_fast.atomic import atomic_path

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 80, 640, 60, 370  # the frame
BLUE, RED = "#0b6e99", "#b3441e"
NAMES = {
    "psnr_y": "PSNR Y, dB ↑",
    "psnr_rgb": "PSNR RGB, dB ↑",
    "lpips": "LPIPS ↓",
    "ssim_y": "SSIM Y ↑",
    "ssim_rgb": "SSIM RGB ↑",
    "niqe": "NIQE ↓",
}


def write_curve(
    path: Path | str,
    figures: Mapping[float, Mapping[str, float]],
    left: str,
    right: str,
    title: str = "",
    over: str = "sampling steps S",
) -> None:
    """Draw the figures `left` and `right`, each with its own axis, over the steps S (or what `over` says).

    figures: mean figures by S, at least two of them, each with both names. Raises `ValueError` for fewer, `UserError`
    when the file cannot be written.
    """
    steps = sorted(figures)
    if len(steps) < 2:
        raise ValueError("a curve needs at least two points")
    x = _axis(0, max(steps) * 1.04, LEFT, RIGHT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">{html.escape(title)}</text>',
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}V{TOP}" fill="none" stroke="#888"/>',
    ]
    for step in steps:
        parts.append(_text(x(step), BOTTOM + 20, f"{step:g}", "middle"))
        parts.append(f'<path d="M{x(step):.1f} {BOTTOM}v5" stroke="#888"/>')
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 46, over, "middle"))
    for name, colour, side in ((left, BLUE, LEFT), (right, RED, RIGHT)):
        values = [figures[step][name] for step in steps]
        ticks = _ticks(min(values), max(values))
        y = _axis(ticks[0], ticks[-1], BOTTOM, TOP)
        outward, anchor = (-1, "end") if side == LEFT else (1, "start")
        for tick in ticks:
            parts.append(f'<path d="M{side} {y(tick):.1f}h{5 * outward}" stroke="#888"/>')
            parts.append(_text(side + 9 * outward, y(tick) + 4, _short(tick, ticks), anchor, colour))
        parts.append(_text(side, TOP - 14, NAMES.get(name, name), "middle", colour, weight=600))
        points = [f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True)]
        dash = "" if side == LEFT else ' stroke-dasharray="7 4"'
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for point, step, value in zip(points, steps, values, strict=True):
            cx, cy = point.split(",")
            about = html.escape(f"{step:g}: {NAMES.get(name, name)} {value:.4f}")
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="4" fill="{colour}"><title>{about}</title></circle>')
    with atomic_path(path) as temporary:
        text = "\n".join([*parts, "</svg>"]) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names that are no UTF-8


def _axis(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """The map of values low..high to coordinates first..last."""
    return lambda value: first + (value - low) * (last - first) / (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose low..high, with some room."""
    span = max(high - low, 1e-4 * max(1.0, abs(high)))
    step = 10 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step - 0.2), math.ceil(high / step + 0.2)
    return [i * step for i in range(first, last + 1)]


def _short(tick: float, ticks: list[float]) -> str:
    return f"{tick:.{max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))}f}"


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333", weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}">'
        f"{html.escape(text)}</text>"
    )
