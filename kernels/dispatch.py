"""Which fused kernels run, and with which tile sizes: a recorded table, by kernel, channels and dtype.

`dispatch.json` beside this file holds it; `python -m dtpm_fast.kernels.tune` measures and writes one. A kernel runs
with the entry of the smallest listed channel count that holds its own. Where there is none, cuBLAS and the stand-alone
kernels do the work.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("dispatch.json")

Options = dict[str, int]


def options_of(kernel: str, channels: int, dtype: torch.dtype) -> Options | None:
    """Launch options of `kernel` for maps of `channels`; None where the table leaves the work to cuBLAS.

    An environment variable DTPM_FAST_DISPATCH names another table.
    """
    entries = _read(os.environ.get("DTPM_FAST_DISPATCH") or str(TABLE))["kernels"].get(kernel, [])
    fitting = [e for e in entries if e["bits"] == 8 * dtype.itemsize and e["channels"] >= channels]
    if not fitting:
        return None
    return min(fitting, key=lambda entry: entry["channels"])["options"]


@functools.cache
def _read(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))
