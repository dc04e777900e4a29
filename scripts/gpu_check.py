"""The rows of docs/gpu-checklist.md that need nothing beside this repository, in one command that can be stopped.

    python scripts/gpu_check.py -o runs/gpu --minutes 9     # again with the same folder, until nothing is left
    python scripts/gpu_check.py -o runs/gpu --rows 9 13     # these again, whatever they gave before
    python scripts/gpu_check.py --list                      # what each row runs

Most wanted rows come first. A row that the time cuts off comes again in the next run, after those that have had no turn
yet. The folder gets the records, which
belong in benchmarks/results/, `log.txt` with the end of what each row printed, and `check.json`, rewritten after every
row: whether it passed, what was measured, and the bound where the list has one.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from dtpm_fast.atomic import atomic_path
from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run as run_command
from dtpm_fast.given_path import given_path

ROOT = Path(__file__).resolve().parents[1]
KEPT = 6000  # characters of a row's output, its end
SHORTEST = 30  # seconds: with less left, no row is started


class Figure(NamedTuple):
    """What a row showed; whether it holds the list's bound, None where the list only asks to record it."""

    text: str
    holds: bool | None = None


Judge = Callable[[Path, str], list[Figure]]  # of the folder and what the row printed


class Row(NamedTuple):
    """A row of the list. `command` runs in bash, in the repository's root, `seconds` at most; $OUT is the folder."""

    number: str
    seconds: int
    command: str
    judge: Judge


# ------------------------------------------------------------------------------------------------------------- judges


def last_line(_: Path, log: str) -> list[Figure]:
    return [Figure(line) for line in log.strip().splitlines()[-1:]]


def tests(_: Path, log: str) -> list[Figure]:
    """pytest's last line: most of them have run."""
    line = next(iter(log.strip().splitlines()[-1:]), "")
    passed, skipped = (int((re.search(rf"(\d+) {what}", line) or [0, 0])[1]) for what in ("passed", "skipped"))
    return [Figure(line or "nothing printed", passed > skipped)]


def says(*patterns: str) -> Judge:
    """The lines that match each pattern, one at least."""

    def judge(_: Path, log: str) -> list[Figure]:
        found = []
        for pattern in patterns:
            matching = [line.strip() for line in log.splitlines() if re.search(pattern, line)]
            found += [Figure(line) for line in matching] or [Figure(f"nothing printed matches {pattern!r}", False)]
        return found

    return judge


def at_least(name: str, slow: float | None, fast: float | None, bound: float) -> Figure:
    """How many times as long `slow` takes as `fast`."""
    if not slow or not fast:
        return Figure(f"{name}: not measured", False)
    return Figure(f"{name}: {slow / fast:.2f} times, wanted {bound:g}", slow / fast >= bound)


def kernels(folder: Path, _: str) -> list[Figure]:
    rows = _read(folder / "kernels.json")["rows"]
    block = [r["forms"] for r in rows if (r["operation"], r["direction"], r["channels"], r["dtype"]) == BLOCK]
    forms = [(name, form["ms_20_50_80"][1]) for name, form in block[0].items() if "error" not in form]

    def ms(kind: str) -> float | None:
        """Of the fastest form of a kind."""
        return min((median for name, median in forms if name.startswith(kind)), default=None)

    return [
        at_least("the block over eager", ms("eager"), ms("fused"), 3),
        at_least("the block over torch.compile", ms("compile"), ms("fused"), 2),
    ]


BLOCK = "block", "inference", 64, "bfloat16"


def restoring(record: str, **bounds: float) -> Judge:
    """How many times as fast as these rows `graph` is."""

    def judge(folder: Path, _: str) -> list[Figure]:
        seconds = {row["row"]: row["median_s"] for row in _read(folder / record)["results"]}
        graph = seconds.get("graph bfloat16")
        slow = {row: seconds.get(f"{row.replace('_', '-')} bfloat16") for row in bounds}
        return [at_least(f"graph over {row}", slow[row], graph, bound) for row, bound in bounds.items()]

    return judge


def smoothing(folder: Path, _: str) -> list[Figure]:
    rows = _read(folder / "rtv.json").get("cuda", {})
    rate = rows.get("512x512 batch 256", {}).get("images_per_s", 0.0)
    return [Figure(f"{rate:.0f} images/s at 512x512 and batch 256, wanted 300", rate >= 300)]


