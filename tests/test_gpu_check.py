"""`scripts/gpu_check.py`: the states of its rows, and its judges on records as the benchmarks write them."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run rows of (number, seconds, command, judge) in place of the list's; the exit code and what was written."""
    monkeypatch.setattr(script, "_about", lambda: {"device": "none"})
    monkeypatch.setattr(script, "PAIRS", 'mkdir "$OUT/pairs"')

    def call(rows: list[tuple[Any, ...]], *arguments: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(script, "ROWS", [script.Row(*row) for row in rows])
        code = script.main(["-o", str(tmp_path / "a folder"), *arguments])
        file = tmp_path / "a folder" / "check.json"
        return code, json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else {}

    return call


def test_states_and_what_a_second_run_repeats(script: ModuleType, run: Run, tmp_path: Path) -> None:
    rows = [
        ("a", 60, 'echo ran >> "$OUT/a"; echo 3 passed', script.last_line),
        ("b", 60, "echo broken; exit 3", script.last_line),
        ("c", 60, "echo 'out of time after 2 entries; --resume measures the rest'", script.last_line),
        ("d", 60, "echo ERROR SUMMARY: 1 errors", script.says("0 errors")),
        ("e", 60, "true", script.smoothing),
    ]
    code, found = run(rows)
    assert code == 1
    states = {"a": "passed", "b": "failed", "c": "unfinished", "d": "failed", "e": "failed"}
    assert {number: row["state"] for number, row in found.items()} == states
    assert found["a"]["figures"] == [{"text": "3 passed", "holds": None}]
    assert found["b"]["exit_code"] == 3 and found["b"]["figures"][-1]["text"] == "broken"
    assert "rtv.json" in found["e"]["figures"][0]["text"]
    log = (tmp_path / "a folder" / "log.txt").read_text(encoding="utf-8")
    assert "row b: echo broken" in log and "exit code 3" in log

    rows[2] = ("c", 60, "echo done", script.last_line)
    assert run(rows)[1]["c"]["state"] == "passed"
    assert (tmp_path / "a folder" / "a").read_text() == "ran\n"  # not again
    assert run(rows, "--rows", "a")[0] == 0
    assert (tmp_path / "a folder" / "a").read_text() == "ran\nran\n"


def test_a_row_that_takes_too_long_ends_with_all_its_processes(script: ModuleType, run: Run, tmp_path: Path) -> None:
    row = ("a", 1, 'sh -c "sleep 2; touch \\"$OUT/late\\"" & sleep 30', script.last_line)
    code, found = run([row])
    assert code == 1 and found["a"]["state"] == "failed" and found["a"]["exit_code"] is None
    time.sleep(1.5)
    assert not (tmp_path / "a folder" / "late").exists()


def test_what_the_minutes_cut_off_is_left_for_the_next_run(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("a", 60, "sleep 30", script.last_line), ("b", 60, "echo done", script.last_line)]
    monkeypatch.setattr(script, "SHORTEST", 0.5)
    code, found = run(rows, "--minutes", "0.03")
    assert code == 0 and found["a"]["state"] == "unfinished" and "b" not in found
    assert "unfinished: a\nnot run: b" in capsys.readouterr().out
    code, found = run(rows, "--minutes", "0.03")  # b, which has had no turn yet, and then the long one again
    assert found["a"]["state"] == "unfinished" and found["b"]["state"] == "passed"


def test_a_row_that_can_go_on_is_not_failed_by_its_time(script: ModuleType, run: Run) -> None:
    command = 'echo \'{"cuda": {"512x512 batch 256": {"images_per_s": 400}}}\' > "$OUT/rtv.json"; sleep 30 # --resume'
    _, found = run([("a", 1, command, script.smoothing)])
    assert found["a"]["state"] == "unfinished" and found["a"]["figures"][0]["holds"] is True


COMMAND = [sys.executable, str(ROOT / "scripts" / "gpu_check.py")]


def test_the_list_is_shown_and_an_unknown_row_refused(script: ModuleType) -> None:
    listed = subprocess.run([*COMMAND, "--list"], capture_output=True, text=True, check=True).stdout
    assert listed.count("\n") == len(script.ROWS)
    assert subprocess.run([*COMMAND, "--rows", "none"], capture_output=True).returncode == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, and the rows would run")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "-o", str(tmp_path / "x")], capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA device here" in done.stderr and not (tmp_path / "x").exists()


def test_the_rows_are_the_lists_and_name_files_that_exist(script: ModuleType) -> None:
    text = (ROOT / "docs" / "gpu-checklist.md").read_text(encoding="utf-8")
    scripted = re.findall(r"^\| (\w+) \| script: ", text, re.MULTILINE)
    assert sorted(scripted) == sorted(row.number for row in script.ROWS)
    for row in script.ROWS:
        for path in re.findall(r"(?:tests|benchmarks|docs)/[\w/.]+", row.command):
            assert (ROOT / path).exists(), f"row {row.number}: {path}"


def write(folder: Path, name: str, record: Any) -> None:
    (folder / name).write_text(json.dumps(record), encoding="utf-8")


def recorded(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def test_the_kernels_judge_reads_what_the_benchmark_writes(script: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/bench_kernels.py", "--device", "cpu", "--operations", "block"]
    command += ["--channels", "64", "--dtypes", "bfloat16", "--forms", "fused", "eager", "--batch", "1", "--size", "8"]
    command += ["--rounds", "2", "--json", str(tmp_path / "kernels.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    record = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    forms = next(row["forms"] for row in record["rows"] if row["direction"] == "inference")
    forms["fused"]["ms_20_50_80"] = [1, 2, 3]
    forms["eager"]["ms_20_50_80"] = [5, 5.9, 7]
    forms["compile"] = {"error": "any"}
    forms["compile max-autotune"] = {"ms_20_50_80": [3, 4, 5]}
    write(tmp_path, "kernels.json", record)
    eager, compiled = script.kernels(tmp_path, "")
    assert "2.95 times" in eager.text and eager.holds is False
    assert "2.00 times" in compiled.text and compiled.holds is True


def test_the_restoring_judge(script: ModuleType, tmp_path: Path) -> None:
    example = recorded("restore-epyc-2-cores.json")["results"][0]
    seconds = {"graph": 1, "eager": 7, "reduce-overhead": 1.5}
    rows = [example | {"row": f"{name} bfloat16", "median_s": value} for name, value in seconds.items()]
    write(tmp_path, "restore.json", {"results": rows})
    judge = script.restoring("restore.json", eager=7, reduce_overhead=1.6, compiled=2)
    assert [figure.holds for figure in judge(tmp_path, "")] == [True, False, False]
    assert {"row", "median_s"} <= example.keys()


def test_rows_of_tests_hold_where_most_have_run(script: ModuleType, tmp_path: Path) -> None:
    lines = {"3 passed in 1s": True, "2 passed, 1 skipped in 1s": True, "20 skipped in 1s": False, "": False}
    lines["1 passed, 24 skipped in 1s"] = False
    assert {line: script.tests(tmp_path, f"...\n{line}\n")[0].holds for line in lines} == lines


def test_the_training_judge(script: ModuleType, tmp_path: Path) -> None:
    example = recorded("train-light-epyc-avx512.json")["rows"][0]
    forms = {"channels_last": (30, 100), "compile": (20, 90), "fused": (10, 39)}
    rows = [
        example | {"preset": "base", "stage": stage, "form": form, "ms": ms, "memory_mib": memory}
        for stage in (1, 2)
        for form, (ms, memory) in forms.items()
    ]
    rows[-1] = {"preset": "base", "stage": 2, "form": "fused", "skipped": "out of memory"}
    write(tmp_path, "train.json", {"rows": rows})
    assert [figure.holds for figure in script.training(tmp_path, "")] == [True] * 3 + [False] * 3
    assert {"preset", "stage", "form", "ms", "memory_mib"} <= example.keys()


def test_the_judge_of_exports(script: ModuleType, tmp_path: Path) -> None:
    record = recorded("export-light-2-cores.json")
    record["rows"]["onnx"] = {"error": "no CUDA provider"}
    write(tmp_path, "export.json", record)
    assert {figure.holds for figure in script.exporting(tmp_path, "")} == {True, None}
    record["rows"]["aoti"] = {"error": "any"}
    write(tmp_path, "export.json", record)
    assert False in {figure.holds for figure in script.exporting(tmp_path, "")}


def test_the_smoothing_judge_and_that_of_the_figures(script: ModuleType, tmp_path: Path) -> None:
    for rate, holds in ((299, False), (301, True)):
        write(tmp_path, "rtv.json", {"cuda": {"512x512 batch 256": {"images_per_s": rate}}})
        assert script.smoothing(tmp_path, "")[0].holds is holds
    record = recorded("light-derain-synthetic.json")
    for change, holds in ((0.0, True), (0.03, False)):
        record["mean"]["4 steps"]["psnr_y"] += change
        write(tmp_path, "evaluate.json", record)
        assert script.as_on_the_cpu(tmp_path, "")[0].holds is holds


def test_the_traffic_judge_reads_what_the_kernels_write(script: ModuleType, tmp_path: Path) -> None:
    from dtpm_fast.kernels.traffic import STEPS, markdown

    unit = 32 * 64 * 256**2 * 2
    measured = {(step, name): sum(maps) * unit for step, kernels in STEPS.items() for name, maps in kernels.items()}
    measured["inference", "attention_ffn_forward"] *= 1.09
    measured["training", "attention_ffn_forward"] *= 0.75  # as if y had not been written
    del measured["backward", "gate_backward"]
    table = markdown(64, 256, 32, measured)
    (tmp_path / "kernels.md").write_text(f"<!-- traffic: begin -->\n{table}\n<!-- traffic: end -->\n", encoding="utf-8")
    figures = script.traffic(tmp_path, "")
    assert len(figures) == sum(map(len, STEPS.values()))
    assert [figure.text.split(":")[0] for figure in figures if not figure.holds] == [
        "training, attention_ffn_forward",
        "backward, gate_backward",
    ]
    (tmp_path / "kernels.md").write_text("<!-- traffic: begin --><!-- traffic: end -->", encoding="utf-8")
    assert [figure.holds for figure in script.traffic(tmp_path, "")] == [False]
