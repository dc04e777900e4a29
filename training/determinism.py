"""Deterministic algorithms, where there is a choice."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def determinism(on: bool) -> Iterator[None]:
    """Inside the `with`, two runs of the same settings on the same machine and versions give the same bits, and an
    operation that cannot do that raises; off, cuDNN chooses the fastest algorithm by trying. The CPU needs no choice:
    there a run is deterministic either way."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
