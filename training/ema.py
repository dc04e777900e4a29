"""Exponential moving average of the trained parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dtpm_fast.training.interrupt import interrupts_wait


class EMA:
    """Averages with decay min(decay, (1 + step) / (10 + step)): a short run is not held back by its random start."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages stand in the model's place inside the `with`."""
        raw = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._copy(self.average)
            yield
        finally:
            with interrupts_wait():  # the averages must not be saved as the weights that train
                self._copy(raw)

    def load(self, average: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(average[name])

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
