"""Several tasks on one network, one of them in place: changing the task copies what differs, and compiles, folds and
captures nothing again."""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor


class TaskSwap:
    """The tensors that run, and for every task known so far the values of those tensors that are not the same in all.

    Tasks of one prior differ in adapters, predictor and what is folded from them: a change copies megabytes, not the
    network, and every tensor keeps its address, so a captured graph replays with the new values.
    """

    def __init__(self, live: Mapping[str, Tensor], task: Hashable) -> None:
        self.live = dict(live)
        self.values: dict[Hashable, dict[str, Tensor]] = {task: {}}

    def add(self, task: Hashable, values: Mapping[str, Tensor]) -> None:
        """Learn another task, given all its tensors. Raises `ValueError` when they are of another network."""
        if values.keys() != self.live.keys() or any(values[name].shape != x.shape for name, x in self.live.items()):
            raise ValueError("the new weights are for a network of another shape")
        varying = next(iter(self.values.values()))
        for name, running in self.live.items():
            if name not in varying and not torch.equal(running, values[name]):
                common = running.clone()  # so far it was the same for every task
                for known in self.values.values():
                    known[name] = common
        self.values[task] = {name: values[name] for name in varying}

    def take(self, task: Hashable) -> None:
        """Put a known task's values in place."""
        for name, value in self.values[task].items():
            self.live[name].copy_(value)
