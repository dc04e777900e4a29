"""One training step (forward, backward, clipping, Adam, averages) in its forms, side by side in one process.

    python benchmarks/bench_train.py                                    # what this machine can run
    python benchmarks/bench_train.py --preset light base --batch 32 --crop 256 --json benchmarks/results/train.json
    python benchmarks/bench_train.py --preset tiny --batch 2 --crop 64 --forms channels_last contiguous --rounds 5

Forms: `channels_last` is the reference of the ratios; `contiguous` the same in PyTorch's default layout; `compile`
torch.compile of the whole loss; `fused` the blocks through the fused kernels, on CUDA only, where `fused compile` is
what training takes by itself; `recompute` activation checkpointing; `bfloat16` for CPUs that multiply it, on CUDA it
is the default. Rounds are interleaved; a form's time is the median. Memory: the allocator's peak during a step above
what it held before, which is the activations and whatever the step needs beside them.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dtpm_fast.atomic import atomic_path
from dtpm_fast.config import PRESETS, Config
from dtpm_fast.cores import cpu_name
from dtpm_fast.device import choose_device
from dtpm_fast.exit_code import run as run_command
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.training.determinism import determinism
from dtpm_fast.training.freeze import freeze
from dtpm_fast.training.loop import Run, Trainer

FORMS: dict[str, dict[str, Any]] = {
    "channels_last": {},
    "contiguous": {},
    "compile": {"compile": True},
    "fused": {"kernels": "fused"},
    "fused compile": {"kernels": "fused", "compile": True},
    "recompute": {"activation_checkpointing": True},
    "bfloat16": {"precision": "bfloat16"},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/bench_train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", nargs="+", choices=tuple(PRESETS), default=["tiny", "light", "base"])
    parser.add_argument("--stage", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--forms", nargs="+", choices=tuple(FORMS), default=list(FORMS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds: at least 1")

    def work() -> int:
        device, why = choose_device(args.device)
        print(f"{why}; torch {torch.__version__}; batch {args.batch}, crop {args.crop}, {args.precision}")
        rows: list[dict[str, Any]] = []
        record = {"device": why, "machine": cpu_name(), "torch": torch.__version__, "rows": rows}
        for preset, stage in itertools.product(args.preset, args.stage):
            with determinism(False):  # as a run trains by default
                rows += compare(preset, stage, args, device)
            print_rows(rows[-len(args.forms) :])
            if args.json is not None:  # after each one: a later one may not fit the memory
                with atomic_path(args.json) as temporary:
                    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return 0

    return run_command(work)


def compare(preset: str, stage: int, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The forms of one preset and stage: a row for each, a skipped one with its reason."""
    rows, steps = {}, {}
    for form in args.forms:
        rows[form] = {"preset": preset, "stage": stage, "form": form}
        if form.startswith("fused") and device.type != "cuda":
            rows[form]["skipped"] = "the fused kernels' speed is a GPU's; no CUDA device here"
            continue
        if form == "bfloat16" and device.type == "cuda":
            rows[form]["skipped"] = "the precision of the other forms on CUDA"
            continue
        try:
            step = training_step(preset, stage, form, args, device)
            step()  # compiles, allocates the optimiser's state
        except Exception as error:  # of a compiler, or out of memory: the other forms are still worth their time
            rows[form]["skipped"] = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            continue
        rows[form]["memory_mib"] = step_memory(step, device) / 2**20
        steps[form] = step
    times: dict[str, list[float]] = {form: [] for form in steps}
    for _ in tqdm(range(args.rounds), desc=f"{preset}, stage {stage}", disable=None):
        for form, step in steps.items():
            since = time.perf_counter()
            step()  # ends with the loss on the host, so the device has finished
            times[form].append(time.perf_counter() - since)
    medians = {form: statistics.median(values) for form, values in times.items()}
    for form, seconds in medians.items():
        rows[form].update(ms=1e3 * seconds, images_per_s=args.batch / seconds)
        if "channels_last" in medians:
            rows[form]["times_channels_last"] = medians["channels_last"] / seconds
    return list(rows.values())


def training_step(
    preset: str, stage: int, form: str, args: argparse.Namespace, device: torch.device
) -> Callable[[], None]:
    """One iteration of the training loop itself on a random batch. No semantic code: it is not trained, its pretrained
    weights may be a download, and it costs every form the same."""
    config = Config.of(
        preset=preset, semantic_code="none", batch_size=args.batch, crop=args.crop,
        **{"precision": args.precision, "kernels": "reference", "compile": False, **FORMS[form]},
    )  # fmt: skip
    torch.manual_seed(0)
    model = DTPM(config.model, stage)
    freeze(model, "adapters")
    trainer = Trainer(Run(model, config, "", None, [], Path("unused"), device, {}))  # type: ignore[arg-type]
    shape = (args.batch, 3, args.crop, args.crop)
    batch = [torch.rand(shape) * 2 - 1, torch.rand(shape) * 2 - 1, torch.randn(shape), torch.rand(args.batch)]
    batch = [x.to(device) for x in batch]
    trainer.parallelise(lambda: batch)
    if form == "contiguous":
        model.to(memory_format=torch.contiguous_format)
        trainer.layout = torch.contiguous_format
    return lambda: trainer.iterate([batch])[0].item()  # type: ignore[return-value]


def step_memory(step: Callable[[], None], device: torch.device) -> float:
    """Bytes at the peak of a step above those before it."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        name = f"{row['preset']:6} stage {row['stage']}  {row['form']:14}"
        if "skipped" in row:
            print(f"{name} skipped: {row['skipped']}")
            continue
        ratio = f"  {row['times_channels_last']:5.2f}x channels_last" if "times_channels_last" in row else ""
        print(f"{name} {row['ms']:9.1f} ms  {row['images_per_s']:8.2f} images/s  {row['memory_mib']:8.0f} MiB{ratio}")


if __name__ == "__main__":
    sys.exit(main())
