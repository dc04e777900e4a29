"""The smoother on a GPU: torch tensors in and out, held to the CPU's results."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from dtpm_fast import rtv_smooth, smoothing
from dtpm_fast.smoothing import cuda_unavailable

MISSING = cuda_unavailable()


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(MISSING is not None, reason=str(MISSING))(test))


@pytest.mark.parametrize("shape", [(64, 80), (31, 17, 3), (130, 96, 96, 3), (2, 513, 300, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.float64])
@needs_gpu
def test_agrees_with_the_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = np.random.default_rng(len(shape)).random(shape)
    top = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    image = torch.from_numpy(np.rint(values * top) if top > 1 else values).to(dtype)
    smooth, info = rtv_smooth(image.cuda(), return_info=True)
    assert smooth.is_cuda
    assert (smooth.shape, smooth.dtype) == (image.shape, dtype)
    difference = smooth.cpu().double() - rtv_smooth(image).double()
    assert float(difference.abs().max()) / top <= 0.05 / 255 + (1 / top if top > 1 else 0)
    assert (info.iterations >= 0).all()  # a single pixel is its own solution
    assert (info.residuals <= 3e-5).all()


@needs_gpu
def test_agrees_with_the_cpu_where_float32_misjudges_a_radius() -> None:
    image = torch.rand(2, 60, 70, 3)
    difference = rtv_smooth(image.cuda(), sigma=2.3).cpu() - rtv_smooth(image, sigma=2.3)
    assert float(difference.abs().max()) <= 0.05 / 255


@needs_gpu
def test_on_another_stream_strided_and_into_out() -> None:
    image = torch.rand(3, 3, 70, 90, device="cuda").permute(0, 2, 3, 1)
    expected = rtv_smooth(image.contiguous())
    out = torch.zeros_like(expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert rtv_smooth(image, out=out) is out
    stream.synchronize()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@needs_gpu
def test_numpy_and_cpu_tensors_come_back() -> None:
    image = np.random.default_rng(3).random((40, 50, 3)).astype(np.float32)
    smooth = rtv_smooth(image, device="cuda")
    assert isinstance(smooth, np.ndarray)
    np.testing.assert_allclose(smooth, rtv_smooth(image), rtol=0, atol=0.05 / 255)
    tensor = rtv_smooth(torch.from_numpy(image), device="cuda")
    assert not tensor.is_cuda
    np.testing.assert_array_equal(tensor.numpy(), smooth)


def test_every_thread_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA: which stream the pictures of which thread are smoothed and copied back on."""
    current = threading.local()
    used: list[tuple[int, object]] = []

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        current.stream = stream
        yield
        del current.stream

    def smooth(image: torch.Tensor, *settings: object) -> tuple[torch.Tensor, None]:
        used.append((threading.get_ident(), current.stream))
        return image / 2, None

    monkeypatch.setattr(smoothing, "cuda_unavailable", lambda device: None)
    monkeypatch.setattr(smoothing, "_smooth_cuda", smooth)
    fakes = {"Stream": object, "stream": on, "device": lambda device: nullcontext(), "current_device": lambda: 0}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    image = np.full((4, 5, 3), 0.5, np.float32)
    together = threading.Barrier(2)

    def work() -> None:
        together.wait(timeout=60)
        for _ in range(3):
            assert (rtv_smooth(image, device="cuda") == 0.25).all()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work) for _ in range(2)]:
            future.result()
    assert len(used) == 6
    assert len(set(used)) == len({stream for _, stream in used}) == 2


@needs_gpu
def test_threads_at_once_on_the_gpu() -> None:
    images = np.random.default_rng(5).random((8, 3, 96, 80, 3)).astype(np.float32)
    expected = [rtv_smooth(image, device="cuda") for image in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: rtv_smooth(image, device="cuda"), images))
    np.testing.assert_array_equal(found, expected)


@needs_gpu
def test_bad_input_on_the_gpu() -> None:
    image = torch.rand(8, 9, 3, device="cuda")
    with pytest.raises(ValueError, match="NaN or infinity"):
        rtv_smooth(torch.full_like(image, float("nan")))
    with pytest.raises(ValueError, match="only solver='mic'"):
        rtv_smooth(image, mode="matlab_pcg")
    with pytest.raises(ValueError, match="sigma=30"):
        rtv_smooth(image, sigma=30.0)
    with pytest.raises(TypeError, match="float16"):
        rtv_smooth(image.half())


def test_cpu_tensors_stay_tensors() -> None:
    image = torch.rand(2, 20, 30, 3)
    smooth, info = rtv_smooth(image, return_info=True)
    np.testing.assert_array_equal(smooth.numpy(), rtv_smooth(image.numpy()))
    assert info.iterations.shape == (2, 4)
    out = torch.zeros_like(image)
    assert rtv_smooth(image, out=out) is out
    torch.testing.assert_close(out, smooth, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_asking_for_one_is_an_error() -> None:
    image = np.zeros((8, 9, 3), np.float32)
    with pytest.raises(RuntimeError, match=r"device='cuda': .*CUDA"):
        rtv_smooth(image, device="cuda")
    with pytest.raises(RuntimeError, match=r"on cuda:0: .*CUDA"):
        rtv_smooth(torch.from_numpy(image), device="cuda:0")
