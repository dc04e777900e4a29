"""Every way to fail is one clear line, and leaves nothing behind."""

import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtpm_fast.atomic import whole_folder
from dtpm_fast.commands.export import main
from dtpm_fast.errors import UserError
from dtpm_fast.export import exporter
from dtpm_fast.export.aoti import AotiStepper
from dtpm_fast.export.exporter import export_folder
from dtpm_fast.export.graph import StepGraph
from dtpm_fast.export.manifest import read_manifest
from dtpm_fast.export.restorer import ExportedRestorer
from dtpm_fast.weights_file import Weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--steps": "0"}, "steps = 0: must be a whole number from 1 to 1000"),
        ({"--task": "deblur"}, "trained for the task 'derain', not for 'deblur'"),
        ({"--weights": "missing.safetensors"}, "no such weights file"),
        ({"--unrolled": None, "--steps": "5"}, "--unrolled with 5 steps as onnx: offered for onnx and up to 4 steps"),
    ],
    ids=str,
)
def test_the_command_says_why(
    tmp_path: Path, plain_weights: Weights, capsys: pytest.CaptureFixture, change: dict, message: str
) -> None:
    options = {"--task": "derain", "--weights": str(plain_weights.path), "-o": str(tmp_path / "x"), **change}
    code = main([part for pair in options.items() for part in pair if part is not None])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and message in error and error.startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "denoise"], "invalid choice: 'denoise'"),
        (["--bucket", "8x8"], "--bucket: is about TensorRT engines"),
        (["--format", "triton", "--timing-cache", "c"], "--timing-cache: is about TensorRT engines"),
        (["--network", "tensorrt"], "--network says what --format triton serves"),
        (["--format", "tensorrt", "--refit", "d", "--fixed-weights"], "--refit takes the engines as they are"),
        (["--device", "cuda"], "--device: an ONNX file is for no device in particular"),
        (["--format", "triton", "--verify"], "--verify compares other folders than triton's"),
    ],
    ids=str,
)
def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--task", "derain", "-o", str(tmp_path / "x"), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_stage_one_and_gated_weights_are_refused(
    tmp_path: Path, random_weights: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    stage1 = random_weights(tmp_path / "1.safetensors", stage=1)
    assert main(["--weights", str(stage1), "-o", str(tmp_path / "x")]) == 1  # a file's task need not be given
    assert "restoring needs stage 2 weights" in capsys.readouterr().err
    gated = random_weights(tmp_path / "2.safetensors", adapter_kind="gated")
    assert main(["--task", "derain", "--weights", str(gated), "-o", str(tmp_path / "x")]) == 1
    assert "cannot be merged" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # a name's does
        main(["-o", str(tmp_path / "x")])
    assert "--task is needed: --weights light" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.safetensors", "2.safetensors"]


def test_a_wrong_merge_is_not_written(tmp_path: Path, plain_weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> object:
        plan = original(*arguments)
        plan.step_module.unet.blocks[0].w5.mul_(1.5)  # type: ignore[attr-defined]
        return plan

    original = exporter.Plan
    monkeypatch.setattr(exporter, "Plan", wrong)
    monkeypatch.setattr(exporter, "write_onnx", lambda *_: pytest.fail("written before the merge was proved"))
    with pytest.raises(UserError, match="the merged model differs from the model"):
        export_folder(plain_weights, tmp_path / "x", steps=1)
    assert not list(tmp_path.iterdir())


def test_a_wrong_graph_is_not_put_in_place(
    tmp_path: Path, plain_weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(module: torch.nn.Module, *arguments: Any) -> None:
        if isinstance(module, StepGraph):
            module.table[:, 2] *= 1.5
        original(module, *arguments)

    original = exporter.write_onnx
    monkeypatch.setattr(exporter, "write_onnx", wrong)
    with pytest.raises(UserError, match="the exported graph differs from the model"):
        export_folder(plain_weights, tmp_path / "x", steps=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_kept(tmp_path: Path, plain_weights: Weights) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        export_folder(plain_weights, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="a full disk is imitated by a limit on the size of files")
def test_a_full_disk_leaves_nothing(tmp_path: Path, plain_weights: Weights, capsys: pytest.CaptureFixture) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        options = ["--task", "derain", "--weights", str(plain_weights.path), "--steps", "1", "-o", str(tmp_path / "x")]
        assert main(options) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "x: could not be written (File too large); nothing was left behind" in error
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_folder(tmp_path / "x") as folder:
            (folder / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_tampering_is_seen(full_export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(full_export, folder)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"multiple": 8', '"multiple": 4'))
    with pytest.raises(UserError, match=r"manifest\.json: was changed after the export"):
        ExportedRestorer(folder, device="cpu")
    manifest.write_text(text)
    read_manifest(folder)
    graph = folder / "step.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(UserError, match=r"step\.onnx: is not the file that was exported"):
        read_manifest(folder)
    graph.unlink()
    with pytest.raises(UserError, match=r"step\.onnx: is missing"):
        read_manifest(folder)
    for digest in ("", f"{hashlib.sha256(b'').hexdigest()}  manifest.json\n"):
        (folder / "manifest.sha256").write_text(digest)
        with pytest.raises(UserError, match=r"manifest\.json: was changed after the export"):
            read_manifest(folder)
    for other in ("../step.onnx", str(full_export / "step.onnx"), "prepare.plan"):
        changed = json.loads(text)
        changed["graphs"]["step"]["file"] = other
        if other.startswith("."):
            changed["files"][other] = changed["files"].pop("step.onnx")
        manifest.write_text(json.dumps(changed))
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        (folder / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
        with pytest.raises(UserError, match=re.escape(f"names {other!r}, which is none of the export's files")):
            read_manifest(folder)
    for was, now, cause in (
        ('"sha256"', '"md5"', r"not a readable manifest \('sha256'\)"),
        ('"dtpm-export-1"', '"dtpm-export-2"', r"not an export of dtpm-fast \(no 'dtpm-export-1' in it\)"),
    ):
        manifest.write_text(text.replace(was, now))
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        (folder / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
        with pytest.raises(UserError, match=rf"manifest\.json: {cause}"):
            read_manifest(folder)
    with pytest.raises(UserError, match=r"is .* a folder that dtpm-export wrote"):
        read_manifest(tmp_path)


def test_packages_for_another_gpu_are_refused(full_export: Path) -> None:
    """Before they are loaded, which runs code of theirs."""
    built_for = {"device": "cpu", "compute_capability": "9.0"}
    manifest = dataclasses.replace(read_manifest(full_export), kind="aoti", engine=built_for)
    with pytest.raises(UserError, match=r"was compiled for compute capability 9\.0, cpu has None; export again"):
        AotiStepper(full_export, manifest, torch.device("cpu"))
