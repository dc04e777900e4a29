"""Measures every fused kernel's tile sizes on this GPU against cuBLAS, and writes the dispatch table.

    python -m dtpm_fast.kernels.tune --output dispatch.json --minutes 5
    python -m dtpm_fast.kernels.tune --output dispatch.json --minutes 5 --resume      where the first one ended

Nothing else tunes: without this command the recorded table decides, and DTPM_FAST_DISPATCH=dispatch.json names another.
Processes beside this one compile the tile sizes ahead; only this one measures. The file is written whole after every
kernel and channel count, and what was not measured keeps the entry of the table in use, so it serves at any time.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm

from dtpm_fast.atomic import atomic_path
from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run
from dtpm_fast.kernels import block_compute, dwconv_triton, wide_conv1x1_triton
from dtpm_fast.kernels.ahead import Ahead
from dtpm_fast.kernels.block_compute import BlockWeights, Modulation
from dtpm_fast.kernels.dispatch import ALWAYS, ANY, WIDE, Options, Table, read_table, table, using_table
from dtpm_fast.kernels.timer import Timer
from dtpm_fast.kernels.traffic import adapter_inputs, block_inputs

CHANNELS = (32, 64, 128, 256, 512)
DTYPES = {16: torch.bfloat16, 32: torch.float32}
BATCH = 8
FEWEST_WIDE = 128  # channels
ROUNDS = 7  # of a measurement, 6 ms and more each
PATIENCE = 120  # seconds for a job that helpers compile ahead
EPS = 1e-6

_TILES = [
    {"BLOCK_P": pixels, "num_warps": warps, "num_stages": stages}
    for pixels, warps, stages in itertools.product((16, 32, 64, 128), (2, 4, 8), (1, 2, 3))
]
_PRODUCTS = [
    {"BLOCK_P": pixels, "BLOCK_N": outputs, "BLOCK_K": 64, "num_warps": warps, "num_stages": stages}
    for (pixels, outputs), warps, stages in itertools.product(
        ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256)), (4, 8), (2, 3)
    )
    if 32 <= pixels * outputs // (32 * warps) <= 128  # sums of a thread, of which a gate has twice as many
]
_STRIPS = [
    {"GROUPS": groups, "COLUMNS": columns, "BLOCK_C": channels, "ROWS": rows, "num_warps": 4}
    for groups, columns, channels, rows in itertools.product((2, 4, 8, 16), (1, 2, 4), (32, 64), (16, 32))
    if 1 <= groups * channels // 128 <= 4
]
CANDIDATES: dict[str, list[Options]] = {
    "adaln_conv1x1_forward": [tile | {"BLOCK_N": outputs} for tile in _TILES for outputs in (64, 128)],
    "adaln_conv1x1_backward": _TILES,
    "attention_ffn_forward": _TILES,
    "ffn_backward": _TILES,
    "conv3_backward": _TILES,
    **dict.fromkeys(WIDE, _PRODUCTS),
    **dict.fromkeys(ALWAYS, _STRIPS),
}
# Float32 values that a program holds at a time, roughly: tiles of pixels by channels, and of channels by channels.
_HELD = {
    "adaln_conv1x1_forward": (2, 0.0),
    "adaln_conv1x1_backward": (5, 2.5),
    "attention_ffn_forward": (4, 0.5),
    "ffn_backward": (7, 4.0),
    "conv3_backward": (3, 1.5),
}


class Job(NamedTuple):
    """One entry of the table to be found."""

    kernel: str
    channels: int
    bits: int


def candidates(job: Job) -> list[Options]:
    """The tile sizes worth compiling: others would spill, or leave a thread next to nothing to do."""
    if job.kernel in ALWAYS or job.kernel in WIDE:
        return CANDIDATES[job.kernel]
    tiles, squares = _HELD[job.kernel]
    c = triton.next_power_of_2(job.channels)
    found = []
    for options in CANDIDATES[job.kernel]:
        pixels, outputs = options["BLOCK_P"], options.get("BLOCK_N", 0)
        held = tiles * pixels * c + squares * c * c + outputs * (c / 2 + pixels)
        if 16 <= held / (32 * options["num_warps"]) <= 128 and outputs <= 2 * c:
            found.append(options)
    return found


def jobs_of(channels: tuple[int, ...], bits: tuple[int, ...]) -> list[Job]:
    """In the order in which they are worth measuring: 64 channels first, which is where pictures are large, then 512,
    which 29 of the 36 blocks of `base` have. Wide products come before the kernels that do without them."""
    order = sorted(channels, key=lambda c: (c != 64, c != 512, c))
    everywhere = [Job(kernel, 64, width) for width in bits for kernel in ALWAYS]
    kernels = [*WIDE, *(kernel for kernel in CANDIDATES if kernel not in ALWAYS and kernel not in WIDE)]
    by_channels = [Job(k, c, b) for b in bits for c in order for k in kernels if k not in WIDE or c >= FEWEST_WIDE]
    return everywhere + by_channels


def tune(
    jobs: list[Job], found: Table, ready: Callable[[Job], list[Options]], keep: Callable[[Table, Job], Any]
) -> Table:
    """Time each job's candidates that are `ready`, and the form without the kernel; keep the fastest, or none where it
    loses.

    An entry also serves the smaller channel counts that have none. So a count at which the kernel loses, below one at
    which it wins, gets an entry without options, which stands for the form without the kernel. Where none of them is
    ready, the entry stays. `ready` is called before a job, `keep` after it with the table so far.
    """
    with tqdm(jobs, unit="kernel", disable=None) as progress:
        for job in progress:
            progress.set_postfix_str(f"{job.kernel} C={job.channels} {job.bits} bits")
            tried = ready(job)
            if not tried and candidates(job):
                keep(found, job)
                continue
            step = _steps(job.channels, DTYPES[job.bits])[job.kernel]
            with using_table(found):  # a kernel competes with what this run has found best so far
                timed = [(ms, options) for options in tried if (ms := _time(job.kernel, options, step))]
                unfused = None if job.kernel in ALWAYS else _time(job.kernel, None, step) or float("inf")
            if len(timed) < len(tried):
                progress.write(
                    f"{job.kernel} C={job.channels}: {len(tried) - len(timed)} of {len(tried)} tiles do not fit"
                )
            if unfused is not None:
                timed.append((unfused, {}))
            if not timed:
                raise UserError(f"no tile size of {job.kernel} runs on this GPU at {job.channels} channels")
            best = min(timed, key=lambda entry: entry[0])[1] or None
            channels = ANY if job.kernel in ALWAYS else job.channels
            entries = [e for e in found.get(job.kernel, []) if (e["channels"], e["bits"]) != (channels, job.bits)]
            entry = {"channels": channels, "bits": job.bits, "options": best}
            found = found | {job.kernel: sorted([*entries, entry], key=lambda e: (e["bits"], e["channels"]))}
            keep(found, job)
    return found


def _time(kernel: str, options: Options | None, step: Callable[[], Any]) -> float | None:
    """Median milliseconds of the GPU's own, with a cold L2 cache, as `bench_kernels.py` times them; None where the tile
    does not fit the GPU. No options: not fused."""
    timer = _timer()
    with _alone(kernel, options):
        try:
            step()  # compiles what no process did ahead
            timer.wait()
            milliseconds = statistics.median(timer.time(step)[0] for _ in range(ROUNDS))
        except Exception as error:
            if not _does_not_compile(error):
                raise
            return None
    return milliseconds


@functools.cache
def _timer() -> Timer:
    return Timer("cuda")


def _does_not_compile(error: Exception) -> bool:
    """Too many registers, too much shared memory, or nothing that the compiler finds a way to do."""
    return isinstance(error, triton.runtime.errors.TritonError) or str(error).startswith("PassManager")


@contextlib.contextmanager
def _alone(kernel: str, options: Options | None) -> Iterator[None]:
    """The table in use, but for this kernel's options, and for the kernel that would take its place."""
    entries = [] if options is None else [{"channels": ANY, "bits": bits, "options": options} for bits in DTYPES]
    instead: Table = {WIDE[kernel]: []} if kernel in WIDE else {}
    with using_table(table() | instead | {kernel: entries}):
        yield


