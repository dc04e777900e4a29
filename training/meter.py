"""What a run costs: images per second, the share of time in which it waits for data, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Meter:
    """Measures the time between two readings, without what is spent in `paused`."""

    def __init__(self) -> None:
        self._since, self._waited, self._paused, self._images = time.perf_counter(), 0.0, 0.0, 0

    def count(self, images: int) -> None:
        self._images += images

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for data. The loop waits for the device in every iteration, so here the device is idle."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: validation, checkpoints."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """`images_per_s` and `data_stall` (share of the time, 0..1) since the last reading."""
        elapsed = max(time.perf_counter() - self._since - self._paused, 1e-9)
        found = {"images_per_s": self._images / elapsed, "data_stall": self._waited / elapsed}
        Meter.__init__(self)
        return found


def peak_memory(device: torch.device) -> float:
    """GiB: what PyTorch's allocator has held at most on a CUDA device, or what this process has on the CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
