"""The smoother's invariants over shapes, dtypes and parameters, and its agreement with scipy's sparse LU."""

import multiprocessing
import os
import subprocess
import sys
import threading
import types
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rtv_reference import early_stopped, rtv_matrix, rtv_reference, rtv_weights

from dtpm_fast import _rtv, rtv_smooth, smoothing

SETTINGS = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SHAPES = [(1, 1, 3), (1, 9, 3), (9, 1, 1), (2, 2, 3), (17, 31, 3), (33, 20, 1), (64, 47, 3)]


@st.composite
def pictures(draw: st.DrawFn, dtype: type = np.float32) -> np.ndarray:
    """HWC in [0, 1]: noise, edges, nearly black, flat and saturated ones."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    channels = draw(st.sampled_from([1, 3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    noise = rng.random((height, width, channels))
    kind = draw(st.sampled_from(["noise", "edges", "dark", "black but one", "flat", "saturated", "one channel"]))
    if kind == "edges":
        noise = 0.1 * noise + 0.8 * (np.add.outer(np.arange(height), np.arange(width)) % 17 > 8)[..., None]
    elif kind == "dark":
        noise = np.round(noise * 4) / 255
    elif kind == "black but one":
        noise = np.zeros_like(noise)
        noise[height // 2, width // 2] = 1 / 255
    elif kind == "flat":
        noise = 0.5 + 1e-4 * noise
    elif kind == "saturated":
        noise = np.clip(noise * 20 - 0.5, 0, 1)
    elif kind == "one channel":
        noise[..., 1:] = 0
    return noise.astype(dtype)


def kernel(image: np.ndarray, isa: str = "auto", threads: int = 1, **options: Any) -> np.ndarray:
    """The compiled function itself: it takes the instruction set."""
    arguments: dict[str, Any] = {
        "lam": 0.01, "sigma": 3.0, "sharpness": 0.02, "iterations": 4, "solver": "mic", "mode": "exact", "tol": 1e-5
    } | options  # fmt: skip
    out = np.empty_like(image)
    _rtv.smooth(image[None], out[None], threads=threads, isa=isa, **arguments)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", _rtv.instruction_sets())
def test_float64_is_the_exact_solution(shape: tuple[int, int, int], isa: str) -> None:
    image = np.random.default_rng(sum(shape)).random(shape)
    exact = rtv_reference(image)
    np.testing.assert_allclose(kernel(image, isa, tol=1e-10), exact, rtol=0, atol=1e-6)
    np.testing.assert_allclose(kernel(image, isa, solver="direct"), exact, rtol=0, atol=1e-10)


@SETTINGS
@given(pictures())
def test_float32_stays_within_a_tenth_of_a_step(image: np.ndarray) -> None:
    error = np.abs(rtv_smooth(image) - rtv_reference(image.astype(float)))
    assert error.max() < 0.1 / 255
    assert error.mean() < 0.005 / 255


@pytest.mark.parametrize("seed", [1133, 1043, 468, 158, 678, 858])
def test_saturated_noise_where_weights_amplify_most(seed: int) -> None:
    # The worst of 1,500 tiny pictures: at a relative residual of 3e-5 they are off by 0.13 to 0.37 of a step.
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 41, 2)
    channels = rng.choice([1, 3])
    image = np.clip(rng.random((height, width, channels)) * 20 - 0.5, 0, 1).astype(np.float32)
    assert np.abs(rtv_smooth(image) - rtv_reference(image.astype(float))).max() < 0.1 / 255


def test_a_large_picture_of_saturated_noise() -> None:
    image = np.clip(np.random.default_rng(1).random((512, 512)) * 20 - 0.5, 0, 1)
    assert np.abs(rtv_smooth(image.astype(np.float32)) - rtv_smooth(image, tol=1e-9)).max() < 0.1 / 255


@SETTINGS
@given(pictures(), st.sampled_from([0.0, 1e-3, 0.01, 0.05]), st.floats(0.3, 6.0), st.sampled_from([0.005, 0.02, 0.2]))
def test_a_float32_solve_with_any_parameters(image: np.ndarray, lam: float, sigma: float, sharpness: float) -> None:
    # One iteration: further ones take weights from the result, and amplify any difference on noise by up to a hundred.
    error = rtv_smooth(image, lam, sigma, sharpness, 1) - rtv_reference(image.astype(float), lam, sigma, sharpness, 1)
    assert np.abs(error).max() < 0.1 / 255
    assert np.abs(error).mean() < 0.005 / 255


@SETTINGS
@given(pictures())
def test_keeps_every_channel_mean_and_range(image: np.ndarray) -> None:
    smooth = rtv_smooth(image)
    np.testing.assert_allclose(smooth.mean((0, 1), dtype=float), image.mean((0, 1), dtype=float), rtol=0, atol=1e-6)
    slack = 0.1 / 255 * float(np.ptp(image)) + 1e-6
    assert smooth.min() >= image.min() - slack
    assert smooth.max() <= image.max() + slack


@SETTINGS
@given(pictures(np.float64))
def test_keeps_every_channel_mean_and_range_in_float64(image: np.ndarray) -> None:
    smooth = rtv_smooth(image, tol=1e-11)
    np.testing.assert_allclose(smooth.mean(axis=(0, 1)), image.mean(axis=(0, 1)), rtol=0, atol=1e-13)
    assert smooth.min() >= image.min() - 1e-9
    assert smooth.max() <= image.max() + 1e-9


@SETTINGS
@given(pictures())
def test_zero_lambda_is_the_identity(image: np.ndarray) -> None:
    np.testing.assert_array_equal(rtv_smooth(image, lam=0.0), image)


@pytest.mark.parametrize("value", [0, 1, 7, 255])
def test_a_constant_picture_is_unchanged(value: int) -> None:
    image = np.full((37, 23, 3), value, np.uint8)
    np.testing.assert_array_equal(rtv_smooth(image), image)
    as_float = np.full((37, 23, 3), value / 255, np.float32)
    np.testing.assert_allclose(rtv_smooth(as_float), as_float, rtol=0, atol=1e-6)


@SETTINGS
@given(pictures(np.float64))
def test_transposition_and_channel_order_commute(image: np.ndarray) -> None:
    smooth = rtv_smooth(image, tol=1e-11)
    np.testing.assert_allclose(rtv_smooth(image.swapaxes(0, 1), tol=1e-11), smooth.swapaxes(0, 1), rtol=0, atol=1e-8)
    np.testing.assert_allclose(rtv_smooth(image[..., ::-1], tol=1e-11), smooth[..., ::-1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mode", ["exact", "matlab_pcg"])
def test_instruction_sets_agree(dtype: type, mode: str) -> None:
    image: np.ndarray = np.random.default_rng(5).random((61, 83, 3)).astype(dtype)
    portable = kernel(image, "portable", mode=mode)
    for isa in _rtv.instruction_sets():
        np.testing.assert_allclose(kernel(image, isa, mode=mode), portable, rtol=0, atol=1e-5)


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(5).random((61, 83, 3)).astype(np.float32)
    for isa in _rtv.instruction_sets():
        monkeypatch.setenv("DTPM_FAST_RTV_ISA", isa)
        np.testing.assert_array_equal(rtv_smooth(image), kernel(image, isa, tol=1e-5 / 4))
    monkeypatch.setenv("DTPM_FAST_RTV_ISA", "sse9")
    with pytest.raises(ValueError, match="unknown instruction set sse9"):
        rtv_smooth(image)


@pytest.mark.parametrize("shape", [(1, 300, 3), (200, 7, 1), (150, 140, 3)])
@pytest.mark.parametrize("mode", ["exact", "matlab_pcg"])
def test_threads_do_not_change_the_result(shape: tuple[int, int, int], mode: str) -> None:
    image = np.random.default_rng(6).random(shape).astype(np.float32)
    alone = kernel(image, threads=1, mode=mode)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(kernel(image, threads=threads, mode=mode), alone)


@pytest.mark.parametrize(
    ("pictures_", "runnable", "expected"),
    [(1, 1, 4), (1, 3, 2), (1, 9, 1), (3, 2, 4), (3, 9, 3), (4, 9, 4), (64, 9, 4)],
)
def test_pictures_share_idle_cores_only(
    pictures_: int, runnable: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(smoothing, "_runnable", lambda: runnable)
    asked = []

    def smooth(*_: object, threads: int, **__: object) -> list[list[tuple[int, float]]]:
        asked.append(threads)
        return []

    monkeypatch.setattr(_rtv, "smooth", smooth)
    rtv_smooth(np.zeros((pictures_, 8, 8, 3), np.float32))
    assert asked == [expected]


def test_the_machine_says_how_many_threads_want_to_run() -> None:
    assert smoothing._runnable() >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processor affinity")
def test_threads_that_have_to_share_one_core() -> None:
    # Each of them loses the core in the middle of its work, so the others wait and then stay away.
    image = np.random.default_rng(16).random((200, 300, 3)).astype(np.float32)
    alone = kernel(image, threads=1)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        for _ in range(5):
            np.testing.assert_array_equal(kernel(image, threads=3), alone)
    finally:
        os.sched_setaffinity(0, cores)


def test_matlab_mode_is_the_early_stopped_solver() -> None:
    rng = np.random.default_rng(7)
    image = rng.random((14, 11, 3))
    image[:, :, 1] *= 0.1
    image[3:8, 2:9] += 0.4
    x, sigma, counts = image, 3.0, []
    for _ in range(4):
        matrix = rtv_matrix(*rtv_weights(x, sigma, 0.02), 0.01)
        channels = [early_stopped(matrix, image[:, :, c].ravel()) for c in range(3)]
        x = np.stack([solution.reshape(14, 11) for solution, _ in channels], axis=2)
        counts.append(max(count for _, count in channels))
        sigma = max(sigma / 2, 0.5)
    smooth, info = rtv_smooth(image, mode="matlab_pcg", return_info=True)
    np.testing.assert_allclose(smooth, x, rtol=0, atol=1e-12)
    assert info.iterations.tolist() == [counts]
    assert info.residuals.max() <= 0.1


def test_matlab_mode_has_nothing_to_solve_in_a_black_picture() -> None:
    smooth, info = rtv_smooth(np.zeros((6, 7, 3)), mode="matlab_pcg", return_info=True)
    assert not smooth.any()
    assert info.iterations.tolist() == [4 * [0]]
    assert info.residuals.tolist() == [4 * [0.0]]


@pytest.mark.parametrize("layout", ["HW", "HWC", "NHWC"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_layouts_and_dtypes(layout: str, dtype: type) -> None:
    shape = {"HW": (19, 26), "HWC": (19, 26, 3), "NHWC": (5, 19, 26, 3)}[layout]
    values = np.random.default_rng(8).random(shape)
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    image: np.ndarray = (np.rint(values * top) if top > 1 else values).astype(dtype)
    smooth, info = rtv_smooth(image, return_info=True, threads=2)
    assert smooth.shape == shape
    assert smooth.dtype == dtype
    assert info.iterations.shape == info.residuals.shape == (5 if layout == "NHWC" else 1, 4)
    assert (info.residuals <= 1e-5).all()
    batch = (image.reshape((-1, 19, 26, 1 if layout == "HW" else 3)) / top).astype(float)
    exact = np.stack([rtv_reference(one) for one in batch]).reshape(shape)
    step = 0.5 / top if top > 1 else 0.0
    assert np.abs(smooth / top - exact).max() <= step + 0.1 / 255


def test_strided_read_only_and_out() -> None:
    base = np.random.default_rng(9).random((2, 40, 60, 3)).astype(np.float32)
    view = base[:, ::2, ::-1].transpose(0, 2, 1, 3)
    view.flags.writeable = False
    expected = rtv_smooth(np.ascontiguousarray(view))
    np.testing.assert_array_equal(rtv_smooth(view), expected)
    out = np.zeros((2, 60, 20, 6), np.float32)[..., ::2]
    assert rtv_smooth(view, out=out) is out
    np.testing.assert_array_equal(out, expected)
    in_place = np.ascontiguousarray(view)
    rtv_smooth(in_place, out=in_place)
    np.testing.assert_array_equal(in_place, expected)


GOOD = np.zeros((8, 9, 3), np.float32)


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        (GOOD.astype(np.int32), {}, TypeError, "dtype int32"),
        (GOOD.astype(np.float16), {}, TypeError, "dtype float16"),
        (GOOD.astype(complex), {}, TypeError, "dtype complex128"),
        (GOOD.astype(">f4"), {}, TypeError, "dtype >f4"),
        (np.zeros((8, 9, 5), np.float32), {}, ValueError, "5 channels"),
        (np.zeros((8, 9, 3, 3, 3), np.float32), {}, ValueError, "use HW, HWC or NHWC"),
        (np.zeros(8, np.float32), {}, ValueError, "use HW, HWC or NHWC"),
        (np.zeros((0, 9, 3), np.float32), {}, ValueError, "empty"),
        (np.zeros((0, 8, 9, 3), np.float32), {}, ValueError, "empty"),
        (np.where(np.arange(216).reshape(8, 9, 3) == 5, np.nan, GOOD), {}, ValueError, "NaN or infinity"),
        (np.where(np.arange(216).reshape(8, 9, 3) == 5, np.inf, GOOD), {}, ValueError, "NaN or infinity"),
        (GOOD + 200, {}, ValueError, "scale it to"),
        (GOOD, {"lam": -0.01}, ValueError, "lam=-0.01"),
        (GOOD, {"lam": float("nan")}, ValueError, "lam=nan"),
        (GOOD, {"sigma": 0.0}, ValueError, "sigma=0.0"),
        (GOOD, {"sigma": -1.0}, ValueError, "sigma=-1.0"),
        (GOOD, {"sigma": 1001.0}, ValueError, "sigma=1001.0; it must be > 0 and at most 1000"),
        (GOOD, {"sharpness": 0.0}, ValueError, "sharpness=0.0"),
        (GOOD, {"iterations": 0}, ValueError, "iterations=0"),
        (GOOD, {"iterations": 1.5}, TypeError, r"iterations=1\.5; it must be a whole number"),
        (GOOD, {"tol": 0.0}, ValueError, "tol=0.0"),
        (GOOD, {"threads": -1}, ValueError, "threads=-1"),
        (GOOD, {"solver": "lu"}, ValueError, "solver='lu'"),
        (GOOD, {"mode": "fast"}, ValueError, "mode='fast'"),
        (GOOD, {"device": "tpu"}, ValueError, "device='tpu'"),
        (GOOD, {"device": "cuda:-1"}, ValueError, "device='cuda:-1'"),
        (torch.from_numpy(GOOD), {"device": "gpu"}, ValueError, "device='gpu'"),
        (torch.from_numpy(GOOD), {"threads": -1}, ValueError, "threads=-1"),
        (GOOD, {"out": np.zeros((8, 9), np.float32)}, ValueError, "out must be"),
        (GOOD, {"out": np.zeros((8, 9, 3))}, ValueError, "out must be"),
        (np.zeros((2000, 2000), np.float32), {"solver": "direct"}, ValueError, "use solver='mic'"),
    ],
)
def test_bad_input(image: np.ndarray, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rtv_smooth(image, **options)


def test_the_smallest_sigma_blurs_nothing() -> None:
    """Its square is 0."""
    image = np.random.default_rng(13).random((20, 30, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        rtv_smooth(image, sigma=1e-300, iterations=1), rtv_smooth(image, sigma=0.01, iterations=1)
    )


def test_weights_beyond_float32_are_an_error() -> None:
    image = np.random.default_rng(10).random((40, 40, 3)).astype(np.float32)
    with pytest.raises(RuntimeError, match="did not converge"):
        rtv_smooth(image, lam=1e8, sharpness=1e-6)


def test_the_programs_own_small_numbers_are_not_flushed_to_zero() -> None:
    """The smoother flushes denormal numbers while it runs, by a setting of the thread that called it."""
    small, half = np.full(64, 1e-40, np.float32), np.float32(0.5)
    assert (small * half > 0).all()
    rtv_smooth(np.random.default_rng(17).random((8, 9, 3)).astype(np.float32))
    assert (small * half > 0).all()


def test_from_many_threads_at_once() -> None:
    images = np.random.default_rng(11).random((6, 50, 41, 3)).astype(np.float32)
    expected = [rtv_smooth(image, threads=1) for image in images]
    results: list[Any] = [None] * 6

    def work(i: int) -> None:
        results[i] = rtv_smooth(images[i], threads=2)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    np.testing.assert_array_equal(results, expected)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_in_forked_worker_processes() -> None:
    image = np.random.default_rng(12).random((150, 130, 3)).astype(np.float32)
    expected = rtv_smooth(image, threads=2)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(rtv_smooth, [image] * 4)
    np.testing.assert_array_equal(results, [expected] * 4)


def test_needs_at_most_seven_pictures_of_memory_besides_input_and_output() -> None:
    script = """
