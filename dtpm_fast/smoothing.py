"""Relative total variation smoothing, the base image y_s of stage I: structure kept, texture removed.

L. Xu, Q. Yan, Y. Xia, J. Jia, "Structure Extraction from Texture via Relative Total Variation", SIGGRAPH Asia 2012,
written from the paper's equations. The solver (csrc/rtv) is described in docs/rtv.md.
"""

import math
import os
import re
import sys
import threading
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dtpm_fast.cores import usable_cores

try:
    import dtpm_fast._rtv as _rtv
except ImportError as error:
    raise ImportError(
        "dtpm_fast._rtv, the compiled smoother, is missing: install the package (pip install -e . in the repository's "
        "root; after a normal install, do not start Python in the repository's root)"
    ) from error

if TYPE_CHECKING:
    import torch

DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32), np.dtype(np.float64))
SOLVERS = ("mic", "direct")
MODES = ("exact", "matlab_pcg")
LOWEST, HIGHEST = -1.0, 2.0  # resampling overshoots [0, 1]; a picture in 0..255 is a mistake
DIRECT_BYTES = 2**31  # of the direct solver's band
CUDA_WORKSPACE_BYTES = 2**33  # at most, or what a picture a multiprocessor needs; larger batches go through in parts
SMALL_PICTURE = 128 * 128  # pixels
_measuring = threading.Lock()
_streams = threading.local()
LARGEST_SIGMA = 1000.0  # no photo has texture of that scale, and the filter has five times as many taps
CUDA_OLDEST = (8, 0)  # CMakeLists.txt: CMAKE_CUDA_ARCHITECTURES
CUDA_LARGEST_SIGMA = 25.0  # the kernel's room for the Gaussian's taps


class SmoothInfo(NamedTuple):
    """What the solver did: a row for every picture, a column for each of its `iterations` solves."""

    iterations: np.ndarray  # int: conjugate gradient iterations; 0 for the direct solver
    residuals: np.ndarray  # float: residual at the end, relative to the right-hand side, in the preconditioner's norm


class _Settings(NamedTuple):
    """What `rtv_smooth` takes under the same names."""

    lam: float
    sigma: float
    sharpness: float
    iterations: int
    solver: str
    mode: str
    tol: float

    def check(self) -> None:
        if not isinstance(self.iterations, Integral):
            raise TypeError(f"iterations={self.iterations!r}; it must be a whole number")
        for name, valid, wanted in (
            ("lam", self.lam >= 0, ">= 0"),
            ("sigma", 0 < self.sigma <= LARGEST_SIGMA, f"> 0 and at most {LARGEST_SIGMA:g}"),
            ("sharpness", self.sharpness > 0, "> 0"),
            ("iterations", self.iterations >= 1, ">= 1"),
            ("tol", self.tol > 0, "> 0"),
        ):
            value = getattr(self, name)
            if not valid or not math.isfinite(value):
                raise ValueError(f"{name}={value!r}; it must be {wanted}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}; use one of {', '.join(SOLVERS)}")
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}; use one of {', '.join(MODES)}")

    def for_pictures(self, shape: tuple[int, ...]) -> "_Settings":
        """`tol` bounds a mean over the picture; in a small one a single pixel can be further off within it."""
        height, width = shape if len(shape) == 2 else shape[-3:-1]
        return self._replace(tol=self.tol / 4) if height * width < SMALL_PICTURE else self


