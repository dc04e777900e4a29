"""Relative total variation smoothing, the base image y_s of stage I: structure kept, texture removed.

L. Xu, Q. Yan, Y. Xia, J. Jia, "Structure Extraction from Texture via Relative Total Variation", SIGGRAPH Asia 2012,
written from the paper's equations. The solver (csrc/rtv) is described in docs/rtv.md.
"""

import math
import os
from typing import Any, NamedTuple

import numpy as np

try:
    from dtpm_fast import _rtv
except ImportError as error:
    raise ImportError(
        "dtpm_fast._rtv, the compiled smoother, is missing: install the package (pip install -e . from the repository's "
        "root; after a normal install, do not start Python in the repository's root)"
    ) from error

DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32), np.dtype(np.float64))
SOLVERS = ("mic", "direct")
MODES = ("exact", "matlab_pcg")
LOWEST, HIGHEST = -1.0, 2.0  # resampling overshoots [0, 1]; a picture in 0..255 is a mistake
DIRECT_BYTES = 2**31  # of the direct solver's band


class SmoothInfo(NamedTuple):
    """What the solver did: a row for every picture, a column for each of its `iterations` solves."""

    iterations: np.ndarray  # int: conjugate gradient iterations; 0 for the direct solver
    residuals: np.ndarray  # float: residual at the end, relative to the right-hand side, in the preconditioner's norm


def rtv_smooth(
    image: Any,
    lam: float = 0.01,
    sigma: float = 3.0,
    sharpness: float = 0.02,
    iterations: int = 4,
    *,
    solver: str = "mic",
    mode: str = "exact",
    tol: float = 3e-5,
    device: str = "cpu",
    threads: int = 0,
    out: Any = None,
    return_info: bool = False,
) -> Any:
    """Smooth a picture or a batch.

    image: HW, HWC or NHWC array with 1 or 3 channels (three dimensions are always HWC); uint8 or uint16 over their full
        range, or float32 or float64 in [0, 1]. Any strides; read-only is fine. float64 is computed in float64,
        everything else in float32.
    lam: strength of the smoothing, >= 0 (0 returns the picture). sigma: largest texture scale in pixels, > 0, halved
        in every iteration. sharpness: smallest mean gradient that counts, > 0. iterations: solves, >= 1.
    solver: "mic", or "direct", a float64 elimination to check it with on small pictures.
    mode: "exact" solves each system to `tol`; "matlab_pcg" stops where the authors' MATLAB program does (relative residual
        0.1 from a zero start, `tol` unused), which differs from exact by up to 16 to 34/255.
    tol: relative residual at which a solve ends (or where rounding of the result causes as much, up to 1e-3); the default
        keeps the largest error of a photo below 0.1/255.
    threads: 0 for one per CPU that this process may use; 1 in worker processes of a data loader. Results do not depend
        on it.
    out: an array of the same shape and dtype to write to.

    Returns the result in the picture's shape and dtype, and with `return_info` also a `SmoothInfo`. Releases the GIL;
    safe in threads and in forked worker processes. Raises TypeError (dtype), ValueError (shape or a parameter's value,
    NaN or infinity in the picture), RuntimeError (a solve did not converge: weights out of range).
    """
    array = np.asarray(image)
    _check(array, out, lam, sigma, sharpness, iterations, solver, mode, tol, device, threads)
    if out is None:
        out = np.empty(array.shape, array.dtype)
    reports = _rtv.smooth(
        _as_batch(array),
        _as_batch(out),
        lam=lam,
        sigma=sigma,
        sharpness=sharpness,
        iterations=iterations,
        solver=solver,
        mode=mode,
        tol=tol,
        threads=threads or len(os.sched_getaffinity(0)),
        isa="auto",
    )
    if not return_info:
        return out
    return out, SmoothInfo(
        np.array([[iterations for iterations, _ in report] for report in reports]),
        np.array([[residual for _, residual in report] for report in reports]),
    )


def cuda_unavailable() -> str | None:
    """Why pictures cannot be smoothed on a GPU here; None when they can."""
    return "this build of dtpm_fast has no CUDA smoother"


def _check(
    array: np.ndarray,
    out: Any,
    lam: float,
    sigma: float,
    sharpness: float,
    iterations: int,
    solver: str,
    mode: str,
    tol: float,
    device: str,
    threads: int,
) -> None:
    if array.dtype not in DTYPES:
        raise TypeError(f"image has dtype {array.dtype}; use uint8, uint16, float32 or float64")
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"image has shape {array.shape}; use HW, HWC or NHWC")
    if array.ndim > 2 and array.shape[-1] not in (1, 3):
        raise ValueError(f"image has shape {array.shape}: {array.shape[-1]} channels in the last axis; use 1 or 3")
    if 0 in array.shape:
        raise ValueError(f"image has shape {array.shape}: it is empty")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())  # NaN wins both
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("image contains NaN or infinity")
        if low < LOWEST or high > HIGHEST:
            raise ValueError(f"image has values from {low:g} to {high:g}; scale it to [0, 1]")
    for name, value, valid, wanted in (
        ("lam", lam, lam >= 0, ">= 0"),
        ("sigma", sigma, sigma > 0, "> 0"),
        ("sharpness", sharpness, sharpness > 0, "> 0"),
        ("iterations", iterations, iterations >= 1, ">= 1"),
        ("tol", tol, tol > 0, "> 0"),
        ("threads", threads, threads >= 0, ">= 0"),
    ):
        if not valid or not math.isfinite(value):
            raise ValueError(f"{name}={value!r}; it must be {wanted}")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}; use one of {', '.join(SOLVERS)}")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; use one of {', '.join(MODES)}")
    if solver == "direct":
        height, width = array.shape if array.ndim == 2 else array.shape[-3:-1]
        needed = 8 * height * width * (min(height, width) + 1)
        if needed > DIRECT_BYTES:
            raise ValueError(
                f"solver='direct' is for checking small pictures: {height}x{width} needs {needed / 2**30:.1f} GiB; "
                "use solver='mic'"
            )
    if device != "cpu":
        raise ValueError(f"device={device!r}; numpy arrays are smoothed on 'cpu'")
    if out is not None and not (isinstance(out, np.ndarray) and out.shape == array.shape and out.dtype == array.dtype):
        raise ValueError(f"out must be a numpy array of shape {array.shape} and dtype {array.dtype}")
    if out is not None and not out.flags.writeable:
        raise ValueError("out is read-only")


def _as_batch(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        return array[None, :, :, None]
    return array[None] if array.ndim == 3 else array