def training(folder: Path, _: str) -> list[Figure]:
    found = []
    for stage in (1, 2):
        rows = [row for row in _read(folder / "train.json")["rows"] if (row["preset"], row["stage"]) == ("base", stage)]
        eager, compiled, fused = (
            next((row for row in rows if row["form"] == form and "ms" in row), {})
            for form in ("channels_last", "compile", "fused")
        )
        found.append(at_least(f"base, stage {stage}, fused over eager", eager.get("ms"), fused.get("ms"), 2.2))
        found.append(at_least(f"base, stage {stage}, fused over compile", compiled.get("ms"), fused.get("ms"), 1.5))
        saved = eager.get("memory_mib"), fused.get("memory_mib")
        found.append(at_least(f"base, stage {stage}, eager's activations over fused", *saved, 2.5))
    return found


def exporting(folder: Path, _: str) -> list[Figure]:
    """ONNX Runtime is the CPU's where its GPU build is not installed, which is no failure of ours."""
    rows = _read(folder / "export.json")["rows"]
    told = {kind: row.get("error") or f"{1e3 * row['latency_s']:.1f} ms" for kind, row in rows.items()}
    return [
        Figure(f"{kind}: {what}", None if kind == "onnx" else "error" not in rows[kind]) for kind, what in told.items()
    ]


def traffic(folder: Path, _: str) -> list[Figure]:
    """Every row of the table: step, kernel, reads, writes, MB predicted, MB measured. Within a tenth."""
    text = (folder / "kernels.md").read_text(encoding="utf-8")
    text = text.split("<!-- traffic: begin -->")[1].split("<!-- traffic: end -->")[0]
    rows = re.findall(r"^\| (\w+) \| (\w+) \| \S+ \| \S+ \| (\d+) \| (\d+|not run) \|$", text, re.MULTILINE)
    return [
        Figure(
            f"{step}, {kernel}: {measured} MB, predicted {predicted}",
            measured.isdigit() and abs(int(measured) - int(predicted)) <= 0.1 * int(predicted),
        )
        for step, kernel, predicted, measured in rows
    ] or [Figure("kernels.md holds no row of the traffic's table", False)]


def as_on_the_cpu(folder: Path, _: str) -> list[Figure]:
    """Within 0.02 dB of the record that the model card prints."""
    ours, theirs = (
        _read(path)["mean"]["4 steps"]["psnr_y"]
        for path in (folder / "evaluate.json", ROOT / "benchmarks/results/light-derain-synthetic.json")
    )
    return [Figure(f"derain {ours:.3f} dB, on the CPU {theirs:.3f}", abs(ours - theirs) <= 0.02)]


# --------------------------------------------------------------------------------------------------------------- rows

# fmt: off
SANITIZE = "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool"
BENCH = "python benchmarks/bench_restore.py"
PAIRS = 'python -m dtpm_fast.data make --task derain --strength 0.7 1.3 --seed 1234 -o "$OUT/pairs"'
CLEAN = "ERROR SUMMARY: 0 errors"


def train(run: str, options: str) -> str:
    data = '--data "$OUT/pairs/target"'
    return f'rm -rf "$OUT/{run}" && python -m dtpm_fast.train {data} --output "$OUT/{run}" {options}'


def restore(size: str, options: str = "--steps 4", name: str = "") -> str:
    return f'{BENCH} run --device cuda --preset base {options} --size {size} -o "$OUT/restore-{size}{name}.json"'


