"""How fast photos are restored: every backend side by side in one run, against the plain NCHW form of stock NAFNet.

    python benchmarks/bench_restore.py run --threads 2 --size 256x256 -o benchmarks/results/restore-cpu.json
    python benchmarks/bench_restore.py run --device cuda --preset base --steps 4 10 --size 256x256 512x512 1080x1920
    python benchmarks/bench_restore.py run --device cuda --preset base --batch 8
    python benchmarks/bench_restore.py memory --size 1080x1920 --tile auto
    python benchmarks/bench_restore.py tiles --size 1024x1536 --tile 512
    python benchmarks/bench_restore.py cold --backend fused
    python benchmarks/bench_restore.py table benchmarks/results/restore-*.json --plot docs/images/restore-speed.svg

Weights are random (speed does not depend on them) unless --weights names a file. Rounds are interleaved, one picture of
every row after the other, so that whatever else the machine does falls on all rows alike. A row's time is the whole
restoration of pictures that are on the device already: predictor, semantic code and all steps.
"""

import argparse
import copy
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import dtpm_fast.model.block
from dtpm_fast.atomic import atomic_path
from dtpm_fast.config import Config
from dtpm_fast.cores import cpu_name
from dtpm_fast.device import choose_device
from dtpm_fast.diffusion import restore
from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.runtime.backends import choose_backend
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.sampler import make_steps
from dtpm_fast.weights_file import load_model, read_weights, save_weights

PLAIN = "plain NCHW"
CPU_ROWS = [
    PLAIN, "reference", "folded float32", "folded bfloat16", "fused float32", "fused bfloat16", "compiled float32",
    "compiled bfloat16",
]  # fmt: skip
CUDA_ROWS = [
    PLAIN, "eager bfloat16", "reduce-overhead bfloat16", "compiled bfloat16", "fused bfloat16", "graph bfloat16",
]  # fmt: skip
Restore = Callable[[Tensor, Tensor], Tensor]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="latency and throughput of every row")
    measure.add_argument("--size", type=_size, nargs="+", default=[(256, 256)], metavar="HxW")
    measure.add_argument("--steps", type=int, nargs="+", default=[4])
    measure.add_argument("--batch", type=int, default=1)
    measure.add_argument("--rows", nargs="+", help="only these rows (default: all that this device has)")
    measure.add_argument("--rounds", type=int, default=7)
    measure.add_argument("-o", "--output", type=Path, help="record the results as JSON")
    memory = commands.add_parser("memory", help="peak memory of one picture above the loaded model")
    memory.add_argument("--size", type=_size, default=(1080, 1920), metavar="HxW")
    memory.add_argument("--tile", default="auto")
    memory.add_argument("--precision", default="auto")
    memory.add_argument("--measured", type=Path, help=argparse.SUPPRESS)  # the inner process
    tiles = commands.add_parser(
        "tiles", help="a rainy picture in tiles against the untiled one, by the shipped weights"
    )
    tiles.add_argument("--size", type=_size, default=(1024, 1536), metavar="HxW")
    tiles.add_argument("--tile", type=int, default=512)
    tiles.add_argument("--steps", type=int, default=4)
    tiles.add_argument("--threads", type=int, default=0)
    cold = commands.add_parser("cold", help="seconds from the start of a process to its first picture")
    cold.add_argument("--size", type=_size, default=(256, 256), metavar="HxW")
    for command in (memory, cold):
        command.add_argument("--backend", default="auto")
    for command in (measure, memory, cold):
        command.add_argument("--preset", default="light")
        command.add_argument("--weights", type=Path)
        command.add_argument("--device", default="auto")
        command.add_argument("--threads", type=int, default=0)
    table = commands.add_parser("table", help="records as a Markdown table, and as a plot")
    table.add_argument("records", type=Path, nargs="+")
    table.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args(arguments)
    return run(
        lambda: {"run": _run, "memory": _memory, "tiles": _tiles, "cold": _cold, "table": _table}[options.command](
            options
        )
    )


