"""The processes that train one model together, as `torchrun` starts them. Without it a run is a world of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtpm_fast.device import choose_device
from dtpm_fast.errors import UserError
from dtpm_fast.training.rendezvous import fresh_store

# Rank 0 of a machine may decode a large data set, and rank 0 validate, while the others wait in their next exchange.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """This process among `size`: `rank` over all machines, `local_rank` on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def from_environment() -> "World":
        """As torchrun's variables say."""
        names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        return World(*(int(os.environ.get(name, default)) for name, default in names))

    @property
    def leads(self) -> bool:
        """Whether this process writes, prints and validates."""
        return self.rank == 0

    @property
    def checks_data(self) -> bool:
        """Whether this process decodes every picture before training: one on each machine."""
        return self.local_rank == 0

    def say(self, line: str) -> None:
        if self.leads:
            print(line, flush=True)

    def device(self, name: str) -> tuple[torch.device, str]:
        """This process's device and why: with several processes, each has the CUDA device of its local rank."""
        if self.size == 1:
            return choose_device(name)
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {name}: torchrun gives every process its own device; use auto, cpu or cuda")
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu"), f"cpu, {self.size} processes (gloo)"
        device, why = choose_device(f"cuda:{self.local_rank}")
        torch.cuda.set_device(device)
        return device, f"{why}, {self.size} processes (nccl)"

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[bool]:
        """The processes can exchange tensors inside the `with`. Gives whether torchrun has started them again, after
        one of them had died."""
        if self.size == 1:
            yield int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
            return
        store, again = fresh_store(self.rank, self.size, PATIENCE)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        try:
            yield again
        finally:
            dist.destroy_process_group()

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over the processes; all of them must call it."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value.item() / self.size

    def agreed(self, choice: tuple[bool, str]) -> tuple[bool, str]:
        """A choice and why, if every process chose it, else the first one's refusal; all of them must call it."""
        return next((each for each in self.gathered(choice) if not each[0]), choice)

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value in every process; all of them must call it."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value, by rank; all of them must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values