ROWS = [
    Row("1", 420, "python -m pytest tests/kernels -q -n 8 -W default --durations=10", tests),
    Row("8", 600,
        'python -m dtpm_fast.kernels.tune --output "$OUT/dispatch.json" --minutes 4 --resume && '
        'DTPM_FAST_DISPATCH="$OUT/dispatch.json" '
        "python -m pytest tests/kernels -q -n 8 -W default -k 'triton and not interpreter'", tests),
    Row("9", 480,
        '[ ! -f "$OUT/dispatch.json" ] || export DTPM_FAST_DISPATCH="$OUT/dispatch.json"; '
        'python benchmarks/bench_kernels.py --json "$OUT/kernels.json" --minutes 7 --resume', kernels),
    Row("4", 300, "python -m pytest tests -q -m gpu -W default --ignore tests/kernels", tests),
    Row("13", 420, restore("256x256"), restoring("restore-256x256.json", eager=7, reduce_overhead=1.6)),
    Row("2", 200, "python -m pytest tests/test_smoothing_cuda.py -q", tests),
    Row("12", 200, 'python benchmarks/bench_rtv.py --quick --pictures astronaut --json "$OUT/rtv.json"', smoothing),
    Row("13c", 480, restore("1080x1920"), restoring("restore-1080x1920.json", compiled=2)),
    Row("16", 500,
        'python benchmarks/bench_train.py --preset base --batch 32 --crop 256 --json "$OUT/train.json"', training),
    Row("11", 200,
        "ncu --clock-control none --csv --print-units base --metrics dram__bytes_read.sum,dram__bytes_write.sum "
        "-k 'regex:adaln_conv1x1|dwconv|attention_ffn|ffn_b|conv3_b|gate_b' "
        'python -m dtpm_fast.kernels.traffic --launch --batch 32 > "$OUT/ncu.csv" && cp docs/kernels.md "$OUT" && '
        'python -m dtpm_fast.kernels.traffic --measured "$OUT/ncu.csv" --batch 32 --write "$OUT/kernels.md"',
        traffic),
    Row("1b", 240,
        f"{SANITIZE} memcheck python -m pytest tests/kernels -q -W default "
        "-k 'bfloat16 and (table_in_use or by_the_rule and (fused or wide))'", says(CLEAN)),
    Row("3", 300,
        f"for tool in memcheck racecheck; do {SANITIZE} $tool --error-exitcode 1 python -m pytest "
        "tests/test_smoothing_cuda.py -q -k 'agrees and not shape2 and not shape3' || exit; done", says(CLEAN)),
    Row("5", 200,
        'dtpm-evaluate --task derain --data "$OUT/pairs" --steps 4 --protocol native --precision float32 --lpips off '
        '--fid off --device cuda --json "$OUT/evaluate.json"', as_on_the_cpu),
    Row("6", 200,
        train("prior", "--stage 1 --set preset=light crop=128 steps=200 kernels=reference compile=false"),
        says("200/200: loss")),
    Row("7", 300, train("prior-fused", "--stage 1 --set preset=light crop=128 steps=200"),
        says("fused: they agree", "on: the compiled loss agrees", "200/200: loss")),
    Row("7b", 300, train("derain", "--stage 2 --task derain --prior light --set crop=128 steps=100"),
        says("fused: they agree", "on: the compiled loss agrees", "100/100: loss")),
    Row("13b", 420, restore("256x256", "--batch 8", "-batch-8"), restoring("restore-256x256-batch-8.json", eager=1)),
    Row("13d", 420, restore("512x512"), restoring("restore-512x512.json", eager=1)),
    Row("13e", 420, restore("720x1280"), restoring("restore-720x1280.json", eager=1)),
    Row("13f", 420, restore("256x256", "--steps 10", "-10-steps"), restoring("restore-256x256-10-steps.json", eager=1)),
    Row("16b", 400,
        'python benchmarks/bench_train.py --preset light --batch 32 --crop 256 --json "$OUT/train-light.json"',
        says(r"light +stage 2 +fused compile +[\d.]+ ms")),
    Row("14", 200,
        f"for tile in auto 512; do {BENCH} memory --device cuda --preset base --size 2160x3840 --tile $tile "
        "|| exit; done", says("GiB above the model")),
    Row("15", 200, f"{BENCH} cold --device cuda --backend graph", says("to the first picture")),
    Row("20", 400,
        'rm -rf "$OUT/aoti" && dtpm-export --task derain --format aoti --device cuda --precision fp16 --verify '
        '-o "$OUT/aoti"', says("dB")),
    Row("22", 400,
        'python benchmarks/bench_export.py --device cuda --formats onnx aoti --json "$OUT/export.json"', exporting),
]
# fmt: on


