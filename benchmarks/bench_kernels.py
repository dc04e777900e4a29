"""The kernels against eager PyTorch and torch.compile, side by side in one run.

    python benchmarks/bench_kernels.py --json benchmarks/results/kernels.json --minutes 9
    python benchmarks/bench_kernels.py --json benchmarks/results/kernels.json --minutes 9 --resume   what was left out
    python benchmarks/bench_kernels.py --operations block --channels 64 --dtypes bfloat16
    pytest benchmarks/bench_kernels.py --benchmark-only                    the fused forms alone, as pytest rows

Operations at the presets' shapes (256² at 64 channels, halved with every doubling): forward, backward and both, with
gradients for all inputs; the block's forward as the sampler runs it (inference), alone and with an adapter behind it
(adapted_block), and its backward with frozen weights, as stage II runs it (frozen_block). Forms: the kernels, eager
PyTorch in NCHW and in channels_last, torch.compile by default and with max-autotune. Each row holds, for every form,
20/50/80 quantiles of the GPU's milliseconds, the ratio to the fused form, the host's milliseconds to launch it, the
peak memory, the time to compile; and the predicted bytes with their share of the copy bandwidth measured in the same
run.

Rounds are interleaved, each with a cold L2 cache. The GPU waits until the host has launched all of a step: its time is
the kernels' own, as in a captured graph; where the host's time is the larger, a program without graphs sees that.
The file is written whole after every row, most wanted rows first; a form that fails is recorded with its error.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dtpm_fast.atomic import atomic_path
from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run as run_command
from dtpm_fast.kernels import BlockWeights, adaln, channel_attention, denoising_block, simple_gate
from dtpm_fast.kernels.adaln import adaln_ref
from dtpm_fast.kernels.adapter import adapter_of, tensors_of
from dtpm_fast.kernels.block import denoising_block_ref
from dtpm_fast.kernels.channel_attention import channel_attention_ref
from dtpm_fast.kernels.dispatch import TABLE
from dtpm_fast.kernels.simple_gate import simple_gate_ref
from dtpm_fast.kernels.timer import Timer
from dtpm_fast.kernels.traffic import (
    ADAPTER,
    BACKWARD,
    FORWARD,
    TRAINING_FORWARD,
    WIDE_BACKWARD,
    WIDE_FORWARD,
    WIDE_FROZEN_BACKWARD,
    adapter_inputs,
    block_inputs,
    total,
)

CHANNELS = (64, 32, 128, 256, 512)  # in the order in which they are wanted
DTYPES = ("bfloat16", "float16")
FORMS = ("fused", "eager", "eager channels_last", "compile", "compile max-autotune")
WARMUP = 3
Row = dict[str, Any]


def block_ref(*inputs: Tensor) -> Tensor:
    """The last six, where there are so many, are an adapter's."""
    return denoising_block_ref(*inputs[:5], BlockWeights(*inputs[5:19]), adapter_of([*inputs[19:]]))


def block(*inputs: Tensor) -> Tensor:
    return denoising_block(*inputs[:5], BlockWeights(*inputs[5:19]), adapter_of([*inputs[19:]]))


class Operation(NamedTuple):
    """Oracle, fused form, which of the block's inputs they take, the maps that each direction moves, and how many
    of these inputs train, the first ones."""

    reference: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    places: list[int]
    moved: dict[str, float]
    trained: int | None = None  # all


def _both(forward: float, backward: float, **more: float) -> dict[str, float]:
    return more | {"both": forward + backward, "forward": forward, "backward": backward}


OPERATIONS = {
    "block": Operation(
        block_ref, block, [*range(19)], _both(total(TRAINING_FORWARD), total(BACKWARD), inference=total(FORWARD))
    ),
    "adapted_block": Operation(block_ref, block, [*range(19)], {"inference": total(FORWARD) + sum(ADAPTER)}),
    "frozen_block": Operation(block_ref, block, [*range(19)], {"backward": total(BACKWARD)}, trained=5),
    "adaln": Operation(adaln_ref, adaln, [0, 1, 2], _both(2, 3)),
    "simple_gate": Operation(simple_gate_ref, simple_gate, [0], _both(3, 5)),
    "channel_attention": Operation(channel_attention_ref, channel_attention, [0, 9, 10], _both(3, 4)),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/bench_kernels.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--operations", nargs="+", choices=tuple(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--channels", nargs="+", type=int, default=list(CHANNELS), metavar="C")
    parser.add_argument("--dtypes", nargs="+", choices=(*DTYPES, "float32"), default=list(DTYPES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="height and width at 64 channels")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further row after this long")
    parser.add_argument("--json", type=Path, help="write the rows here, after each one")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json holds, measure the others")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses: no kernel runs there")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error("--rounds: at least 2")
    if args.resume and args.json is None:
        parser.error("--resume needs --json")
    return run_command(lambda: _work(args))


