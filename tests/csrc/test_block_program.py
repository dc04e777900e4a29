"""The CUDA smoother's source, run on the CPU with a thread for each GPU thread, against the CPU smoother."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dtpm_fast import rtv_smooth

SOURCE = Path(__file__).with_name("block_on_host.cpp")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("block") / "block_on_host"
    subprocess.run(["g++", "-O2", "-std=c++17", "-pthread", SOURCE, "-o", binary], check=True)
    return binary


# A single pixel, narrower than a warp, one band exactly, several bands with a pitch of the width or more, one band.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 3), np.float32),
        ((5, 9, 1), np.float64),
        ((32, 32, 3), np.float32),
        ((71, 33, 1), np.float32),
        ((67, 50, 3), np.float32),
        ((40, 63, 3), np.float64),
        ((3, 40, 3), np.float64),
        ((40, 20, 3), np.float32),
    ],
)
def test_agrees_with_the_cpu_smoother(program: Path, shape: tuple[int, int, int], dtype: type) -> None:
    image: np.ndarray = np.random.default_rng(sum(shape)).random(shape).astype(dtype)
    tol = 1e-5 if dtype is np.float32 else 1e-9
    expected, info = rtv_smooth(image, 0.005, 2.5, 0.03, 2, tol=4 * tol, return_info=True)  # 4: of small pictures
    height, width, channels = shape
    code = "f" if dtype is np.float32 else "d"
    arguments = [str(a) for a in (height, width, channels, code, 0.005, 2.5, 0.03, 2, tol)]
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    done = subprocess.run([program, *arguments], input=planes.tobytes(), capture_output=True, check=True, timeout=100)
    result = np.frombuffer(done.stdout, dtype, planes.size).reshape(planes.shape).transpose(1, 2, 0)
    reports = np.frombuffer(done.stdout[planes.nbytes :], np.dtype([("iterations", "i4"), ("residual", "f4")]))
    np.testing.assert_allclose(result, expected, rtol=0, atol=0.05 / 255 if dtype is np.float32 else 1e-7)
    assert np.abs(reports["iterations"] - info.iterations[0]).max() <= 2
    assert (reports["iterations"] >= 0).all()
