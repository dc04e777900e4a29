"""How long a GPU takes for a step: its own time, without the host's, and with a cold L2 cache."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class Timer:
    """Milliseconds of a step on the device, and of the host until all of it is launched."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cache = torch.zeros(2**25 if device == "cuda" else 1, dtype=torch.int64, device=device)  # above any L2

    def time(self, step: Callable[[], Any]) -> tuple[float, float]:
        if self.device == "cpu":
            since = time.perf_counter()
            step()
            spent = 1e3 * (time.perf_counter() - since)
            return spent, spent
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.sum()  # a read: what a write leaves in the L2 cache would be written back while the step is timed
        torch.cuda._sleep(10_000_000)  # cycles, about 6 ms: longer than the host takes to launch a step
        start.record()
        since = time.perf_counter()
        step()
        launched = 1e3 * (time.perf_counter() - since)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), launched

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_mib(self, step: Callable[[], Any]) -> float | None:
        """What one step takes on top of what is allocated already."""
        if self.device == "cpu":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def copy_gb_per_s(self) -> float:
        """Of a device copy, read and written, median of the rounds."""
        source = torch.ones(2**28 if self.device == "cuda" else 2**22, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        spent = statistics.median(self.time(lambda: target.copy_(source))[0] for _ in range(10))
        return 2 * source.numel() / (spent * 1e-3) / 1e9
