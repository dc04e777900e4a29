"""The smoother against scipy's sparse LU and what pip installs, side by side in one run.

    python benchmarks/bench_rtv.py [--pictures [NAME ...]] [--photo FILE] [--crops N] [--rounds 5] [--quick] [--json F]

Every picture is smoothed with the default parameters by every method in turn, `rounds` times for ours and once for the
slow ones; medians. Errors are against scipy's float64 solution. GB/s counts the bytes that the solver's sweeps have to
move (per iteration 30 float32 planes for a colour picture, per residual 12), against a copy measured in the same run.
Batches: `--crops` crops of 256x256, images/s; on a GPU batches of 1, 8, 64 and 256 of 256x256 and 512x512. Peers that
are not installed are named, not run.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.sparse.linalg
from skimage import data

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rtv_reference import rtv_matrix, rtv_reference, rtv_weights

from dtpm_fast import _rtv, rtv_smooth
from dtpm_fast.atomic import atomic_path
from dtpm_fast.cores import cpu_name
from dtpm_fast.images import read_image
from dtpm_fast.smoothing import cuda_unavailable

PICTURES = ["astronaut", "coffee", "grass", "noise"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, help="a 2K photo; without it that row is left out")
    parser.add_argument("--pictures", nargs="*", choices=PICTURES, default=PICTURES, help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="of the others only splu: spsolve takes minutes a picture")
    parser.add_argument("--crops", type=int, default=0, metavar="N", help="also a batch of N crops of 256x256")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    copy = copy_bandwidth()
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "instruction_sets": _rtv.instruction_sets(),
        "copy_gb_per_s": copy,
        "not_run": [],
        "pictures": {},
    }
    print(f"{record['cpu']}, {record['cpus']} CPUs, load {record['load_average_before'][0]:.1f}, copy {copy:.1f} GB/s")
    for name, image in pictures(options).items():
        record["pictures"][name] = rows = bench_picture(image, options, copy)
        splu = rows["scipy splu"]["ms"] if "scipy splu" in rows else None
        print(f"\n{name} {image.shape[0]}x{image.shape[1]}")
        for method, row in rows.items():
            ratio = f"{splu / row['ms']:7.1f}x splu" if splu else ""
            line = f"  {method:20} {row['ms']:10.1f} ms {ratio} {row.get('iterations', '')}"
            if "max_error_255" in row:
                line += f" error max {row['max_error_255']:.4f} mean {row['mean_error_255']:.5f} of 255"
            if "gb_per_s" in row:
                line += f" {row['gb_per_s']:.1f} GB/s, {100 * row['share_of_copy']:.0f}% of copy"
            print(line, flush=True)
    if options.crops:
        record["crops"] = bench_crops(options.crops, options.rounds)
    reason = cuda_unavailable()
    if reason:
        record["not_run"].append(f"CUDA: {reason}")
    else:
        record["cuda"] = bench_cuda(options.rounds)
    for line in record["not_run"]:
        print("not run:", line)
    record["load_average_after"] = os.getloadavg()
    if options.json:
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def pictures(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """HWC float64 in [0, 1]."""
    known = {
        "astronaut": data.astronaut() / 255.0,
        "coffee": np.pad(data.coffee(), ((0, 112), (0, 0), (0, 0)), "reflect")[:512, :512] / 255.0,
        "grass": np.repeat(data.grass()[:512, :512, None] / 255.0, 3, axis=2),
        "noise": np.random.default_rng(0).random((512, 512, 3)),
    }
    found = {name: known[name] for name in options.pictures}
    if options.photo is not None:
        found["2K photo"] = read_image(options.photo) / 255.0
    return found


def bench_picture(image: np.ndarray, options: argparse.Namespace, copy: float) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    small = image.shape[0] * image.shape[1] <= 512 * 512
    if small:
        exact, seconds = timed(lambda: rtv_reference(image))
        rows["scipy splu"] = {"ms": 1e3 * seconds}
        others = {} if options.quick else {"scipy spsolve": spsolve_channels} | peers()
        for name, solve in others.items():
            result, seconds = timed(partial(smooth_by, solve, image))
            rows[name] = {"ms": 1e3 * seconds} | errors(result, exact)
    else:  # splu takes minutes and gigabytes: our own float64 solution stands in
        exact = rtv_smooth(image, tol=1e-10)
    single = image.astype(np.float32)
    cases: dict[str, Callable[[], Any]] = {
        "ours, 1 thread": lambda: rtv_smooth(single, threads=1, return_info=True),
        "ours, all threads": lambda: rtv_smooth(single, threads=len(os.sched_getaffinity(0)), return_info=True),
        "ours, float64": lambda: rtv_smooth(image, tol=1e-7, threads=1, return_info=True),
        "ours, matlab_pcg": lambda: rtv_smooth(single, mode="matlab_pcg", return_info=True),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    results = {}
    for _ in range(options.rounds):
        for name, case in cases.items():  # interleaved: a busy moment hits all of them
            results[name], seconds = timed(case)
            times[name].append(seconds)
    for name, (result, info) in results.items():
        seconds = statistics.median(times[name])
        rows[name] = {"ms": 1e3 * seconds, "best_ms": 1e3 * min(times[name]), "iterations": info.iterations[0].tolist()}
        rows[name] |= errors(result, exact)
        if result.dtype == np.float32 and "matlab" not in name:
            planes = 30 * int(info.iterations.sum()) + 12 * 3 * 4
            moved = planes * image.shape[0] * image.shape[1] * 4 / 1e9
            rows[name] |= {"gb_per_s": moved / seconds, "share_of_copy": moved / seconds / copy}
    return rows


def errors(result: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    difference = np.abs(result - exact) * 255
    return {"max_error_255": float(difference.max()), "mean_error_255": float(difference.mean())}


def smooth_by(solve: Callable[[Any, np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """The four iterations with another solver of the same systems: solve(matrix, (pixels, channels))."""
    x, sigma = image, 3.0
    for _ in range(4):
        x = solve(rtv_matrix(*rtv_weights(x, sigma, 0.02), 0.01), image.reshape(-1, 3)).reshape(image.shape)
        sigma = max(sigma / 2, 0.5)
    return x


def spsolve_channels(matrix: Any, rhs: np.ndarray) -> np.ndarray:
    """As the public Python ports do it: a factorisation a channel."""
    return np.stack([scipy.sparse.linalg.spsolve(matrix, rhs[:, c]) for c in range(3)], axis=1)


def peers() -> dict[str, Callable[[Any, np.ndarray], np.ndarray]]:
    """Solvers of the same systems that pip installs, where they are installed."""

    def jacobi(matrix: Any, rhs: np.ndarray) -> np.ndarray:
        scale = scipy.sparse.diags_array(1 / matrix.diagonal())
        solve = scipy.sparse.linalg.cg
        return np.stack([solve(matrix, rhs[:, c], x0=rhs[:, c], rtol=3e-6, M=scale)[0] for c in range(3)], axis=1)

    def multigrid(matrix: Any, rhs: np.ndarray) -> np.ndarray:
        import pyamg  # type: ignore[import-not-found]

        levels = pyamg.ruge_stuben_solver(matrix.tocsr())
        return np.stack([levels.solve(rhs[:, c], x0=rhs[:, c], tol=3e-6, accel="cg") for c in range(3)], axis=1)

    def supernodal_cholesky(matrix: Any, rhs: np.ndarray) -> np.ndarray:  # CHOLMOD
        import cholespy  # type: ignore[import-not-found]

        indices = (part.astype(np.int32) for part in (matrix.indptr, matrix.indices))
        solver = cholespy.CholeskySolverD(len(rhs), *indices, matrix.data, cholespy.MatrixType.CSC)
        result = np.zeros_like(rhs)
        solver.solve(np.ascontiguousarray(rhs), result)
        return result

    def quadratic_ldl(matrix: Any, rhs: np.ndarray) -> np.ndarray:
        import qdldl  # type: ignore[import-not-found]

        solver = qdldl.Solver(scipy.sparse.csc_matrix(scipy.sparse.triu(matrix)), upper=True)
        return np.stack([solver.solve(rhs[:, c].copy()) for c in range(3)], axis=1)

    def pardiso(matrix: Any, rhs: np.ndarray) -> np.ndarray:
        import pypardiso  # type: ignore[import-not-found]

        return pypardiso.spsolve(matrix.tocsr(), rhs)

    optional = {"pyamg": multigrid, "cholespy": supernodal_cholesky, "qdldl": quadratic_ldl, "pypardiso": pardiso}
    installed = {name: solve for name, solve in optional.items() if importlib.util.find_spec(name)}
    print("not installed, not run:", ", ".join(sorted(optional.keys() - installed.keys())) or "none")
    return {"scipy Jacobi-CG": jacobi} | installed


def bench_crops(count: int, rounds: int) -> dict[str, Any]:
    """A batch of crops, as data sets are made: whole pictures side by side."""
    batch = np.stack([random_photo(256, seed) for seed in range(count)])
    rows: dict[str, Any] = {}
    for name, threads in (("1 thread", 1), ("all threads", 0)):
        seconds = statistics.median(timed(lambda t=threads: rtv_smooth(batch, threads=t))[1] for _ in range(rounds))
        rows[name] = {"crops": count, "ms": 1e3 * seconds, "images_per_s": count / seconds}
        print(f"{count} crops of 256x256, {name}: {count / seconds:.1f} images/s", flush=True)
    return rows


def bench_cuda(rounds: int) -> dict[str, Any]:
    import torch

    rows: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for size in (256, 512):
        for count in (1, 8, 64, 256):
            batch = torch.from_numpy(np.stack([random_photo(size, seed) for seed in range(count)])).cuda()
            rtv_smooth(batch)
            times = []
            for _ in range(rounds):
                torch.cuda.synchronize()
                times.append(timed(partial(rtv_smooth, batch))[1])
            images = count / statistics.median(times)
            rows[f"{size}x{size} batch {count}"] = {"ms": 1e3 * statistics.median(times), "images_per_s": images}
            print(f"CUDA {size}x{size} batch {count:4}: {images:8.1f} images/s")
    return rows


def random_photo(size: int, seed: int) -> np.ndarray:
    """A window of the astronaut, somewhere, with noise: every picture of a batch differs."""
    rng = np.random.default_rng(seed)
    photo = np.tile(data.astronaut(), (2, 2, 1)) / np.float32(255)
    y, x = rng.integers(0, 512, 2)
    return np.clip(photo[y : y + size, x : x + size] + rng.normal(0, 0.02, (size, size, 3)), 0, 1).astype(np.float32)


def copy_bandwidth() -> float:
    """GB/s of one thread's copy, read and written bytes counted, of arrays the size of the solver's fields."""
    source = np.ones(8 * 2**20, np.float32)
    target = np.empty_like(source)
    best = min(timed(lambda: np.copyto(target, source))[1] for _ in range(20))
    return 2 * source.nbytes / best / 1e9


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
