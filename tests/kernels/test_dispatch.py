"""The dispatch table: which entry serves, where another table comes from, what the tuner puts into one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtpm_fast.errors import UserError
from dtpm_fast.kernels.device import INTERPRETED
from dtpm_fast.kernels.dispatch import ANY, OPTIONS, TABLE, WIDE, Table, options_of, read_table, table, using_table
from dtpm_fast.kernels.dwconv_triton import launch
from dtpm_fast.kernels.timer import Timer

STRIP = {"GROUPS": 8, "COLUMNS": 4, "BLOCK_C": 32, "ROWS": 16, "num_warps": 4}


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


def recorded() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def test_a_file_named_by_the_environment_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, changed = tmp_path / "table.json", recorded()
    changed["kernels"]["ffn_backward"] = [{"channels": 64, "bits": 16, "options": None}]
    file.write_text(json.dumps(changed))
    monkeypatch.setenv("DTPM_FAST_DISPATCH", str(file))
    assert table() == changed["kernels"]
    assert options_of("ffn_backward", 64, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("kernel", "entries", "message"),
    [
        ("another", [], "there is no kernel another"),
        (
            "ffn_backward",
            [{"channels": 64, "bits": 8, "options": None}],
            "ffn_backward has an entry for 64 channels of 8",
        ),
        (
            "ffn_backward",
            [{"channels": 64, "bits": 16, "options": {"BLOCK_P": 16}}],
            "takes exactly BLOCK_P, num_stages",
        ),
        (
            "conv3_backward",
            [{"channels": 64, "bits": 16, "options": {"BLOCK_P": 48, "num_warps": 4, "num_stages": 1}}],
            "conv3_backward at 64 channels has BLOCK_P = 48",
        ),
        (
            "conv3_backward",
            [{"channels": 64, "bits": 16, "options": {"BLOCK_P": 16, "num_warps": 0, "num_stages": 1}}],
            "conv3_backward at 64 channels has num_warps = 0",
        ),
        ("ffn_backward", [{"channels": 0, "bits": 16, "options": None}], "ffn_backward has an entry for 0 channels"),
        (
            "gate_backward",
            [{"channels": ANY, "bits": 16, "options": STRIP | {"ROWS": 16.0}}],
            "gate_backward at 65536 channels has ROWS = 16.0",
        ),
        (
            "gate_backward",
            [{"channels": ANY, "bits": 16, "options": STRIP}],
            "gate_backward needs an entry of 32 bits for 65536 channels",
        ),
        ("gate_backward", [], "gate_backward needs an entry of 16 bits for 65536 channels"),
        (
            "gate_backward",
            [{"channels": ANY, "bits": 16, "options": None}],
            "gate_backward at 65536 channels takes exactly",
        ),
        ("gate_backward", [{"channels": ANY}], "is no dispatch table: 'bits'"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, kernel: str, entries: list[Any], message: str) -> None:
    file, changed = tmp_path / "table.json", recorded()
    changed["kernels"][kernel] = entries
    file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=rf"table\.json is no dispatch table.*{message}|table\.json {message}"):
        read_table(str(file))


def test_no_file_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json is no dispatch table"):
        read_table(str(tmp_path / "absent.json"))
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ValueError, match=r"text\.json is no dispatch table"):
        read_table(str(tmp_path / "text.json"))


@pytest.mark.parametrize("kernel", ["dwconv_gate_pool_forward", "gate_backward", "dwconv_backward"])
def test_kernels_without_another_form_are_always_listed(kernel: str) -> None:
    for channels in (1, 48, 512, 1024):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert options_of(kernel, channels, dtype)


@pytest.mark.skipif(INTERPRETED, reason="the tuner times compiled kernels")
def test_tuner_keeps_the_fastest_and_no_kernel_that_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    from dtpm_fast.kernels import tune as module

    jobs = module.jobs_of((32, 64), (16,))
    assert len(jobs) == len({*jobs}) == 3 + 2 * 5
    wide = [job.kernel in WIDE for job in module.jobs_of((512,), (16,)) if job.kernel not in module.ALWAYS]
    assert wide == [True] * len(WIDE) + [False] * 5
    fastest = next(o for o in module.candidates(module.Job("ffn_backward", 64, 16)) if o["num_stages"] == 2)
    monkeypatch.setattr(module, "_steps", lambda *_: dict.fromkeys(module.CANDIDATES))

    def time(kernel: str, options: dict[str, int] | None, step: Callable[[], Any]) -> float | None:
        if options is None:
            return 2.0 if kernel == "ffn_backward" else 0.5
        if options == module.CANDIDATES[kernel][0]:
            return None  # did not fit
        return 1.0 if options == fastest else 3.0

    monkeypatch.setattr(module, "_time", time)
    kept: list[Any] = []
    found = module.tune(jobs, table(), module.candidates, lambda so_far, job: kept.append((so_far, job)))
    assert [job for _, job in kept] == jobs
    assert kept[-1][0] == found
    assert options_in(found, "ffn_backward", 64) == fastest
    assert options_in(found, "conv3_backward", 32) is options_in(found, "conv3_backward", 64) is None
    assert options_in(found, "conv3_backward", 128) == options_in(table(), "conv3_backward", 128)  # was not measured
    for kernel in module.ALWAYS:
        assert [(entry["channels"], entry["bits"]) for entry in found[kernel]] == [(ANY, 16), (ANY, 32)]
        assert options_in(found, kernel, ANY) in module.CANDIDATES[kernel][1:]


@pytest.mark.skipif(INTERPRETED, reason="the tuner times compiled kernels")
def test_tuner_leaves_out_what_a_process_died_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compiler would end this process too, and that of every run that resumes."""
    from dtpm_fast.kernels import tune as module

    strips, products = module.Job("gate_backward", 64, 16), module.Job("ffn_backward", 64, 16)
    finished = {strips: 0, products: 2}
    ahead = SimpleNamespace(died=lambda job: True, steps=finished.__getitem__)
    measured: list[Any] = []
    monkeypatch.setattr(module, "_steps", lambda *_: dict.fromkeys(module.CANDIDATES))
    monkeypatch.setattr(module, "_time", lambda _, options, step: measured.append(options) or 1.0)
    kept: list[Any] = []
    found = module.tune(
        [strips, products],
        table(),
        lambda job: module._compiled(ahead, job),
        lambda so_far, job: kept.append(job),
    )
    assert kept == [strips, products]  # a resumed run gets past both
    assert found["gate_backward"] == table()["gate_backward"]
    tried = module.candidates(products)
    assert measured == [*tried[:2], None]
    assert f"{len(tried) - 2} of {len(tried)} tiles are left out" in capsys.readouterr().out


