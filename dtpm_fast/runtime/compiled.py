"""The plan's two modules through torch.compile."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.sampler import Conditions, Steps


class Compiled(Plan):
    """A plan of folded blocks, compiled by torch.compile on first use (about a minute for the first size, another one
    for the second, which makes the sizes symbolic; none after that).

    Inductor keeps what it compiled in TORCHINDUCTOR_CACHE_DIR between processes; where that is not set, in the user's
    cache folder (~/.cache/dtpm-fast/inductor).
    """

    def __init__(self, model: DTPM, steps: Steps, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model, steps, dtype)
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        kept = home / "dtpm-fast" / "inductor"
        with suppress(OSError):  # where it cannot be: Inductor's own, in the folder for temporary files
            kept.mkdir(parents=True, exist_ok=True)
            if os.access(kept, os.W_OK):
                os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
        self._prepare = torch.compile(self.prepare_module)
        self._step = torch.compile(self.step_module)

    def prepare(self, y_d: Tensor) -> Conditions:
        with _one_line():
            return self._prepare(y_d)

    def step(self, x: Tensor, previous: Tensor, i: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
        with _one_line():
            return self._step(x, previous, self.table[i], self.time_rows[i : i + 1], conditions)


@contextmanager
def _one_line() -> Iterator[None]:
    """A compiler that is missing or fails becomes one line."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        cause = str(error).strip().splitlines()[0]
        raise UserError(f"backend compiled: torch.compile failed ({cause}); use --backend fused") from error
