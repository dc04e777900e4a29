"""Which fused kernels run, and with which tile sizes: a recorded table, by kernel, channels and dtype.

`dispatch.json` beside this file holds it; `python -m dtpm_fast.kernels.tune` measures and writes one. A kernel runs
with the entry of the smallest listed channel count that holds its own. Where there is none, or its options are null,
cuBLAS and the stand-alone kernels do the work.
"""

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("dispatch.json")

Options = dict[str, int]
Table = dict[str, list[dict[str, Any]]]

_in_use: list[Table] = []


def options_of(kernel: str, channels: int, dtype: torch.dtype) -> Options | None:
    """Launch options of `kernel` for maps of `channels`; None where the table leaves the work to cuBLAS."""
    fitting = [e for e in table().get(kernel, []) if e["bits"] == 8 * dtype.itemsize and e["channels"] >= channels]
    if not fitting:
        return None
    options: Options | None = min(fitting, key=lambda entry: entry["channels"])["options"]
    return options


def table() -> Table:
    """The table in use: `using_table`'s, else the file that DTPM_FAST_DISPATCH names, else the one recorded here."""
    return _in_use[-1] if _in_use else _read(os.environ.get("DTPM_FAST_DISPATCH") or str(TABLE))


@contextmanager
def using_table(kernels: Table) -> Iterator[None]:
    """Run with another table, as the tuner and the tests do."""
    _in_use.append(kernels)
    try:
        yield
    finally:
        _in_use.pop()


@functools.cache
def _read(path: str) -> Table:
    kernels: Table = json.loads(Path(path).read_text(encoding="utf-8"))["kernels"]
    return kernels
