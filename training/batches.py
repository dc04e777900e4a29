"""The batches of a run. Every random number of a sample (its crop, gamma and eps) is a function of the seed and the
sample's index alone, so the processes of a run only share out indices, and a resumed run goes on at a later one."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dtpm_fast.config import Config
from dtpm_fast.cores import usable_cores
from dtpm_fast.data.crops import Stream, sample_rng
from dtpm_fast.diffusion import sample_gamma
from dtpm_fast.training.world import World

Pair = tuple[Tensor, Tensor]
Batch = list[Tensor]  # first and second picture, eps: (B, 3, H, W); gamma: (B,)


def batches(data: Dataset[Pair], config: Config, first: int, world: World, pin_memory: bool = False) -> Iterator[Batch]:
    """This process's batches, `accumulate` of them for each iteration from `first` to the last."""
    workers = min(config.train.workers, usable_cores())
    yield from DataLoader(
        Noisy(data, config),
        batch_sampler=_Indices(config, first, world),
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


class Noisy(Dataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """`self[index]` is (first, second, eps, gamma): a pair, and the noise of eq. 4 and 6 that goes with it. It is drawn
    here, in the loader's workers, because 6 million normal numbers a batch would hold up the training process."""

    def __init__(self, pairs: Dataset[Pair], config: Config) -> None:
        self.pairs, self.config = pairs, config

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, second = self.pairs[index]
        seed = sample_rng(self.config.train.seed, index, Stream.NOISE).integers(2**32)
        generator = torch.Generator().manual_seed(int(seed))
        gamma = sample_gamma(1, self.config.diffusion, generator)[0]
        return first, second, torch.randn(first.shape, generator=generator), gamma


class _Indices:
    """Iteration i takes samples i * G to (i + 1) * G, G = accumulate * processes * batch_size; the ranks take turns."""

    def __init__(self, config: Config, first: int, world: World) -> None:
        self.train, self.first, self.world = config.train, first, world

    def __iter__(self) -> Iterator[list[int]]:
        train, world = self.train, self.world
        for turn in range(self.first * train.accumulate, train.steps * train.accumulate):
            start = (turn * world.size + world.rank) * train.batch_size
            yield list(range(start, start + train.batch_size))
