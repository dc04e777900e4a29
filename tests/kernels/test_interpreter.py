"""Without a GPU the kernels still run: in Triton's interpreter, which must be chosen before triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import triton
from packaging import version

from dtpm_fast.kernels.device import INTERPRETED

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_*.py") if "\ndef test_triton" in path.read_text(encoding="utf-8"))


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
@pytest.mark.skipif(
    version.parse(triton.__version__) < version.parse("3.7")
    and version.parse(numpy.__version__) >= version.parse("2.4"),
    reason="the interpreter of this Triton cannot loop with this numpy; install numpy<2.4 or triton>=3.7",
)
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", str(HERE / file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
