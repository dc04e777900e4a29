"""An exported folder where weights are expected: `Restorer.from_pretrained` and `dtpm-restore`."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtpm_fast import Restorer
from dtpm_fast.commands import evaluate
from dtpm_fast.commands.restore import main
from dtpm_fast.errors import UserError
from dtpm_fast.export import ort
from dtpm_fast.weights_file import Weights


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_folder_restores_as_its_weights_do(
    full_export: Path, full_weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dtpm_fast")
    exported = Restorer.from_pretrained(full_export, "derain", 4, "cpu", seed=3)
    assert isinstance(exported, Restorer)
    assert [record.getMessage() for record in caplog.records] == [exported.about]
    for part in ("derain", "tiny", "full.safetensors", "4 steps", "onnx", "cpu: as asked", "float32"):
        assert part in exported.about
    plain = Restorer(full_weights, steps=4, device="cpu", backend="reference", seed=3)
    for size in ((37, 51), (1, 1), (8, 8)):
        before = photo(*size)
        after = exported(before)
        assert np.abs(after.astype(int) - plain(before).astype(int)).max() <= 1
    batch = torch.rand(3, 3, 9, 21, dtype=torch.float64)
    assert exported(batch).dtype == torch.float64
    assert (exported(batch) - plain(batch)).abs().max() <= 1e-4
    assert exported.warmup([(8, 8)]) > 0


def test_the_command_takes_a_folder_for_weights(full_export: Path, tmp_path: Path) -> None:
    Image.fromarray(photo(19, 30)).save(tmp_path / "in.png")
    common = [str(tmp_path / "in.png"), "--weights", str(full_export), "--seed", "4"]
    assert main([*common, "-o", str(tmp_path / "out.png")]) == 0
    expected = Restorer.from_pretrained(full_export, device="cpu", seed=4)(photo(19, 30))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), expected)
    assert main([*common, "--task", "derain", "--steps", "4", "--backend", "onnx", "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "out.png").read_bytes()


def test_a_folder_is_evaluated_in_its_own_steps_and_format(
    full_export: Path, full_weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, name in (("input", "a"), ("target", "a")):
        (tmp_path / "rain/test" / kind).mkdir(parents=True)
        Image.fromarray(photo(24 if kind == "input" else 25, 31)[:24]).save(tmp_path / f"rain/test/{kind}/{name}.png")
    common = ["--task", "derain", "--data", str(tmp_path / "rain"), "--device", "cpu", "--lpips", "off"]
    figures = {}
    for name, weights in (("export", full_export), ("weights", full_weights.path)):
        file = tmp_path / f"{name}.json"
        more = [] if name == "export" else ["--backend", "reference"]
        assert evaluate.main([*common, "--weights", str(weights), "--json", str(file), *more]) == 0
        figures[name] = json.loads(file.read_text())
    assert figures["export"]["steps"] == [4]
    for method, expected in figures["weights"]["mean"].items():
        assert figures["export"]["mean"][method] == pytest.approx(expected, rel=2e-3)
    told = figures["export"]["weights"]
    assert (told["export"], told["precision"], told["task"]) == ("onnx", "fp32", "derain")
    assert told["sha256"] == figures["weights"]["weights"]["sha256"]
    assert "full.safetensors, exported (onnx, fp32)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*common, "--weights", str(full_export), "--json", str(full_export / "manifest.json")])
    assert stop.value.code == 2 and "a folder whose files go together" in capsys.readouterr().err


def test_weights_still_need_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")])
    assert stop.value.code == 2
    assert "--task is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "deblur"}, "trained for the task 'derain', not for 'deblur'"),
        ({"task": "swim"}, "unknown task 'swim'"),
        ({"steps": 10}, "was exported with steps 4, not 10"),
        ({"backend": "fused"}, "was exported with backend onnx, not fused"),
        ({"precision": "bfloat16"}, "was exported with precision float32, not bfloat16"),
        ({"sampler": "dpm++2m"}, "was exported with sampler ddim, not"),
        ({"tile": 256}, "an exported graph does not tile"),
        ({"device": "magic"}, "unknown device 'magic'"),
    ],
    ids=str,
)
def test_settings_that_are_not_the_folder_s_are_refused(full_export: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Restorer.from_pretrained(full_export, **settings)


def test_what_only_one_of_the_two_can_do_is_said(full_export: Path, full_weights: Weights, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task cannot be changed"):
        Restorer.from_pretrained(full_export, device="cpu").set_task("deblur")
    with pytest.raises(UserError, match="backend onnx: runs a folder that dtpm-export wrote, and these are weights"):
        Restorer.from_pretrained(full_weights.path, "derain", device="cpu", backend="onnx")
    with pytest.raises(UserError, match="is a folder; a weights file is needed here"):
        Restorer.from_pretrained(tmp_path, "derain")


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("Failed to allocate memory for requested buffer of size 9", "16x8 pixels: not enough memory"),
        ("Non-zero status code", r"prepare\.onnx: ONNX Runtime failed to run it"),
    ],
)
def test_a_failing_run_is_one_line(
    full_export: Path, monkeypatch: pytest.MonkeyPatch, cause: str, message: str
) -> None:
    restorer = Restorer.from_pretrained(full_export, device="cpu")

    class Failing:
        def __init__(self, session: object) -> None:
            self.session = session

        def io_binding(self) -> object:
            return self.session.io_binding()  # type: ignore[attr-defined]

        def run_with_iobinding(self, _: object) -> None:
            raise Exception(f"{cause}\nand more lines")

    assert isinstance(restorer.backend, ort.OrtStepper)
    monkeypatch.setattr(restorer.backend, "sessions", {"prepare": Failing(restorer.backend.sessions["prepare"])})
    with pytest.raises(UserError, match=message) as failed:
        restorer(photo(8, 16))
    assert "\n" not in str(failed.value)


def test_the_runtime_does_not_import_the_exporter() -> None:
    program = "import sys, dtpm_fast.runtime.restorer; sys.exit('dtpm_fast.export' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
