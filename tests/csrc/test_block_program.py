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


def run(
    program: Path, image: np.ndarray, lam: float, sigma: float, sharpness: float, iterations: int, tol: float
) -> tuple[np.ndarray, np.ndarray]:
    """The smoothed picture and the reports, of which a negative number of iterations says that a solve failed."""
    code = "f" if image.dtype == np.float32 else "d"
    arguments = [str(a) for a in (*image.shape, code, lam, sigma, sharpness, iterations, tol)]
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    done = subprocess.run([program, *arguments], input=planes.tobytes(), capture_output=True, check=True, timeout=100)
    result = np.frombuffer(done.stdout, image.dtype, planes.size).reshape(planes.shape).transpose(1, 2, 0)
    return result, np.frombuffer(done.stdout[planes.nbytes :], np.dtype([("iterations", "i4"), ("residual", "f4")]))


# A single pixel, narrower than a warp, one band exactly, several bands with a pitch of the width or more, one band. Of
# four iterations the last has the smallest sigma that there is.
@pytest.mark.parametrize(
    ("shape", "dtype", "iterations"),
    [
        ((1, 1, 3), np.float32, 4),
        ((5, 9, 1), np.float64, 4),
        ((32, 32, 3), np.float32, 4),
        ((71, 33, 1), np.float32, 2),
        ((67, 50, 3), np.float32, 2),
        ((40, 63, 3), np.float64, 2),
        ((3, 40, 3), np.float64, 2),
        ((40, 20, 3), np.float32, 2),
    ],
)
def test_agrees_with_the_cpu_smoother(program: Path, shape: tuple[int, int, int], dtype: type, iterations: int) -> None:
    image: np.ndarray = np.random.default_rng(sum(shape)).random(shape).astype(dtype)
    tol = 1e-5 if dtype is np.float32 else 1e-9
    settings = 0.005, 2.5, 0.03, iterations
    expected, info = rtv_smooth(image, *settings, tol=4 * tol, return_info=True)  # 4: of small pictures
    result, reports = run(program, image, *settings, tol)
    np.testing.assert_allclose(result, expected, rtol=0, atol=0.05 / 255 if dtype is np.float32 else 1e-7)
    assert np.abs(reports["iterations"] - info.iterations[0]).max() <= 2
    assert (reports["iterations"] >= 0).all()


@pytest.mark.parametrize("sigma", [2.3, 4.6])
def test_the_gaussian_reaches_as_far_as_the_cpus(program: Path, sigma: float) -> None:
    """5 sigma + 1/2 is a whole number here, which sigma rounded to float32 falls short of."""
    image = np.random.default_rng(3).random((24, 30, 1)).astype(np.float32)
    settings = 0.02, sigma, 0.02, 2
    expected = rtv_smooth(image, *settings, tol=4e-5)
    result, _ = run(program, image, *settings, 1e-5)
    np.testing.assert_allclose(result, expected, rtol=0, atol=0.05 / 255)


@pytest.mark.parametrize("lam", [1e8, 1e39], ids=["goes nowhere", "not finite"])
def test_a_solve_that_does_not_converge_says_so(program: Path, lam: float) -> None:
    """Where the CPU smoother raises: weights beyond float32."""
    image = np.random.default_rng(12).random((3, 4, 1)).astype(np.float32)
    _, reports = run(program, image, lam, 3.0, 1e-6, 1, 1e-5)
    assert reports["iterations"].tolist() == [-1]