def options_in(kernels: Table, kernel: str, channels: int) -> dict[str, int] | None:
    return next(e["options"] for e in kernels[kernel] if (e["channels"], e["bits"]) == (channels, 16))


@pytest.mark.skipif(INTERPRETED, reason="the tuner times compiled kernels")
def test_tuner_passes_over_tiles_that_do_not_fit_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from dtpm_fast.kernels import tune as module

    monkeypatch.setattr(module, "_timer", lambda: Timer("cpu"))

    def fails(error: Exception) -> Callable[[], float]:
        def step() -> float:
            raise error

        return step

    too_large = module.triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
    for error in (too_large, RuntimeError("PassManager::run failed")):
        assert module._time("ffn_backward", None, fails(error)) is None
    ran: list[int] = []
    milliseconds = module._time("ffn_backward", None, lambda: ran.append(1))
    assert milliseconds is not None and 0 <= milliseconds < 1000
    assert len(ran) == 1 + module.ROUNDS
    with pytest.raises(RuntimeError, match="illegal memory access"):
        module._time("ffn_backward", None, fails(RuntimeError("CUDA error: an illegal memory access")))


@pytest.mark.skipif(INTERPRETED, reason="the tuner times compiled kernels")
def test_tuner_writes_a_table_that_a_second_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtpm_fast.kernels import tune as module

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    file, jobs = tmp_path / "table.json", module.jobs_of((64,), (16,))
    module._write(file, table(), jobs[:2])
    assert read_table(str(file)) == table()
    assert module._start(file, resume=True) == (table(), jobs[:2])
    assert module._start(file, resume=False) == (table(), [])
    file.write_text("{}")
    read_table.cache_clear()
    with pytest.raises(UserError, match="is no dispatch table"):
        module._start(file, resume=True)


@pytest.mark.skipif(INTERPRETED, reason="the tuner times compiled kernels")
@pytest.mark.parametrize("kernel", OPTIONS)
def test_tuner_tries_what_the_table_may_hold(kernel: str) -> None:
    from dtpm_fast.kernels import tune as module

    tried = module.candidates(module.Job(kernel, 64, 16))
    assert 4 <= len(tried) <= 48
    assert all(options.keys() == OPTIONS[kernel] for options in tried)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="only without a GPU")
def test_tuning_without_a_gpu_is_an_error_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dtpm_fast.kernels.tune", "--output", str(tmp_path / "table.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: tuning measures on a CUDA device")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize(
    ("shape", "rows", "strips"),
    [((1, 1024, 32, 32), 2, 16), ((1, 256, 64, 64), 2, 64), ((8, 128, 256, 256), 16, 128), ((1, 32, 1, 9), 2, 1)],
)
def test_strips_are_short_where_a_map_is_small(shape: tuple[int, int, int, int], rows: int, strips: int) -> None:
    h = torch.empty(shape, device="meta")
    grid, used = launch(h, shape[1] // 2, STRIP)
    assert used == STRIP | {"ROWS": rows}
    assert grid == (strips, shape[0], -(-shape[1] // 64))
