"""Work ahead in processes of their own: what is known of a job whose process died, and that the others go on."""

import os
import time
from collections.abc import Iterator

import pytest

from dtpm_fast.kernels.ahead import Ahead


def work(job: str) -> Iterator[None]:
    yield
    if job == "dies":
        os._exit(6)  # as after an abort of the compiler: no exception, no result
    if job == "fails":
        raise RuntimeError("no")
    if job == "lasts":
        time.sleep(600)
    yield


def test_a_job_whose_process_dies_is_known_and_the_others_go_on() -> None:
    with Ahead(work, ["dies", "ends", "fails", "lasts"], processes=1) as ahead:
        for job in ("dies", "ends", "fails"):
            ahead.wait(job, 300)
        assert [ahead.died(job) for job in ("dies", "ends", "fails", "lasts")] == [True, False, False, False]
        assert [ahead.steps(job) for job in ("dies", "ends", "fails")] == [1, 2, 1]
        assert not ahead.results["dies"].ready()
        assert ahead.results["ends"].successful()
        with pytest.raises(RuntimeError, match="no"):
            ahead.results["fails"].get()
        ahead.wait("lasts", 0.5)
        assert not ahead.results["lasts"].ready() and not ahead.died("lasts")