import resource
import numpy as np
from dtpm_fast import rtv_smooth
image = np.random.default_rng(0).random((1024, 1024, 3), dtype=np.float32)
out = np.zeros_like(image)
rtv_smooth(image[:8, :8].copy())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rtv_smooth(image, iterations=1, tol=1e-2, threads=1, out=out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / image.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 7


def test_only_a_gpu_that_runs_the_kernels_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module, capability, reason = types.ModuleType("_rtv_cuda"), (7, 5), "no kernel image is available"
    module.unusable = lambda: reason  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dtpm_fast._rtv_cuda", module)
    monkeypatch.setattr("dtpm_fast._rtv_cuda", module, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert smoothing.cuda_unavailable("cuda") == (
        "the CUDA smoother is built for compute capability 8.0 and newer, this GPU has 7.5"
    )
    capability = (12, 0)
    assert "another driver or GPU than this one (no kernel image is available)" in str(smoothing.cuda_unavailable())
    with pytest.raises(RuntimeError, match="this machine has 2 CUDA devices, counted from 0"):
        rtv_smooth(GOOD, device="cuda:2")
    reason = ""
    assert smoothing.cuda_unavailable("cuda:1") is None


@pytest.mark.parametrize(
    ("count", "room", "expected"),
    [(8, 100, 8), (256, 256, 256), (256, 216, 132), (256, 300, 256), (600, 500, 396), (256, 50, 50), (3, 0, 1)],
)
def test_parts_of_a_batch_fill_the_gpu(count: int, room: int, expected: int) -> None:
    assert smoothing._pictures_at_once(count, room, processors=132) == expected