def _work(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device: the kernels' speed is a GPU's (--device cpu rehearses with the oracle)")
    warnings.simplefilter("ignore")  # the compilers' advice on settings
    until = time.monotonic() + 60 * args.minutes
    rows: list[Row] = []
    if args.resume and args.json.exists():
        rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    timer = Timer(args.device)
    about = _about(args, timer)
    known = {_key(row) for row in rows}
    left_out: list[str] = []
    wanted = [
        (operation, channels, dtype, direction)
        for dtype, channels, operation in itertools.product(args.dtypes, args.channels, args.operations)
        for direction in OPERATIONS[operation].moved
    ]
    failed = [_key(row) for row in rows if _failed(row)]
    # What failed before comes last: it may fail again, and long.
    for key in [*(key for key in wanted if key not in known), *(key for key in wanted if key in failed)]:
        operation, channels, dtype, direction = key
        if time.monotonic() > until:
            left_out.append(f"{operation} {direction} C={channels} {dtype}")
            continue
        rows = [row for row in rows if _key(row) != key]
        rows.append(measure(operation, channels, dtype, direction, args, timer, about["copy_GB_per_s"]))
        print(_line(rows[-1]), flush=True)
        _write(args.json, about, rows, left_out)
    if left_out:
        print(f"out of time: {len(left_out)} rows left out, --resume measures them", file=sys.stderr)
    _write(args.json, about, rows, left_out)
    return 0


def measure(
    operation: str, channels: int, dtype: str, direction: str, args: argparse.Namespace, timer: Timer, copy: float
) -> Row:
    """One row: every form of one operation, direction and shape. A form that fails leaves its error, no more."""
    side = max(args.size * 64 // channels, 1)
    shape = (args.batch, channels, side, side)
    unit = args.batch * channels * side**2 * getattr(torch, dtype).itemsize
    torch.compiler.reset()  # what another row compiled must not make this one compile for any shape
    forms: dict[str, Row] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for form in args.forms:
        since = time.perf_counter()
        try:
            step = step_of(operation, form, shape, getattr(torch, dtype), direction, timer.device)
            for _ in range(WARMUP):
                step()
            timer.wait()
            forms[form] = {"ready_s": round(time.perf_counter() - since, 1), "peak_MiB": timer.peak_mib(step)}
            steps[form] = step
        except Exception as error:
            forms[form] = {"error": _cause(error)}
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in steps}
    for _ in range(args.rounds):
        for form, step in list(steps.items()):
            try:
                times[form].append(timer.time(step))
            except Exception as error:
                forms[form] = {"error": _cause(error)}
                del steps[form], times[form]
    ours = statistics.median(ms for ms, _ in times["fused"]) if "fused" in times else None
    for form, values in times.items():
        quantiles = statistics.quantiles((ms for ms, _ in values), n=5, method="inclusive")
        median = statistics.median(ms for ms, _ in values)
        forms[form]["ms_20_50_80"] = [round(ms, 4) for ms in (quantiles[0], median, quantiles[3])]
        forms[form]["launch_ms"] = round(statistics.median(launch for _, launch in values), 4)
        if ours:
            forms[form]["times_fused"] = round(median / ours, 3)
    moved = _moved(operation, direction, channels) * unit
    row = {"operation": operation, "channels": channels, "dtype": dtype, "direction": direction, "shape": list(shape)}
    row |= {"predicted_MB": round(moved / 1e6, 1), "forms": forms}
    if ours:
        row["share_of_copy_bandwidth"] = float(f"{moved / (ours * 1e-3) / (copy * 1e9):.3g}")
    steps.clear()
    gc.collect()
    if timer.device == "cuda":
        torch.cuda.empty_cache()
    return row


def _moved(operation: str, direction: str, channels: int) -> float:
    """Maps that ours moves, by count. A block of 128 channels, whose backward is fused in part, counts as fused."""
    if "block" not in operation or channels <= 128:
        return OPERATIONS[operation].moved[direction]
    forward, backward = total(WIDE_FORWARD), total(WIDE_BACKWARD)
    if operation == "adapted_block":
        return forward + sum(ADAPTER)
    if operation == "frozen_block":
        return total(WIDE_FROZEN_BACKWARD)
    return {"forward": forward, "inference": forward, "backward": backward, "both": forward + backward}[direction]


def step_of(
    operation: str, form: str, shape: tuple[int, ...], dtype: torch.dtype, direction: str, device: str
) -> Callable[[], Any]:
    """What one round runs."""
    of = OPERATIONS[operation]
    inputs = block_inputs(*shape, dtype, device)
    inputs = [inputs[place] for place in of.places]
    if operation == "adapted_block":
        inputs += tensors_of(adapter_inputs(inputs[0]))
    if operation == "simple_gate":  # it halves its input
        inputs = [torch.cat((inputs[0], inputs[0]), 1)]
    if form == "eager":
        inputs = [tensor.contiguous() for tensor in inputs]
    function = of.fused if form == "fused" else of.reference
    if form.startswith("compile"):
        function = _compiled(function, "max-autotune-no-cudagraphs" if "max" in form else "default")
    if direction == "inference":

        def infer() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return infer
    inputs = [tensor.detach() for tensor in inputs]
    trained = [tensor.requires_grad_() for tensor in inputs[: of.trained]]
    if direction == "forward":
        return functools.partial(function, *inputs)
    grad = torch.randn_like(function(*inputs))
    if direction == "both":
        return lambda: torch.autograd.grad(function(*inputs), trained, grad)
    out = function(*inputs)
    return lambda: torch.autograd.grad(out, trained, grad, retain_graph=True)


def _compiled(function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """For one shape. The compiler's own cache on disk serves an operation's three directions."""
    torch._functorch.config.donated_buffer = False  # "backward" runs one forward's backward many times
    return torch.compile(lambda *inputs: function(*inputs), mode=mode, dynamic=False)


def _about(args: argparse.Namespace, timer: Timer) -> Row:
    cuda = timer.device == "cuda"
    about: Row = {
        "command": ["python", "benchmarks/bench_kernels.py", *sys.argv[1:]],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else "cpu: a rehearsal, the fused form is the oracle",
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]},
        "dispatch": Path(os.environ.get("DTPM_FAST_DISPATCH") or TABLE).name,
        "copy_GB_per_s": round(timer.copy_gb_per_s(), 1),
    }
    if cuda and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"]
        with contextlib.suppress(subprocess.SubprocessError, OSError):  # then the record has no clocks
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            about["clocks_sm_mem_driver"] = done.stdout.strip().splitlines()[0]
    print(f"{about['device']}, copy {about['copy_GB_per_s']} GB/s, {about['versions']}", flush=True)
    return about