def _compile(job: Job) -> Iterator[None]:
    """In another process: launch every candidate once on a small map, which leaves it in Triton's cache on disk."""
    # Else the small map would get smaller tiles than those that are measured.
    dwconv_triton.FEWEST_PROGRAMS = wide_conv1x1_triton.FEWEST_PROGRAMS = 1
    step = _steps(job.channels, DTYPES[job.bits], side=16, batch=1)[job.kernel]
    for options in candidates(job):
        with _alone(job.kernel, options):
            try:
                step()
            except Exception as error:
                if not _does_not_compile(error):
                    raise
        yield
    torch.cuda.synchronize()


def _steps(channels: int, dtype: torch.dtype, side: int = 0, batch: int = BATCH) -> dict[str, Callable[[], Any]]:
    """Each kernel's group at the presets' shape of this many channels: 256² at 64, halved with every doubling."""
    side = side or 256 * 64 // channels
    inputs = block_inputs(batch, channels, side, side, dtype, "cuda")
    x, modulation, weights = inputs[0], Modulation(*inputs[1:5]), BlockWeights(*inputs[5:])
    h = block_compute.adaln_conv1x1(x, modulation, weights, EPS)
    g, mean, attention = block_compute.dwconv_gate_attention(h, weights)
    arguments = (g, attention, x, modulation, weights, None, EPS, True)
    conv3, conv4, conv5 = ((getattr(weights, f"conv{n}_weight"), getattr(weights, f"conv{n}_bias")) for n in (3, 4, 5))
    adaln = modulation.shift2, modulation.scale2, EPS
    wide = block_compute.wide
    adapter = adapter_inputs(x)
    return {
        "wide_adaln_conv1x1": lambda: block_compute.adaln_conv1x1(x, modulation, weights, EPS),
        "wide_attention_conv1x1_residual": lambda: wide(
            "wide_attention_conv1x1_residual", g, *conv3, attention=attention, residual=x, factor=weights.beta
        ),
        "wide_adaln_conv1x1_gate": lambda: wide("wide_adaln_conv1x1_gate", x, *conv4, adaln=adaln, gate=True),
        "wide_conv1x1_residual": lambda: wide("wide_conv1x1_residual", g, *conv5, residual=x, factor=weights.gamma),
        "wide_conv1x1_adapter": lambda: block_compute.conv5_adapter(g, x, conv5, weights.gamma, adapter),
        "adaln_conv1x1_forward": lambda: block_compute.adaln_conv1x1(x, modulation, weights, EPS),
        "adaln_conv1x1_backward": lambda: block_compute.adaln_conv1x1_backward(h, x, x, modulation, weights, EPS),
        "attention_ffn_forward": lambda: block_compute.attention_ffn(*arguments),
        "ffn_backward": lambda: block_compute.ffn_backward(x, x, modulation, weights, EPS),
        "conv3_backward": lambda: block_compute.conv3_backward(x, g, attention, weights),
        "dwconv_gate_pool_forward": lambda: block_compute.dwconv_gate_pool(h, weights),
        "gate_backward": lambda: block_compute.gate_backward(g, attention, mean, h, weights),
        "dwconv_backward": lambda: block_compute.dwconv_backward(h, weights),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.kernels.tune",
        description="Measure the fused kernels' tile sizes on this GPU and write the dispatch table.",
        epilog="example: python -m dtpm_fast.kernels.tune --output dispatch.json --minutes 5",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, choices=CHANNELS, metavar="C")
    parser.add_argument("--bits", type=int, nargs="+", default=(16,), choices=(16, 32), help="default: 16")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further measurement after this long")
    parser.add_argument("--resume", action="store_true", help="keep what --output holds already; measure the rest")
    parser.add_argument(
        "--jobs", type=int, default=max(1, min((os.cpu_count() or 1) - 2, 16)), help="processes that compile ahead"
    )
    arguments = parser.parse_args(argv)
    return run(lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise UserError("tuning measures on a CUDA device, and PyTorch sees none here; the recorded table stays in use")
    found, done = _start(arguments.output, arguments.resume)
    jobs = [job for job in jobs_of(tuple(arguments.channels), tuple(arguments.bits)) if job not in done]
    until = time.monotonic() + 60 * arguments.minutes

    def keep(so_far: Table, job: Job) -> None:
        done.append(job)
        _write(arguments.output, so_far, done)

    with Ahead(_compile, jobs, max(1, arguments.jobs)) as ahead:

        def ready(job: Job) -> list[Options]:
            ahead.wait(job, min(PATIENCE, max(0.0, until - time.monotonic())))
            if time.monotonic() >= until:
                raise TimeoutError
            return _compiled(ahead, job)

        try:
            tune(jobs, found, ready, keep)
        except TimeoutError:
            print(f"out of time after {len(done)} entries; --resume measures the rest", file=sys.stderr)
    print(f"{arguments.output}: name it in DTPM_FAST_DISPATCH to use it")
    return 0


def _compiled(ahead: Ahead[Job], job: Job) -> list[Options]:
    """The candidates to measure: all, but those that a process died over, as this one would, and what it had left."""
    tried, name = candidates(job), f"{job.kernel} C={job.channels}"
    if ahead.died(job):
        ready = tried[: ahead.steps(job)]
        left_out = len(tried) - len(ready)
        tqdm.write(f"{name}: a process died compiling ahead; {left_out} of {len(tried)} tiles are left out")
        return ready
    result = ahead.results[job]
    if not result.ready():
        tqdm.write(f"{name}: compiling ahead gave nothing in {PATIENCE} s; goes on here")
    elif not result.successful():
        try:
            result.get()
        except Exception as error:  # whatever the helper met; the measurement itself will meet it again
            tqdm.write(f"{name}: compiling ahead failed ({type(error).__name__}: {error})")
    return tried


def _start(output: Path, resume: bool) -> tuple[Table, list[Job]]:
    """The table to begin with, and the jobs that it holds measurements of."""
    if not (resume and output.exists()):
        return table(), []
    try:
        found = read_table(str(output))
    except ValueError as error:
        raise UserError(str(error)) from error
    measured = (json.loads(output.read_text(encoding="utf-8")).get("measured_on") or {}).get("entries", [])
    return found, [Job(*entry) for entry in measured]


def _write(output: Path, kernels: Table, done: list[Job]) -> None:
    measured_on = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "entries": [list(job) for job in done],
    }
    with atomic_path(output) as path:
        text = json.dumps({"measured_on": measured_on, "kernels": kernels}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
