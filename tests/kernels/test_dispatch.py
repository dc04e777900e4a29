"""The dispatch table: which entry serves, where another table comes from, what the tuner puts into one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtpm_fast.kernels.device import INTERPRETED
from dtpm_fast.kernels.dispatch import options_of, table, using_table


def test_the_smallest_entry_that_holds_the_channels_serves() -> None:
    small, large = {"BLOCK_P": 16}, {"BLOCK_P": 64}
    entries = [
        {"channels": 128, "bits": 16, "options": large},
        {"channels": 32, "bits": 16, "options": small},
        {"channels": 64, "bits": 16, "options": None},
    ]
    with using_table({"kernel": entries}):
        assert options_of("kernel", 16, torch.bfloat16) == options_of("kernel", 32, torch.float16) == small
        assert options_of("kernel", 48, torch.bfloat16) is None
        assert options_of("kernel", 65, torch.bfloat16) == large
        assert options_of("kernel", 129, torch.bfloat16) is None
        assert options_of("kernel", 32, torch.float32) is None
        assert options_of("another", 32, torch.float16) is None
    assert "kernel" not in table()


def test_a_file_named_by_the_environment_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"measured_on": None, "kernels": {"kernel": []}}))
    monkeypatch.setenv("DTPM_FAST_DISPATCH", str(file))
    assert table() == {"kernel": []}


@pytest.mark.parametrize("kernel", ["dwconv_gate_pool_forward", "gate_backward", "dwconv_backward"])
def test_kernels_without_another_form_are_always_listed(kernel: str) -> None:
    for channels in (1, 48, 512, 1024):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert options_of(kernel, channels, dtype)


@pytest.mark.skipif(INTERPRETED, reason="the tuner times compiled kernels")
def test_tuner_keeps_the_fastest_and_no_kernel_that_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    from dtpm_fast.kernels import tune as module

    fastest = module.CANDIDATES["ffn_backward"][5]
    monkeypatch.setattr(module, "_steps", lambda *_: dict.fromkeys(module.CANDIDATES))

    def time(kernel: str, options: dict[str, int] | None, step: Callable[[], Any]) -> float | None:
        if options is None:
            return 2.0 if kernel == "ffn_backward" else 0.5
        if options == module.CANDIDATES[kernel][0]:
            return None  # did not fit
        return 1.0 if options == fastest else 3.0

    monkeypatch.setattr(module, "_time", time)
    found = module.tune((32, 64), (16,))
    assert [entry["options"] for entry in found["ffn_backward"]] == [fastest, fastest]
    assert [entry["options"] for entry in found["conv3_backward"]] == [None, None]
    assert [entry["channels"] for entry in found["dwconv_backward"]] == [module.ANY]
    assert found["dwconv_backward"][0]["options"] in module.CANDIDATES["dwconv_backward"][1:]


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="only without a GPU")
def test_tuning_without_a_gpu_is_an_error_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dtpm_fast.kernels.tune", "--output", str(tmp_path / "table.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: tuning measures on a CUDA device")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "table.json").exists()