def _write(file: Path | None, about: Row, rows: list[Row], left_out: list[str]) -> None:
    if file is None:
        return
    with atomic_path(file) as path:
        path.write_text(json.dumps(about | {"rows": rows, "left_out": left_out}, indent=1) + "\n", encoding="utf-8")


def _key(row: Row) -> tuple[str, int, str, str]:
    return row["operation"], row["channels"], row["dtype"], row["direction"]


def _failed(row: Row) -> bool:
    return any("error" in form for form in row["forms"].values())


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _line(row: Row) -> str:
    cells = []
    for name, form in row["forms"].items():
        if "error" in form:
            cells.append(f"{name} failed ({form['error'][:60]})")
        else:
            cells.append(f"{name} {form['ms_20_50_80'][1]:.3f} ms ({form.get('times_fused', 0):.2f}x)")
    share = f", {100 * row['share_of_copy_bandwidth']:.0f}% of copy" if "share_of_copy_bandwidth" in row else ""
    head = f"{row['operation']} {row['direction']} C={row['channels']} {row['dtype']}"
    return f"{head}{share}: {'; '.join(cells)}"


def _rows() -> Iterator[Any]:
    for operation, of in OPERATIONS.items():
        for direction in of.moved:
            yield pytest.param(operation, direction, id=f"{operation}-{direction}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels' speed is a GPU's")
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("operation", "direction"), list(_rows()))
def test_fused(benchmark: BenchmarkFixture, operation: str, direction: str, channels: int) -> None:
    side = 256 * 64 // channels
    step = step_of(operation, "fused", (8, channels, side, side), torch.bfloat16, direction, "cuda")

    def once() -> None:
        step()
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=20, warmup_rounds=WARMUP)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_block_on_the_cpu(benchmark: BenchmarkFixture, layout: str) -> None:
    """The oracle, which is what CPU tensors run, in both layouts: C = 32, 64²."""
    inputs = block_inputs(1, 32, 64, 64, torch.float32, "cpu")
    inputs[0] = inputs[0].contiguous(memory_format=getattr(torch, layout + "_format" * (layout == "contiguous")))
    with torch.no_grad():
        benchmark(block, *inputs)


if __name__ == "__main__":
    sys.exit(main())
