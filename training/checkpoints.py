"""What a killed run needs to go on bit for bit: trainer states, written whole, the last K kept.

A run folder holds `checkpoints/step-00001000.pt` (model, averages, optimiser, loss scale, step, best validation, and
config), `weights.safetensors` (the averages, for use), `weights-best.safetensors` (those of the best validation) and
TensorBoard's files. Random numbers need no state: batch, noise and gamma of an iteration are functions of the seed and
the iteration alone.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from dtpm_fast.atomic import atomic_path
from dtpm_fast.errors import UserError

logger = logging.getLogger("dtpm_fast")
RELEASE = 10.0  # seconds that a killed process may take to let go of its folder


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """The run folder for this process alone: two that resumed one run would write over each other's states. A killed
    process keeps no lock. Raises `UserError` while another process trains there."""
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=RELEASE)
    except Timeout:
        raise UserError(f"{run}: another process trains there; stop it first, or choose another folder") from None
    except NotImplementedError:
        logger.warning("%s: this file system has no locks; see that no other process trains there", run)
    try:
        for left in (*run.glob("checkpoints/.step-*.pt"), *run.glob(".weights*.safetensors")):
            left.unlink(missing_ok=True)  # half a file, of a process that was killed
        yield
    finally:
        lock.release()


def save_state(run: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state of `step` and remove all but the newest `keep`."""
    target = run / "checkpoints" / f"step-{step:08d}.pt"
    with atomic_path(target) as temporary:
        try:
            torch.save({"step": step, **state}, temporary)
        except RuntimeError as error:  # what PyTorch makes of a full disk
            raise OSError(f"{str(error).splitlines()[0]}; is the disk full?") from error
    # A newer one is one that could not be read: the run went on from before it.
    for old in [path for path in list_states(run) if path.name <= target.name][keep:]:
        old.unlink(missing_ok=True)
    return target


def list_states(run: Path) -> list[Path]:
    """The run's states, newest first."""
    found = [p for p in (run / "checkpoints").glob("step-*.pt") if re.fullmatch(r"step-\d{8}\.pt", p.name)]
    return sorted(found, reverse=True)


def newest_state(run: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest state that can be read, loaded without unpickling code, and a line for each one that cannot."""
    broken: list[str] = []
    for path in list_states(run):
        try:
            return torch.load(path, map_location="cpu", weights_only=True), broken
        except Exception as error:  # of damaged bytes the reader makes anything: struct.error, IndexError, MemoryError
            cause = next(iter(str(error).splitlines()), "") or type(error).__name__
            broken.append(f"{path}: not readable ({cause}); trying the one before")
    return None, broken
