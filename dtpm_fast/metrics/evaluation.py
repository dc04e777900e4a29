"""A set of pairs through several methods: the figures of every picture, and their means."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtpm_fast.data.pictures import different_sizes
from dtpm_fast.errors import UserError
from dtpm_fast.images import read_image
from dtpm_fast.metrics.distortion import check_size
from dtpm_fast.metrics.niqe import Niqe
from dtpm_fast.metrics.perceptual import Lpips, PatchFid
from dtpm_fast.metrics.protocols import Protocol

Method = Callable[[Tensor], Tensor]  # (1, 3, H, W) float32 in [0, 1] to the same
INPUT = "input"


@dataclass(frozen=True)
class Row:
    """One picture: its name (the path below the set's folder), the size compared, and figures by method."""

    name: str
    width: int
    height: int
    figures: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Scored:
    """A row and the pictures behind it: (1, 3, H, W) in [0, 1], by method, and the target."""

    row: Row
    images: dict[str, Tensor]
    target: Tensor


def score(
    pairs: Sequence[tuple[Path, Path]],
    methods: Mapping[str, Method],
    protocol: Protocol,
    lpips: Lpips | None = None,
    fid: PatchFid | None = None,
    niqe: Niqe | None = None,
    rank: int = 0,
    size: int = 1,
) -> Iterator[Scored]:
    """Score each pair (degraded path, target path) by each method, the degraded picture itself ("input") first; of
    `size` processes that share a set, each takes every `size`-th pair.

    `fid` is updated with every picture; its distances come at the end from `fid.compute()`. Raises `UserError`
    naming the file when a picture is broken, too small to be measured, or not of its target's size.
    """
    common = Path(os.path.commonpath([degraded.parent for degraded, _ in pairs])) if pairs else Path()
    for degraded_path, target_path in pairs[rank::size]:
        degraded, target = read_image(degraded_path), read_image(target_path)
        if degraded.shape != target.shape:
            raise UserError(different_sizes(degraded_path, degraded.shape, target_path, target.shape))
        y_d, y_g = (_tensor(protocol.prepare(picture)) for picture in (degraded, target))
        images = {INPUT: y_d, **{name: method(y_d).cpu() for name, method in methods.items()}}
        figures = {}
        try:
            for name, image in images.items():
                figures[name] = protocol.compare(image, y_g)
                if lpips is not None:
                    figures[name]["lpips"] = lpips(protocol.rounded(image), y_g)
                if niqe is not None:
                    figures[name]["niqe"] = niqe(image)
        except UserError as error:
            raise UserError(f"{degraded_path}: {error}") from error
        if fid is not None:
            fid.update(images, y_g)
        height, width = y_g.shape[-2:]
        yield Scored(Row(str(degraded_path.relative_to(common)), width, height, figures), images, y_g)


def check_sizes(
    pairs: Sequence[tuple[Path, Path]],
    sizes: Sequence[tuple[int, int]],
    protocol: Protocol,
    lpips: Lpips | None = None,
    niqe: Niqe | None = None,
) -> None:
    """Raise `UserError` naming the first picture that `score` would find too small; `sizes` are (height, width)."""
    for (degraded, _), (height, width) in zip(pairs, sizes, strict=True):
        width, height = protocol.size(width, height)
        try:
            check_size(height, width)
            for metric in (lpips, niqe):
                if metric is not None:
                    metric.check_size(height, width)
        except UserError as error:
            raise UserError(f"{degraded}: {error}") from error


def mean_figures(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The mean of each figure over the pictures, by method: {"input": {"psnr_y": ...}, ...}."""
    return {
        method: {name: sum(row.figures[method][name] for row in rows) / len(rows) for name in figures}
        for method, figures in rows[0].figures.items()
    }


def _tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float() / 255
