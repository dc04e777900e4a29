"""The kernels' benchmark, rehearsed on the CPU: what it writes, leaves out, resumes, and records of a failed form."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "bench_kernels.py"
FORMS = ["fused", "eager", "eager channels_last"]


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_kernels", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(file: Path, *more: str) -> list[str]:
    small = [
        "--device",
        "cpu",
        "--channels",
        "16",
        "--dtypes",
        "float32",
        "--batch",
        "1",
        "--size",
        "1",
        "--rounds",
        "2",
    ]
    return [*small, "--operations", "simple_gate", "adaln", "--forms", *FORMS, "--json", str(file), *more]


def test_every_row_is_kept_and_the_rest_resumed(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    assert bench.main(arguments(file, "--minutes", "0")) == 0
    assert json.loads(file.read_text())["left_out"][0] == "simple_gate both C=16 float32"
    whole = bench.step_of

    def failing(operation: str, form: str, *rest: Any) -> Callable[[], Any]:
        if (operation, form) == ("adaln", "eager"):
            raise torch.OutOfMemoryError("no\nmemory")
        return whole(operation, form, *rest)

    monkeypatch.setattr(bench, "step_of", failing)
    assert bench.main(arguments(file, "--resume", "--minutes", "600")) == 0
    found = json.loads(file.read_text())
    assert found["left_out"] == [] and len(found["rows"]) == 6
    for row in found["rows"]:
        assert row["shape"] == [1, 16, 4, 4] and row["share_of_copy_bandwidth"] > 0
        failed = row["operation"] == "adaln"
        assert ("error" in row["forms"]["eager"]) == failed
        low, median, high = row["forms"]["eager channels_last"]["ms_20_50_80"]
        assert 0 < low <= median <= high
    assert found["rows"][-1]["forms"]["eager"]["error"] == "OutOfMemoryError: no memory"

    measured: list[str] = []
    monkeypatch.setattr(
        bench, "step_of", lambda operation, *rest: measured.append(operation) or whole(operation, *rest)
    )
    assert bench.main(arguments(file, "--resume", "--minutes", "600")) == 0
    assert {*measured} == {"adaln"}  # what failed is measured again
    assert not any("error" in form for row in json.loads(file.read_text())["rows"] for form in row["forms"].values())


def test_the_prediction_leaves_out_what_frozen_weights_do(bench: ModuleType) -> None:
    """By count; up to 128 channels the same kernels run, without their sums."""
    counts = [[bench._moved(name, "backward", c) for c in (64, 256)] for name in ("block", "frozen_block")]
    assert counts == [[23, 65], [23, 40]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_without_a_gpu_it_says_so(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 1
    assert capsys.readouterr().err.startswith("error: no CUDA device: the kernels' speed is a GPU's")
