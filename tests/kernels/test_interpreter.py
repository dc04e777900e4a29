"""Without a GPU the kernels still run: in Triton's interpreter, which must be chosen before triton is imported."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
import triton
from packaging import version

from dtpm_fast.kernels.device import INTERPRETED

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_*.py") if "\ndef test_triton" in path.read_text(encoding="utf-8"))
# The file whose tests take longest comes first, in two parts.
LONGEST = "test_denoising_block.py"
PARTS = [
    (LONGEST, "triton and float16"),
    (LONGEST, "triton and not float16"),
    *((file, "triton") for file in FILES if file != LONGEST),
]

# What the interpreter of Triton 3.6 does to numpy.
IGNORED = ["-W", "ignore:Conversion of an array with ndim > 0:DeprecationWarning"]

Done = subprocess.CompletedProcess[str]


def interpret(part: tuple[str, str]) -> Done:
    file, selection = part
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *IGNORED, "-k", selection, str(HERE / file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future[Done]]]:
    """A process for each part that this session is to run, one a CPU at a time: the interpreter computes on one."""
    chosen = [item for item in request.session.items if isinstance(item, pytest.Function)]
    parts = [item.callspec.params["part"] for item in chosen if item.function is test_in_the_interpreter]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {part: pool.submit(interpret, part) for part in parts}
        pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
@pytest.mark.skipif(
    version.parse(triton.__version__) < version.parse("3.7")
    and version.parse(numpy.__version__) >= version.parse("2.4"),
    reason="the interpreter of this Triton cannot loop with this numpy; install numpy<2.4 or triton>=3.7",
)
@pytest.mark.parametrize("part", PARTS, ids="-".join)
def test_in_the_interpreter(part: tuple[str, str], running: dict[tuple[str, str], Future[Done]]) -> None:
    done = running[part].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