def rtv_smooth(
    image: Any,
    lam: float = 0.01,
    sigma: float = 3.0,
    sharpness: float = 0.02,
    iterations: int = 4,
    *,
    solver: str = "mic",
    mode: str = "exact",
    tol: float = 1e-5,
    device: str = "cpu",
    threads: int = 0,
    out: Any = None,
    return_info: bool = False,
) -> Any:
    """Smooth a picture or a batch.

    image: HW, HWC or NHWC with 1 or 3 channels (three dimensions are always HWC), a numpy array or a torch tensor;
        uint8 or uint16 over their full range, or float32 or float64 in [0, 1]. Any strides; read-only is fine. float64
        is computed in float64, everything else in float32.
    lam: strength of the smoothing, >= 0 (0 returns the picture). sigma: largest texture scale in pixels, > 0 and at
        most 1000, halved in every iteration. sharpness: smallest mean gradient that counts, > 0. iterations: solves,
        >= 1.
    solver: "mic", or "direct", a float64 elimination to check it with on small pictures.
    mode: "exact" solves each system to `tol`; "matlab_pcg" stops where the authors' MATLAB program does (relative
        residual 0.1 from a zero start, `tol` unused), which differs from exact by up to 16 to 42/255.
    tol: relative residual at which a solve ends (or where rounding of the result causes as much, up to 1e-3), a quarter
        of it below 128x128 pixels; the default keeps the largest error below 0.1/255, of photos below 0.02/255.
    device: where a numpy array or a CPU tensor is smoothed: "cpu", "cuda" or "cuda:N". A CUDA tensor is smoothed where
        it is, on the current stream (an array on one of the calling thread's), a thread block a picture: for batches.
        There only solver="mic", mode="exact".
    threads: 0 for one per CPU that this process may use, and for fewer pictures than CPUs one per idle CPU; 1 in worker
        processes of a data loader. Results do not depend on it.
    out: an array of the same shape and dtype to write to.

    The environment variable DTPM_FAST_RTV_ISA=portable, avx2 or avx512 chooses the instruction set (default: auto, the
    best one that this CPU has).

    Returns the result in the picture's kind, shape and dtype, and with `return_info` also a `SmoothInfo`. Releases the
    GIL; safe in threads and in forked worker processes. Raises TypeError (dtype), ValueError (shape or a parameter's
    value, NaN or infinity in the picture), RuntimeError (a solve did not converge: weights out of range; no GPU).
    """
    settings = _Settings(lam, sigma, sharpness, iterations, solver, mode, tol)
    torch = sys.modules.get("torch")
    smooth = _smooth_tensor if torch is not None and isinstance(image, torch.Tensor) else _smooth_array
    result, info = smooth(image, settings, device, threads, out)
    return (result, info) if return_info else result


def cuda_unavailable(device: "torch.device | str" = "cuda") -> str | None:
    """Why pictures cannot be smoothed on this GPU; None when they can."""
    try:
        from dtpm_fast import _rtv_cuda
    except ImportError:
        return "this build of dtpm_fast has no CUDA smoother; install it where nvcc is on the PATH"
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    count, index = torch.cuda.device_count(), torch.device(device).index or 0
    if index >= count:
        return f"this machine has {count} CUDA device{'s' * (count > 1)}, counted from 0"
    capability = torch.cuda.get_device_capability(device)
    if capability < CUDA_OLDEST:
        return "the CUDA smoother is built for compute capability 8.0 and newer, this GPU has {}.{}".format(*capability)
    with torch.cuda.device(device):
        reason = _rtv_cuda.unusable()
    return f"the CUDA smoother was built for another driver or GPU than this one ({reason})" if reason else None


def _smooth_tensor(
    image: "torch.Tensor", settings: _Settings, device: str, threads: int, out: Any
) -> "tuple[torch.Tensor, SmoothInfo]":
    import torch

    if out is not None and not (
        isinstance(out, torch.Tensor) and (out.shape, out.dtype, out.device) == (image.shape, image.dtype, image.device)
    ):
        raise ValueError(f"out must be a tensor like image: {tuple(image.shape)}, {image.dtype}, {image.device}")
    _check_where(device, threads)
    if image.is_cuda or device != "cpu":
        result, info = _smooth_cuda(image, settings, image.device if image.is_cuda else device)
        if out is not None or not image.is_cuda:
            result = (torch.empty_like(image) if out is None else out).copy_(result)
        return result, info
    array, info = _smooth_array(image.detach().numpy(), settings, device, threads, None if out is None else out.numpy())
    return torch.from_numpy(array) if out is None else out, info


