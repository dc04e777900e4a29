"""Training pairs of which a share has another degraded picture: a clean, a noisy one, or one out of a JPEG file."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dtpm_fast.data.crops import Stream, sample_rng, to_tensor
from dtpm_fast.data.jpeg import through_any_jpeg
from dtpm_fast.data.noise import with_any_noise
from dtpm_fast.errors import UserError


class _SomeChanged(Dataset[tuple[Tensor, Tensor]]):
    """A data set of pairs, of which a share has another degraded picture. Raises `UserError` outside 0..1."""

    def __init__(self, pairs: Dataset[tuple[Tensor, Tensor]], share: float, seed: int = 0) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"share of {type(self).__name__} {share}: must lie between 0 and 1")
        self.pairs, self.share, self.seed = pairs, share, seed


class SomeClean(_SomeChanged):
    """A share has the clean picture as its degraded one: who sees only bad photos learns to change good ones."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        degraded, clean = self.pairs[index]
        return (clean if sample_rng(self.seed, index, Stream.CLEAN).random() < self.share else degraded), clean


class _SomeThrough(_SomeChanged):
    """A share has its degraded picture, as 8 bits, through a function of it and of a generator of its own."""

    stream: Stream
    through: Callable[[np.ndarray, np.random.Generator], np.ndarray]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        degraded, clean = self.pairs[index]
        rng = sample_rng(self.seed, index, self.stream)
        return (to_tensor(self.through(_to_picture(degraded), rng)) if rng.random() < self.share else degraded), clean


class SomeNoisy(_SomeThrough):
    """With noise of a sensor: a network that never saw it takes it for texture, and lifts it with the contrast."""

    stream, through = Stream.SENSOR, staticmethod(with_any_noise)


class SomeJpeg(_SomeThrough):
    """Out of a JPEG file: the edges of blocks and the ringing around flakes and streaks are what a network that never
    saw them trips over."""

    stream, through = Stream.JPEG, staticmethod(through_any_jpeg)


def _to_picture(tensor: Tensor) -> np.ndarray:
    """HxWx3 uint8 of what `to_tensor` made of it."""
    return tensor.add(1).mul_(127.5).round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
