"""Pictures of any size in bounded memory: overlapping windows, blended smoothly, one noise field for all.

The windows go through the network step by step: their outputs are blended into one map over the whole picture, and the
sampler updates the whole picture. What looks at the whole picture stays global: the semantic code is the whole
picture's, and channel attention's means are taken over the whole picture in a first pass over the windows (each
window with its own mean, over its core only), so that every window of the second pass scales its channels alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.runtime.cpu_unet import scratch
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.sampler import Conditions, sample
from dtpm_fast.runtime.unet import Mean, own_mean

Progress = Callable[[int, int], None]
OVERLAP = 64  # pixels that a window reaches beyond its core, on each side
SMALLEST = 128  # the smallest core worth its overlap


@dataclass(frozen=True)
class Span:
    """One window along one axis: its pixels, and its core, the pixels that no other window's core has."""

    start: int
    stop: int
    core_start: int
    core_stop: int


@dataclass(frozen=True)
class Window:
    rows: Span
    columns: Span

    def of(self, image: Tensor) -> Tensor:
        """The window's part of (B, C, H, W)."""
        rows, columns = self.rows, self.columns
        return image[..., rows.start : rows.stop, columns.start : columns.stop]

    def core(self, gated: Tensor) -> Tensor:
        """The core's part of the window's map (B, h, w, C) at any level."""
        scale = (self.rows.stop - self.rows.start) // gated.shape[1]
        (top, bottom), (left, right) = (
            ((s.core_start - s.start) // scale, (s.core_stop - s.start) // scale) for s in (self.rows, self.columns)
        )
        return gated[:, top:bottom, left:right]


def spans(side: int, core: int, overlap: int, multiple: int) -> list[Span]:
    """Windows of one size that cover 0..side, all of it multiples of `multiple`; one window where it fits."""
    size = core + 2 * overlap
    if side <= size:
        return [Span(0, side, 0, side)]
    count = -(-(side - 2 * overlap) // core)
    starts = [(side - size) * i // (count - 1) // multiple * multiple for i in range(count)]
    # A border between two cores lies in the middle of what the two windows share.
    shared = [(b + a + size) // 2 // multiple * multiple for a, b in pairwise(starts)]
    borders = [0, *shared, side]
    return [Span(s, s + size, a, b) for s, a, b in zip(starts, borders, borders[1:], strict=False)]


def windows(height: int, width: int, core: int, multiple: int, overlap: int = OVERLAP) -> list[Window]:
    """All windows of a picture whose sides are multiples of `multiple`, row by row."""
    core, overlap = (max(multiple, -(-v // multiple) * multiple) for v in (core, overlap))
    columns = spans(width, core, overlap, multiple)
    return [Window(rows, c) for rows in spans(height, core, overlap, multiple) for c in columns]


def blend_weight(window: Window, height: int, width: int, overlap: int = OVERLAP) -> Tensor:
    """(h, w) float32: 1 inside, a linear ramp of `overlap` pixels across the core's borders to the next windows; the
    weights of all windows sum to 1 at every pixel."""
    rows, columns = (_ramp(span, side, overlap) for span, side in ((window.rows, height), (window.columns, width)))
    return rows[:, None] * columns[None]


class Tiled:
    """A plan in windows: `prepare` and `step` over the whole picture, never more than one window of maps at a time.

    Args:
        plan: not of fused kernels, which cannot take channel attention's mean from outside.
        core: pixels on a side of a window's core; it reaches `overlap` further on every side.
        progress: called after every window with how many times one has been through a network, and of how many in all.
    """

    def __init__(
        self, plan: Plan, core: int, multiple: int, overlap: int = OVERLAP, progress: Progress | None = None
    ) -> None:
        if plan.form == "kernels":
            raise UserError("tiles need a plan of folded blocks, not of fused kernels")
        self.plan, self.steps = plan, plan.steps
        self.core, self.multiple, self.overlap = core, multiple, overlap
        self.progress, self.done = progress, 0
        self._networks = int(plan.prepare_module.predictor is not None)  # how many the windows go through

    def prepare(self, y_d: Tensor) -> Conditions:
        """Only pictures: the windows' own conditions are made anew in every step, and not kept."""
        prepare, y_eps = self.plan.prepare_module, y_d
        if prepare.predictor is not None:
            y_eps = y_d + self._blended(y_d, lambda window, mean: prepare.residual(window.of(y_d), mean))
        code = prepare.semantic_code(y_d, y_eps)
        conditions = {"y_d": y_d, "y_eps": y_eps}
        return conditions if code is None else {**conditions, "code": code}

    def step(self, x: Tensor, previous: Tensor, i: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
        row, time_row = self.plan.table[i], self.plan.time_rows[i : i + 1]
        y_d, y_eps, code = conditions["y_d"], conditions["y_eps"], conditions.get("code")

        def network(window: Window, mean: Mean) -> Tensor:
            own = self.plan.prepare_module.conditions(window.of(y_d), window.of(y_eps), code)
            return self.plan.step_module.network(window.of(x), row, time_row, own, mean)

        return self.plan.step_module.update(row, x, self._blended(x, network), previous, y_eps)

    def restore(self, y_d: Tensor, noise: Tensor) -> Tensor:
        self._networks += len(self.steps)
        with scratch.kept():
            return sample(self, self.prepare(y_d), noise)

    def _blended(self, like: Tensor, network: Callable[[Window, Mean], Tensor]) -> Tensor:
        """The network's outputs (B, 3, H, W), all windows with the means of the whole picture."""
        height, width = like.shape[-2:]
        tiles = windows(height, width, self.core, self.multiple, self.overlap)
        mean: Mean = own_mean
        if len(tiles) > 1:
            sums: dict[int, tuple[Tensor, int]] = {}
            for window in tiles:
                network(window, _recorder(sums, window))
                self._tell(2 * len(tiles))
            mean = _given({number: total / pixels for number, (total, pixels) in sums.items()})
        blended = torch.zeros_like(like)
        for window in tiles:
            output = network(window, mean)
            window.of(blended).add_(output * blend_weight(window, height, width, self.overlap).to(output))
            self._tell(2 * len(tiles) if len(tiles) > 1 else 1)
        return blended

    def _tell(self, in_a_network: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, in_a_network * self._networks)


def _recorder(sums: dict[int, tuple[Tensor, int]], window: Window) -> Mean:
    """The window's own mean, while its core is added to the sums of the whole picture."""

    def mean(number: int, gated: Tensor) -> Tensor:
        core = window.core(gated)
        total, pixels = sums.get(number, (0, 0))
        here = core.sum(dim=(1, 2), dtype=torch.promote_types(gated.dtype, torch.float32))[:, None]
        sums[number] = total + here, pixels + core.shape[1] * core.shape[2]
        return own_mean(number, gated)

    return mean


def _given(means: dict[int, Tensor]) -> Mean:
    return lambda number, gated: means[number].to(gated.dtype)


def _ramp(span: Span, side: int, overlap: int) -> Tensor:
    """(stop - start,): 1/2 at the borders of the core, and `overlap` pixels from 0 to 1 around them."""
    middle = torch.arange(span.start, span.stop, dtype=torch.float32) + 0.5
    ramp = torch.ones_like(middle)
    if span.core_start > 0:
        ramp = ramp.minimum((0.5 + (middle - span.core_start) / overlap).clamp(0, 1))
    if span.core_stop < side:
        ramp = ramp.minimum((0.5 + (span.core_stop - middle) / overlap).clamp(0, 1))
    return ramp