def _smooth_array(
    image: Any, settings: _Settings, device: str, threads: int, out: Any
) -> tuple[np.ndarray, SmoothInfo]:
    array = np.asarray(image)
    _check(array, out, settings, device, threads)
    if out is None:
        out = np.empty(array.shape, array.dtype)
    if device != "cpu":
        reason = cuda_unavailable(device)
        if reason:
            raise RuntimeError(f"device={device!r}: {reason}")
        import torch

        given = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        with torch.cuda.device(device), torch.cuda.stream(_own_stream()):
            tensor, info = _smooth_cuda(given, settings, device)
            out[...] = tensor.cpu().numpy()
        return out, info
    reports = _rtv.smooth(
        _as_batch(array),
        _as_batch(out),
        **settings.for_pictures(array.shape)._asdict(),
        threads=threads or _free_threads(1 if array.ndim < 4 else len(array)),
        isa=os.environ.get("DTPM_FAST_RTV_ISA", "auto"),
    )
    return out, SmoothInfo(
        np.array([[iterations for iterations, _ in report] for report in reports]),
        np.array([[residual for _, residual in report] for report in reports]),
    )


def _own_stream() -> "torch.cuda.Stream":
    """The calling thread's own on the current device. Threads share the one that PyTorch gives them, where the few
    crops of one's photo, a multiprocessor each, would wait for those of another's."""
    import torch

    name = f"cuda:{torch.cuda.current_device()}"
    if name not in vars(_streams):
        vars(_streams)[name] = torch.cuda.Stream()
    return vars(_streams)[name]