# ---------------------------------------------------------------------------------------------------------- latency


def _run(options: argparse.Namespace) -> int:
    device, why = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    config, model = _model(options)
    rows = options.rows or (CUDA_ROWS if device.type == "cuda" else CPU_ROWS)
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    record = {
        "what": "restore", "date": date.today().isoformat(), "device": why, "machine": _machine(device),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "preset": config.model.preset, "rounds": options.rounds, "results": results, "left_out": left_out,
    }  # fmt: skip
    if device.type == "cpu":
        record["product_gmacs"] = _product_rate()
    for steps, (height, width) in itertools.product(options.steps, options.size):
        results += _measure(model, config, rows, device, options, steps, height, width, left_out)
        if options.output:  # after each one: a later one may not fit the memory
            with atomic_path(options.output) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(_markdown([record]))
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    return 0


@torch.inference_mode()
def _measure(
    model: DTPM, config: Config, rows: list[str], device: torch.device, options: argparse.Namespace,
    steps: int, height: int, width: int, left_out: list[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Every row's times, side by side; one that fails adds a line to `left_out`."""
    multiple = model.multiple
    tall, wide = (-(-side // multiple) * multiple for side in (height, width))
    y_d = torch.rand(options.batch, 3, tall, wide, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = noise_fields(0, tall, wide)
    torch.compiler.reset()  # what another size compiled must not make this one compile for any size
    runs = {name: _row(name, model, config, steps, device) for name in rows}
    times: dict[str, list[float]] = {}
    warm, exact, psnrs, peaks = {}, None, {}, {}
    y_d, noise = y_d.to(device), noise.to(device)
    for name, call in list(runs.items()):
        start = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            output = call(y_d, noise)
            _synchronize(device)
        except Exception as error:  # of a compiler, or out of memory: the other rows are still worth their time
            why = next(iter(str(error).strip().splitlines()), "")
            left_out.append(f"{name} at {height}x{width}, {steps} steps: {type(error).__name__}: {why}")
            del runs[name]
            continue
        warm[name] = time.perf_counter() - start
        if device.type == "cuda":
            call(y_d, noise)  # the second time that a size comes, a graph is captured
        peaks[name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        exact = output if exact is None else exact
        psnrs[name] = float(10 * torch.log10(4 / (output - exact).double().square().mean().clamp_min(1e-30)))
    for _ in tqdm(range(options.rounds), desc=f"{height}x{width}, {steps} steps", disable=None):
        for name, call in runs.items():
            start = time.perf_counter()
            call(y_d, noise)
            _synchronize(device)
            times.setdefault(name, []).append(time.perf_counter() - start)
    rows = list(runs)
    if not rows:
        return []
    base = statistics.median(times[rows[0]])
    return [
        {
            "row": name, "height": height, "width": width, "steps": steps, "batch": options.batch,
            "median_s": statistics.median(times[name]), "fastest_s": min(times[name]), "first_call_s": warm[name],
            "speedup": base / statistics.median(times[name]),
            "speedup_fastest": min(times[rows[0]]) / min(times[name]),
            "psnr_db": None if name == rows[0] else psnrs[name], "peak_bytes": peaks[name],
        }
        for name in rows
    ]  # fmt: skip


def _row(name: str, model: DTPM, config: Config, steps: int, device: torch.device) -> Restore:
    kind, _, precision = name.partition(" ")
    model = model.to(device)
    if name == PLAIN:
        return _plain(model, config, steps)
    model = model.to(memory_format=torch.channels_last)
    table = make_steps(config, steps)
    if kind in ("eager", "reduce-overhead"):
        return _eager(Reference(model, table), getattr(torch, precision), device, kind == "reduce-overhead")
    if kind == "folded":  # the plan in PyTorch's operators, what `fused` is without the C++ blocks
        folded = Plan(model, table, getattr(torch, precision))
        return lambda y_d, noise: folded.restore(y_d.contiguous(memory_format=torch.channels_last), noise)
    stepper, _ = choose_backend(kind, model, table, device, precision or "auto")
    return lambda y_d, noise: stepper.restore(y_d.contiguous(memory_format=torch.channels_last), noise)


def _plain(model: DTPM, config: Config, steps: int) -> Restore:
    """The paper's sampler over contiguous tensors, with the layer norm that stock NAFNet writes out by hand."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def call(y_d: Tensor, noise: Tensor) -> Tensor:
        with _handwritten_layer_norm():
            return restore(model, y_d, noise.expand(y_d.shape).contiguous(), steps, config.diffusion)[0]

    return call


@contextmanager
def _handwritten_layer_norm() -> Iterator[None]:
    def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        mu = x.mean(1, keepdim=True)
        variance = (x - mu).pow(2).mean(1, keepdim=True)
        return (x - mu) / (variance + 1e-6).sqrt() * (1 + scale[:, :, None, None]) + shift[:, :, None, None]

    kept = dtpm_fast.model.block.adaln
    dtpm_fast.model.block.adaln = adaln
    try:
        yield
    finally:
        dtpm_fast.model.block.adaln = kept


def _eager(reference: Reference, dtype: torch.dtype, device: torch.device, reduce_overhead: bool) -> Restore:
    """What a user gets from PyTorch alone: the plain modules under autocast, or torch.compile's own CUDA graphs. The
    weights are in `dtype` already, because autocast would cast frozen ones again in every step."""
    reference.model = copy.deepcopy(reference.model)
    for module in reference.model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.to(dtype)
    if reduce_overhead:
        step = torch.compile(reference.step, mode="reduce-overhead")
        prepare = torch.compile(reference.prepare, mode="reduce-overhead")

        def cloned_step(*given: Any) -> tuple[Tensor, Tensor]:
            x, x0 = step(*given)  # its outputs are overwritten by the next call
            return x.clone(), x0.clone()

        reference.step = cloned_step  # type: ignore[assignment, method-assign]
        reference.prepare = lambda *given: {k: v.clone() for k, v in prepare(*given).items()}  # type: ignore[method-assign]

    def call(y_d: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return reference.restore(y_d.contiguous(memory_format=torch.channels_last), noise).float()

    return call


# -------------------------------------------------------------------------------------------------------------- tiles


@torch.inference_mode()
def _tiles(options: argparse.Namespace) -> int:
    from skimage import data

    from dtpm_fast.data.degradations import degrade
    from dtpm_fast.runtime.shipped import find_weights
    from dtpm_fast.runtime.tiling import Tiled, windows

    if options.threads:
        torch.set_num_threads(options.threads)
    height, width = options.size
    photo = data.astronaut().astype("float32") / 255
    photo = np.tile(np.concatenate([photo, photo[:, ::-1]], axis=1), (-(-height // 512), -(-width // 1024), 1))
    rainy = degrade("derain", np.ascontiguousarray(photo[:height, :width]), np.random.default_rng(0))
    y_d = torch.from_numpy(np.ascontiguousarray(rainy)).permute(2, 0, 1)[None].float() * 2 - 1
    weights = find_weights("light", "derain")
    model = load_model(weights, stage=2).requires_grad_(False)
    plan, why = choose_backend(
        "fused", model, make_steps(weights.config, options.steps), torch.device("cpu"), "float32"
    )
    assert isinstance(plan, Plan)
    noise = noise_fields(0, height, width)
    whole = plan.restore(y_d, noise)
    difference = (Tiled(plan, options.tile, model.multiple).restore(y_d, noise) - whole).double()
    tiled = windows(height, width, options.tile, model.multiple)
    rows = {window.rows.core_start for window in tiled if window.rows.core_start}
    columns = {window.columns.core_start for window in tiled if window.columns.core_start}
    seams = {f"row {row}": difference[:, :, row - 16 : row + 16] for row in sorted(rows)}
    seams |= {f"column {column}": difference[..., column - 16 : column + 16] for column in sorted(columns)}
    print(f"{height}x{width}, {len(tiled)} tiles, cores of {options.tile}, {options.steps} steps, {why}")
    for where, part in {"picture": difference, **seams}.items():
        psnr = 10 * np.log10(4 / float(part.square().mean()))
        print(f"{where}: {psnr:.1f} dB, at most {float(part.abs().max()) * 127.5:.1f} levels of 255")
    print(f"what restoring changed: {10 * np.log10(4 / float((whole - y_d).double().square().mean())):.1f} dB")
    return 0


# ---------------------------------------------------------------------------------------------- memory and cold start


def _memory(options: argparse.Namespace) -> int:
    """In a process of its own, because the peak of a process never falls."""
    if options.measured:
        return _measured(options)
    with tempfile.TemporaryDirectory() as folder:
        weights = _weights_file(options, Path(folder))
        command = [
            sys.executable, __file__, "memory", "--measured", str(weights), "--backend", options.backend,
            "--size", "{}x{}".format(*options.size), "--tile", options.tile, "--precision", options.precision,
            "--device", options.device, "--threads", str(options.threads),
        ]  # fmt: skip
        return subprocess.run(command, check=False).returncode


def _measured(options: argparse.Namespace) -> int:
    from dtpm_fast import Restorer

    if options.threads:
        torch.set_num_threads(options.threads)
    task = read_weights(options.measured).task
    tile = None if options.tile == "none" else options.tile if options.tile == "auto" else int(options.tile)
    restorer = Restorer.from_pretrained(
        options.measured, task, device=options.device, backend=options.backend, tile=tile, precision=options.precision
    )
    restorer.warmup([(64, 64)])
    cuda = restorer.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else _resident()
    photo = (torch.rand(*options.size, 3) * 255).to(torch.uint8).numpy()
    start = time.perf_counter()
    with _peak(cuda) as peak:
        restorer(photo)
    print(
        f"{options.size[0]}x{options.size[1]}, tile {options.tile}, {'; '.join(restorer.about.split('; ')[-2:])}: "
        f"{(peak[0] - before) / 2**30:.2f} GiB above the model, {time.perf_counter() - start:.1f} s"
    )
    return 0


@contextmanager
def _peak(cuda: bool) -> Iterator[list[int]]:
    """The highest use of memory inside, in bytes; on Linux the resident set, looked at every 5 ms."""
    peak, done = [0], threading.Event()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated()
        return

    def look() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _resident())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no Linux: the peak so far is all there is
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cold(options: argparse.Namespace) -> int:
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[6]) or torch.get_num_threads())\n"
        "from dtpm_fast import Restorer\n"
        "r = Restorer.from_pretrained(sys.argv[1], sys.argv[2], device=sys.argv[3], backend=sys.argv[4])\n"
        "h, w = map(int, sys.argv[5].split('x')); r(torch.rand(1, 3, h, w)); print(r.about)"
    )
    with tempfile.TemporaryDirectory() as folder:
        weights = _weights_file(options, Path(folder))
        given = [str(weights), read_weights(weights).task, options.device, options.backend]
        size = "{}x{}".format(*options.size)
        for which in ("first process", "second process"):
            start = time.perf_counter()
            command = [sys.executable, "-c", code, *given, size, str(options.threads)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"the process failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            print(
                f"{which}: {time.perf_counter() - start:.2f} s to the first picture of {size} ({done.stdout.strip()})"
            )
    return 0


# ------------------------------------------------------------------------------------------------- records and models


def _table(options: argparse.Namespace) -> int:
    records = []
    for path in options.records:
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable record ({error})") from error
        if records[-1].get("what") != "restore":
            raise UserError(f"{path}: not a record of this benchmark")
    print(_markdown(records))
    if options.plot:
        with atomic_path(options.plot) as temporary:
            temporary.write_text(_svg(records), encoding="utf-8")
    return 0


def _markdown(records: list[dict[str, Any]]) -> str:
    lines = [
        "| device | preset | picture | batch | steps | row | median | fastest | pictures/s | times as fast | PSNR |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        where = f"{record['machine']}, {record['threads']} threads, torch {record['torch']}, {record['date']}"
        if "product_gmacs" in record:
            where += f", products at {record['product_gmacs']:.0f} billion multiply-adds/s"
        for r in record["results"]:
            psnr = "" if r["psnr_db"] is None else f"{min(r['psnr_db'], 150):.0f} dB"
            lines.append(
                f"| {where} | {record['preset']} | {r['height']}x{r['width']} | {r['batch']} | {r['steps']} "
                f"| {r['row']} "
                f"| {r['median_s'] * 1e3:.0f} ms | {r['fastest_s'] * 1e3:.0f} ms | {r['batch'] / r['median_s']:.2f} "
                f"| {r['speedup']:.2f} ({r['speedup_fastest']:.2f} by fastest) | {psnr} |"
            )
    return "\n".join(lines)


def _svg(records: list[dict[str, Any]]) -> str:
    """Bars of "times as fast as the first row", one group for every picture size."""
    bars: list[str] = []
    y = 10
    longest = max(r["speedup"] for record in records for r in record["results"])
    for record in records:
        group = None
        for r in record["results"]:
            key = (r["height"], r["width"], r["batch"], r["steps"])
            if key != group:
                group, y = key, y + 26
                title = f"{record['machine']}, {record['preset']}, {key[0]}x{key[1]}, batch {key[2]}, {key[3]} steps"
                title += f", {record['date']}"
                bars.append(f'<text x="10" y="{y}" font-weight="bold">{title}</text>')
            y += 22
            length = 330 * r["speedup"] / longest
            bars.append(
                f'<text x="170" y="{y}" text-anchor="end">{r["row"]}</text>'
                f'<rect x="180" y="{y - 12}" width="{length:.1f}" height="15" fill="#3b6ea5"/>'
                f'<text x="{186 + length:.1f}" y="{y}">{r["speedup"]:.1f}x, {r["median_s"] * 1e3:.0f} ms</text>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{y + 16}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>{"".join(bars)}</svg>\n'
    )


def _model(options: argparse.Namespace) -> tuple[Config, DTPM]:
    if options.weights:
        weights = read_weights(options.weights)
        return weights.config, load_model(weights, stage=2).requires_grad_(False)
    return _random(options.preset)


def _random(preset: str) -> tuple[Config, DTPM]:
    """None of its parts is zero or the identity, so that the PSNR between rows says something."""
    config = Config.of(preset=preset, semantic_code="compact")
    torch.manual_seed(0)
    model = DTPM(config.model, 2).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith((".beta", ".gamma")):
            torch.nn.init.normal_(parameter, std=0.3)
        elif any(part in name for part in ("modulation", ".m_out.", ".ending.")):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return config, model


def _weights_file(options: argparse.Namespace, folder: Path) -> Path:
    if options.weights:
        return options.weights
    config, model = _random(options.preset)
    save_weights(folder / "random.safetensors", model.state_dict(), config, 2, "derain", {"data": "none, random"})
    return folder / "random.safetensors"


def _product_rate(side: int = 1024) -> float:
    """Billions of multiply-adds a second in PyTorch's float32 matrix product: how fast the CPU is in this hour.
    Rows that compute follow it, rows that wait for memory do not, and so ratios follow it too."""
    a = torch.randn(side, side)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return side**3 / statistics.median(times) / 1e9


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write HEIGHTxWIDTH, as in 1080x1920") from None
    return height, width


if __name__ == "__main__":
    sys.exit(main())
