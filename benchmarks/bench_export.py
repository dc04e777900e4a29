"""Exports beside the in-process backends: export time, size, peak memory, cold start, and latency as a ratio.

    python benchmarks/bench_export.py --weights light --task derain --formats onnx aoti --size 256
    python benchmarks/bench_export.py --random base --formats onnx --rounds 0          the export alone

Every export and every cold start is a process of its own. Latencies are medians of rounds that take the candidates in
turn, so that a busy machine is busy for all of them; the ratio is to the plain model.

Memory of an export: `export_peak_mib` is the largest resident size of its process, `imports_mib` that of a process that
has imported the same and done nothing, and `peak_times_weights` their difference as a multiple of the model's weights
in float32 (the model itself is one of them).
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dtpm_fast.config import Config
from dtpm_fast.device import choose_device
from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run as run_command
from dtpm_fast.export.compare import stepped
from dtpm_fast.export.manifest import read_manifest
from dtpm_fast.export.restorer import open_stepper
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.sampler import make_steps, sample
from dtpm_fast.runtime.shipped import find_weights
from dtpm_fast.weights_file import load_model, save_weights

IMPORTS = "import onnx, onnxruntime, dtpm_fast.export.exporter, dtpm_fast.export.restorer, torchvision"
COLD = """
import sys, time
start = time.perf_counter()
import numpy as np
from dtpm_fast.export.restorer import ExportedRestorer
imported = time.perf_counter()
restorer = ExportedRestorer(sys.argv[1], device=sys.argv[2])
opened = time.perf_counter()
restorer(np.zeros((int(sys.argv[3]), int(sys.argv[3]), 3), np.uint8))
print(imported - start, opened - imported, time.perf_counter() - opened)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="light")
    parser.add_argument("--random", metavar="PRESET", help="random weights of this preset instead")
    parser.add_argument("--task", default="derain")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--formats", nargs="+", default=["onnx", "aoti"], choices=["onnx", "aoti", "tensorrt"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    def work() -> int:
        device, _ = choose_device(options.device)
        with tempfile.TemporaryDirectory() as temporary:
            if options.random:
                options.weights = str(random_weights(options.random, options.task, Path(temporary)))
            measure(options, device, Path(temporary))
        return 0

    return run_command(work)


def random_weights(preset: str, task: str, folder: Path) -> Path:
    config = Config.of(preset=preset, semantic_code="compact")
    torch.manual_seed(0)
    path = folder / f"{preset}-random.safetensors"
    save_weights(path, DTPM(config.model, 2).state_dict(), config, 2, task, {"data": "none, random"})
    return path


def measure(options: argparse.Namespace, device: torch.device, temporary: Path) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for kind in options.formats:
        with kept_error(rows, kind):
            rows[kind] = exported(options, kind, temporary / kind)
    weights = find_weights(options.weights, options.task)
    model = load_model(weights, 2).requires_grad_(False).to(device)
    steps = make_steps(weights.config, options.steps)
    sides = [-(-options.size // model.multiple) * model.multiple] * 2
    image = torch.rand(1, 3, *sides, device=device) * 2 - 1
    noise = noise_fields(0, *sides, steps.noise_fields).to(device)
    plain, plan = Reference(model, steps), Plan(model, steps)
    candidates: dict[str, Any] = {
        "reference": lambda: sample(plain, plain.prepare(image), noise),
        "plan": lambda: sample(plan, plan.prepare(image), noise),
    }
    weights_mib = sum(value.numel() * 4 for value in model.state_dict().values()) / 2**20
    for row in (row for row in rows.values() if "error" not in row):
        row["peak_times_weights"] = (row["export_peak_mib"] - row["imports_mib"]) / weights_mib
    if options.rounds:
        for kind in (kind for kind in options.formats if "error" not in rows[kind]):
            with kept_error(rows, kind):
                folder = temporary / kind
                rows[kind].update(cold_start(folder, options.device, sides[0]))
                stepper, _, _ = open_stepper(folder, read_manifest(folder), options.device, torch.get_num_threads())
                candidates[kind] = functools.partial(stepped(stepper), image, noise)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        with torch.inference_mode():
            for _ in range(options.rounds + 1):
                for name, restore in candidates.items():
                    start = time.perf_counter()
                    restore()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    times[name].append(time.perf_counter() - start)
        for name, seconds in times.items():
            rows.setdefault(name, {})["latency_s"] = statistics.median(seconds[1:])
        for name in times:
            rows[name]["times_reference"] = rows["reference"]["latency_s"] / rows[name]["latency_s"]
    record = {
        "weights": weights.path.name, "preset": weights.config.model.preset, "steps": options.steps,
        "precision": options.precision, "size": sides, "device": str(device), "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0], "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
        "weights_mib": weights_mib, "rows": rows,
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


@contextmanager
def kept_error(rows: dict[str, dict[str, Any]], kind: str) -> Iterator[None]:
    """A format that cannot be made or run here becomes a row with its error: the others are still measured."""
    try:
        yield
    except (subprocess.CalledProcessError, UserError, RuntimeError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1:]
        rows.setdefault(kind, {})["error"] = said[0] if said else type(error).__name__


def exported(options: argparse.Namespace, kind: str, folder: Path) -> dict[str, float]:
    command = [
        sys.executable, "-m", "dtpm_fast.commands.export", "--task", options.task, "--weights", options.weights,
        "--steps", str(options.steps), "--format", kind, "--precision", options.precision, "-o", str(folder),
    ]  # fmt: skip
    if kind != "onnx":
        command += ["--device", options.device]
    if kind == "tensorrt":
        command += ["--bucket", f"{options.size}x{options.size}"]
    imports, _ = alone([sys.executable, "-c", IMPORTS])
    start = time.perf_counter()
    peak, cpu = alone(command)
    found = {
        "export_s": time.perf_counter() - start,
        "export_cpu_s": cpu,
        "imports_mib": imports,
        "export_peak_mib": peak,
        "folder_mib": sum(file.stat().st_size for file in folder.iterdir()) / 2**20,
    }
    print(kind, found, flush=True)  # a long run says what it has as it goes
    return found


def alone(command: list[str]) -> tuple[float, float]:
    """The largest resident size of a process (MiB) and its processor time (s)."""
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used.ru_maxrss / 1024, used.ru_utime + used.ru_stime


def cold_start(folder: Path, device: str, side: int) -> dict[str, float]:
    command = [sys.executable, "-c", COLD, str(folder), device, str(side)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(zip(("import_s", "open_s", "first_picture_s"), map(float, said.split()), strict=True))


if __name__ == "__main__":
    sys.exit(main())