def _smooth_cuda(
    image: "torch.Tensor", settings: _Settings, device: "torch.device | str"
) -> "tuple[torch.Tensor, SmoothInfo]":
    """On `device`; the result stays there."""
    import torch

    reason = cuda_unavailable(device)
    if reason:
        raise RuntimeError(f"rtv_smooth on {device}: {reason}")
    from dtpm_fast import _rtv_cuda
    from dtpm_fast.device import free_cuda_memory

    tops = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1, torch.float64: 1}
    if image.dtype not in tops:
        raise TypeError(f"image has dtype {image.dtype}; use uint8, uint16, float32 or float64")
    _check_shape(tuple(image.shape))
    settings.check()
    lam, sigma, sharpness, iterations, solver, mode, tol = settings.for_pictures(tuple(image.shape))
    if solver != "mic" or mode != "exact":
        raise ValueError(f"solver={solver!r}, mode={mode!r}: on CUDA only solver='mic' with mode='exact'; use the CPU")
    if sigma > CUDA_LARGEST_SIGMA:
        raise ValueError(f"sigma={sigma!r}; on CUDA it must be <= {CUDA_LARGEST_SIGMA:g}")
    image = image.detach().to(device)
    batch = image[None, :, :, None] if image.ndim == 2 else image[None] if image.ndim == 3 else image
    count, height, width, channels = batch.shape
    if channels * height * width >= 2**29:
        raise ValueError(f"image has shape {tuple(image.shape)}: too large for CUDA; use device='cpu'")
    real = torch.float64 if image.dtype == torch.float64 else torch.float32
    planes = torch.empty((count, channels, height, width), dtype=real, device=batch.device)
    planes.copy_(batch.permute(0, 3, 1, 2))
    planes /= tops[image.dtype]
    if image.is_floating_point():
        _check_range(float(planes.amin()), float(planes.amax()))
    each = _rtv_cuda.workspace(height, width, channels)
    if each >= 2**31:  # the kernel counts in 32 bits; a picture of a few columns has a wide margin
        raise ValueError(f"image has shape {tuple(image.shape)}: too large for CUDA; use device='cpu'")
    with torch.cuda.device(batch.device):
        with _measuring:  # else threads that start together all see the same memory free
            processors = torch.cuda.get_device_properties(batch.device).multi_processor_count
            most = max(CUDA_WORKSPACE_BYTES, processors * each * real.itemsize)
            room = min(most, free_cuda_memory(batch.device) // 2) // (each * real.itemsize)
            part = _pictures_at_once(count, room, processors)
            workspace = torch.empty(part * each, dtype=real, device=batch.device)
        reports = torch.empty((count, iterations, 2), dtype=torch.int32, device=batch.device)
        for first in range(0, count, part):
            _rtv_cuda.smooth(
                planes[first].data_ptr(), workspace.data_ptr(), reports[first].data_ptr(), real == torch.float64,
                min(part, count - first), channels, height, width, lam, sigma, sharpness, iterations, tol,
                torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
    table = reports.cpu()  # waits for the result
    info = SmoothInfo(table[..., 0].numpy(), table[..., 1].contiguous().view(torch.float32).numpy())
    if (info.iterations < 0).any():
        raise RuntimeError(
            "rtv_smooth: a solve did not converge: the weights are out of range; lower lam, raise sharpness, "
            "or use float64"
        )
    if not image.is_floating_point():
        planes = planes.mul_(tops[image.dtype]).round_().clamp_(0, tops[image.dtype])
    return planes.permute(0, 2, 3, 1).to(image.dtype).reshape(image.shape), info


def _pictures_at_once(count: int, room: int, processors: int) -> int:
    """Of `count` pictures, a multiprocessor each, as many as there is room for; of several parts each fills the GPU."""
    if count <= room:
        return count
    return max(1, room - room % processors if room > processors else room)


def _check(array: np.ndarray, out: Any, settings: _Settings, device: str, threads: int) -> None:
    if array.dtype not in DTYPES:
        raise TypeError(f"image has dtype {array.dtype}; use uint8, uint16, float32 or float64")
    _check_shape(array.shape)
    settings.check()
    _check_where(device, threads)
    if array.dtype.kind == "f":
        _check_range(float(array.min()), float(array.max()))
    if settings.solver == "direct":
        height, width = array.shape if array.ndim == 2 else array.shape[-3:-1]
        needed = 8 * height * width * (min(height, width) + 1)
        if needed > DIRECT_BYTES:
            raise ValueError(
                f"solver='direct' is for checking small pictures: {height}x{width} needs {needed / 2**30:.1f} GiB; "
                "use solver='mic'"
            )
    if out is not None and not (isinstance(out, np.ndarray) and out.shape == array.shape and out.dtype == array.dtype):
        raise ValueError(f"out must be a numpy array of shape {array.shape} and dtype {array.dtype}")
    if out is not None and not out.flags.writeable:
        raise ValueError("out is read-only")


def _check_where(device: str, threads: int) -> None:
    if not (threads >= 0 and math.isfinite(threads)):
        raise ValueError(f"threads={threads!r}; it must be >= 0")
    if not (isinstance(device, str) and re.fullmatch(r"cpu|cuda(:\d+)?", device)):
        raise ValueError(f"device={device!r}; use 'cpu', 'cuda' or 'cuda:N'")


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"image has shape {shape}; use HW, HWC or NHWC")
    if len(shape) > 2 and shape[-1] not in (1, 3):
        raise ValueError(f"image has shape {shape}: {shape[-1]} channels in the last axis; use 1 or 3")
    if 0 in shape:
        raise ValueError(f"image has shape {shape}: it is empty")


def _check_range(low: float, high: float) -> None:
    """NaN anywhere makes both NaN."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("image contains NaN or infinity")
    if low < LOWEST or high > HIGHEST:
        raise ValueError(f"image has values from {low:g} to {high:g}; scale it to [0, 1]")


def _free_threads(pictures: int) -> int:
    """One per CPU that this process may use. With fewer pictures than that, several threads share one and wait for each
    other: for them no more than there are idle CPUs beside the pictures' own."""
    cpus = usable_cores()
    if pictures >= cpus:
        return cpus
    idle = max(0, (os.cpu_count() or 1) - _runnable())
    return min(cpus, pictures + idle)


def _runnable() -> int:
    """Threads that run or want to, on the whole machine, this one included; 1 where the system does not say."""
    try:
        return max(1, int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]))
    except (OSError, ValueError, IndexError):
        return 1


def _as_batch(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        return array[None, :, :, None]
    return array[None] if array.ndim == 3 else array