# ---------------------------------------------------------------------------------------------------------------- run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when every row that ran has passed, 1 otherwise, 2 on bad usage."""
    parser = argparse.ArgumentParser(
        prog="python scripts/gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=given_path, metavar="DIR", help="the folder of records")
    parser.add_argument("--minutes", type=float, default=60.0, help="end after this long (default: 60)")
    parser.add_argument("--rows", nargs="+", metavar="N", help="these alone, also if they passed before")
    parser.add_argument("--list", action="store_true", help="print the rows and their commands, and run nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.rows or ()) - {row.number for row in ROWS}:
        parser.error(f"--rows {' '.join(sorted(unknown))}: no such row here, see --list")
    if options.list:
        for row in ROWS:
            print(f"{row.number}\t{row.command}")
        return 0
    if options.output is None:
        parser.error("-o: needs a folder for the records")
    return run_command(lambda: _work(options))


def _work(options: argparse.Namespace) -> int:
    about = _about()
    folder: Path = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    file = folder / "check.json"
    done: dict[str, dict[str, Any]] = _read(file)["rows"] if file.exists() else {}
    if not (folder / "pairs").exists():
        ended, log, _ = _execute(PAIRS, folder, 60 * options.minutes)
        if ended != 0:
            raise UserError(f"the pictures to work on could not be made: {log.strip()[-300:]}")
    rows = [row for row in ROWS if not options.rows or row.number in options.rows]
    for row in sorted(rows, key=lambda row: row.number in done):  # else a long row would be all that ever runs
        if not options.rows and done.get(row.number, {}).get("state") in ("passed", "failed"):
            continue
        left = until - time.monotonic()
        if left < SHORTEST:
            break
        print(f"row {row.number}: {row.command}", flush=True)
        done[row.number] = _run(row, folder, min(left, row.seconds), row.seconds)
        _tell(row.number, done[row.number])
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps({**about, "rows": done}, indent=1) + "\n", encoding="utf-8")
    return _summary(rows, done)


def _run(row: Row, folder: Path, seconds: float, allowed: float) -> dict[str, Any]:
    """Run it, keep the end of what it printed, judge."""
    code, log, spent = _execute(row.command, folder, seconds)
    with (folder / "log.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n===== row {row.number}: {row.command}\n{log[-KEPT:]}\n===== exit code {code}, {spent:.0f} s\n")
    figures: list[Figure] = []
    if not code:  # of a row that was stopped, what its record has until then
        try:
            figures = row.judge(folder, log)
        except (OSError, ValueError, LookupError) as error:
            figures = [Figure(f"its record cannot be judged: {type(error).__name__}: {error}", False)]
    resumes = "--resume" in row.command
    if (code is None and (resumes or seconds < allowed)) or (code == 0 and "--resume measures" in log):
        state = "unfinished"  # this run's time was over, or its own
    else:
        state = "passed" if code == 0 and all(figure.holds is not False for figure in figures) else "failed"
    if code is None:
        figures.append(Figure(f"stopped after {spent:.0f} s", False))
    elif code:
        figures += [Figure(line.strip()) for line in log.strip().splitlines()[-3:]]
    return {"state": state, "exit_code": code, "seconds": round(spent), "figures": [f._asdict() for f in figures]}


def _execute(command: str, folder: Path, seconds: float) -> tuple[int | None, str, float]:
    """Exit code (None: the time was over), output and seconds of a command, whose processes all end with it."""
    since = time.monotonic()
    with (folder / "running.txt").open("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=ROOT, env=os.environ | {"OUT": str(folder), "PYTHONUNBUFFERED": "1"},
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # by Ctrl-C as well
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        log = output.read()
    (folder / "running.txt").unlink()
    return code, log, time.monotonic() - since


def _tell(number: str, row: dict[str, Any]) -> None:
    print(f"row {number}: {row['state']}, {row['seconds']} s")
    for figure in row["figures"]:
        mark = {True: "yes", False: "NO ", None: "   "}[figure["holds"]]
        print(f"  {mark} {figure['text']}", flush=True)


def _summary(rows: Sequence[Row], done: dict[str, dict[str, Any]]) -> int:
    """The last lines say it all."""
    states: dict[str, list[str]] = {"passed": [], "failed": [], "unfinished": [], "not run": []}
    for row in rows:
        states[done.get(row.number, {}).get("state", "not run")].append(row.number)
    for state, numbers in states.items():
        if numbers:
            print(f"{state}: {', '.join(numbers)}")
    return 1 if states["failed"] else 0


def _about() -> dict[str, Any]:
    """The device and the versions; raises `UserError` where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("these rows wait for a GPU, and PyTorch sees no CUDA device here")
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    return {"date": date.today().isoformat(), "device": torch.cuda.get_device_name(), "versions": versions}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
