"""Jobs that other processes do ahead of this one, and how far one came whose process died: a compiler may abort."""

import multiprocessing
import os
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from multiprocessing.pool import AsyncResult
from typing import Any, Generic, TypeVar

Job = TypeVar("Job", bound=Hashable)
Work = Callable[[Job], Iterable[Any]]

POLL = 0.2  # seconds between two looks at a process

_progress: Any = None  # in such a process: for every job the id of the process that took it, and its finished steps


class Ahead(Generic[Job]):
    """Runs `work` on every job in order, in `processes` at a time; leaving the context ends them, whatever they are at.

    Args:
        work: a function of a module, as other processes import it: gives something after each step of a job.
        jobs: picklable, different from each other.

    Attributes:
        results: of each job; one whose process died never gets ready.
    """

    def __init__(self, work: Work[Job], jobs: Sequence[Job], processes: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        # Without a lock, which a process that dies might hold; only one process writes a job's two numbers.
        self._progress = context.RawArray("q", 2 * len(jobs))
        self._pool = context.Pool(processes, _share, (self._progress,))
        self._places = {job: 2 * place for place, job in enumerate(jobs)}
        self.results: dict[Job, AsyncResult[None]] = {
            job: self._pool.apply_async(_run, (work, job, place)) for job, place in self._places.items()
        }

    def __enter__(self) -> "Ahead[Job]":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
        self._pool.join()

    def wait(self, job: Job, seconds: float) -> None:
        """Until it is done, or its process has died, or the time is over."""
        until = time.monotonic() + seconds
        while not self.results[job].ready() and not self.died(job) and (left := until - time.monotonic()) > 0:
            self.results[job].wait(min(left, POLL))

    def died(self, job: Job) -> bool:
        """Whether the process that took the job ended without a result of it."""
        process = self._progress[self._places[job]]
        return process > 0 and not _lives(process) and not self.results[job].ready()

    def steps(self, job: Job) -> int:
        """How many are finished."""
        return int(self._progress[self._places[job] + 1])


def _share(progress: Any) -> None:
    global _progress
    _progress = progress


def _run(work: Work[Job], job: Job, place: int) -> None:
    _progress[place] = os.getpid()
    for _ in work(job):
        _progress[place + 1] += 1


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:  # the pool has buried it
        return False
    return True
