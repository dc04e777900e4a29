"""What the exported graphs compute, by ONNX Runtime and by ONNX's own reference evaluator."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from dtpm_fast.errors import UserError
from dtpm_fast.export.compare import Difference, check, difference, stepped
from dtpm_fast.export.exporter import export_folder, verify, whole
from dtpm_fast.export.manifest import read_manifest
from dtpm_fast.export.ort import OrtStepper, open_session
from dtpm_fast.export.restorer import ExportedRestorer
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.restorer import Restorer
from dtpm_fast.runtime.sampler import make_steps, sample
from dtpm_fast.weights_file import Weights, load_model

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).parents[2] / "export" / "examples" / "restore_numpy.py"


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 40, 16), (1, 24, 56), (3, 8, 72), (1, 88, 104)], ids=str)
def test_other_sizes_than_the_exported_one(full_export: Path, full_weights: Weights, size: tuple) -> None:
    manifest = read_manifest(full_export)
    model = load_model(full_weights, 2).requires_grad_(False)
    reference = Reference(model, make_steps(full_weights.config, 4))
    found = difference(stepped(OrtStepper(full_export, manifest, CPU)), reference, *size, seed=7)
    assert found.max_abs <= 1e-4
    assert found.psnr_db >= 60


def test_a_photo_of_odd_size_is_restored_as_by_the_model(full_export: Path, full_weights: Weights) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    exported = ExportedRestorer(full_export, device="cpu", seed=5)(photo)
    plain = Restorer(full_weights, steps=4, device="cpu", backend="reference", seed=5)(photo)
    assert exported.shape == photo.shape
    assert np.abs(exported.astype(int) - plain.astype(int)).max() <= 1
    assert np.abs(plain.astype(int) - photo.astype(int)).mean() > 1  # it did something


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits_with_extremes(tmp_path: Path, plain_weights: Weights, precision: str) -> None:
    manifest = export_folder(plain_weights, tmp_path / "x", steps=2, precision=precision)
    narrow = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
    step = onnx.load(tmp_path / "x" / "step.onnx")
    types = Counter(tensor.data_type for tensor in step.graph.initializer)
    assert types[narrow] > 50
    inferred = onnx.shape_inference.infer_shapes(step, strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    norms = [node for node in inferred.graph.node if node.op_type == "LayerNormalization"]
    means = [node for node in inferred.graph.node if node.op_type == "ReduceMean"]
    assert norms and means and all(kinds[node.output[0]] == TensorProto.FLOAT for node in (*norms, *means))
    stepper = OrtStepper(tmp_path / "x", manifest, CPU)
    reference = Reference(load_model(plain_weights, 2).requires_grad_(False), manifest.steps)
    image, noise = torch.ones(1, 3, 16, 24), torch.full((1, 3, 16, 24), 6.0)
    image[..., ::2] = -1
    assert stepped(stepper)(image, noise).isfinite().all()
    assert difference(stepped(stepper), reference, 3, 24, 40, seed=9).psnr_db >= 45


@pytest.mark.slow
def test_unrolled_and_verify(tmp_path: Path, plain_weights: Weights) -> None:
    manifest = export_folder(plain_weights, tmp_path / "x", steps=2, unrolled=True)
    assert len(manifest.compared) == 3
    found = verify(tmp_path / "x", manifest, plain_weights, OrtStepper(tmp_path / "x", manifest, CPU))
    assert len(found) == 12 and all(one.max_abs <= 1e-4 for one in found)
    noise = torch.randn(1, 3, 16, 8)
    restored = whole(tmp_path / "x", manifest)(torch.zeros(1, 3, 16, 8), noise)
    assert not torch.equal(restored, whole(tmp_path / "x", manifest)(torch.zeros(1, 3, 16, 8), -noise))


def test_standard_operators_only(full_export: Path) -> None:
    for name in ("prepare", "step"):
        model = onnx.load(full_export / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert {(o.domain, o.version) for o in model.opset_import} == {("", 18)}
        counts = Counter(node.op_type for node in model.graph.node)
        assert counts["LayerNormalization"] == 14  # two in each of seven blocks
        assert counts["DepthToSpace"] == 3
        assert counts["Resize"] == 0  # the antialiased one is not TensorRT's
        assert not any(node.metadata_props for node in model.graph.node)  # paths of the exporting machine
        sides = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
        assert sides[0] == ["batch", 3, "height", "width"]


def test_the_reference_evaluator_agrees(full_export: Path) -> None:
    manifest = read_manifest(full_export)
    stepper = OrtStepper(full_export, manifest, CPU)
    image = torch.rand(1, 3, 8, 16) * 2 - 1
    expected = stepper.prepare(image)
    names = list(expected)
    found = ReferenceEvaluator(str(full_export / "prepare.onnx")).run(names, {"image": image.numpy()})
    for name, value in zip(names, found, strict=True):
        assert np.abs(value - expected[name].numpy()).max() <= 1e-4, name
    x = torch.randn(1, 3, 8, 16)
    given = {"x": x.numpy(), "previous": 0 * x.numpy(), "index": np.array([2]), **dict(zip(names, found, strict=True))}
    next_x, x0 = ReferenceEvaluator(str(full_export / "step.onnx")).run(["next_x", "x0"], given)
    for value, other in zip((next_x, x0), stepper.step(x, 0 * x, 2, expected), strict=True):
        assert np.abs(value - other.numpy()).max() <= 1e-4


def test_the_example_imports_numpy_and_onnxruntime_alone(full_export: Path, tmp_path: Path) -> None:
    program = (
        "import sys, runpy\n"
        "for name in ('torch', 'dtpm_fast', 'onnx', 'PIL', 'scipy'): sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    example_restores(full_export, tmp_path, [sys.executable, "-c", program, str(EXAMPLE)])


@pytest.mark.slow
def test_the_example_runs_where_only_onnxruntime_is_installed(full_export: Path, tmp_path: Path) -> None:
    """The plain onnxruntime of the package index, which is not the one that the export extra installs."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    done = subprocess.run([*install, "onnxruntime"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package index to install onnxruntime from: {done.stderr.strip().splitlines()[-1][:100]}")
    missing = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'dtpm_fast', 'onnx', 'PIL')))"
    subprocess.run([str(python), "-c", missing], check=True, cwd=tmp_path)
    example_restores(full_export, tmp_path, [str(python), str(EXAMPLE)])


def example_restores(folder: Path, tmp_path: Path, command: list[str]) -> None:
    photo = np.random.default_rng(1).integers(0, 256, (19, 30, 3), dtype=np.uint8)
    np.save(tmp_path / "photo.npy", photo)
    files = [str(folder), str(tmp_path / "photo.npy"), str(tmp_path / "out.npy")]
    subprocess.run([*command, *files], check=True, cwd=tmp_path)
    restored = np.load(tmp_path / "out.npy")
    # The same picture with the same noise through the package's own runner.
    manifest = read_manifest(folder)
    noise = np.random.default_rng(0).standard_normal((manifest.noise_fields, 3, 24, 32), np.float32)
    padded = np.pad(photo, [(0, 5), (0, 2), (0, 0)], mode="reflect")
    image = torch.from_numpy(padded.transpose(2, 0, 1)[None].astype(np.float32)) / 127.5 - 1
    expected = stepped(OrtStepper(folder, manifest, CPU))(image, torch.from_numpy(noise))
    expected8 = (expected[0, :, :19, :30].permute(1, 2, 0) * 127.5 + 127.5).round().numpy()
    assert np.abs(restored - expected8).max() <= 1
    assert np.abs(restored - expected8).mean() < 0.1  # rounded: cut off, half of them would be one lower


def test_cuda_is_asserted(full_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    asked: list[object] = []

    class Fallen:
        def __init__(self, *_: object, providers: list[object]) -> None:
            asked.extend(providers)

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(UserError, match="did not start its CUDAExecutionProvider"):
        open_session(str(full_export / "step.onnx"), torch.device("cuda", 1))
    assert asked == [("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="no CUDAExecutionProvider"):
        open_session(str(full_export / "step.onnx"), torch.device("cuda"))


def test_the_threads_are_as_asked(full_export: Path) -> None:
    stepper = ExportedRestorer(full_export, device="cpu", threads=1).backend
    assert isinstance(stepper, OrtStepper)
    assert [s.get_session_options().intra_op_num_threads for s in stepper.sessions.values()] == [1, 1]


def test_a_broken_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match=r"x\.onnx: ONNX Runtime cannot load it"):
        open_session(str(tmp_path / "x.onnx"), CPU)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 60.0), ("fp16", 45.0), ("bf16", 45.0)])
def test_the_bound_refuses(precision: str, bound: float) -> None:
    check(Difference(1, 8, 8, 0.0, bound), precision)
    for psnr in (bound - 0.01, float("nan")):
        with pytest.raises(UserError, match=r"differs from the model.*nothing was written"):
            check(Difference(1, 8, 8, 0.1, psnr), precision)


def test_a_result_that_is_not_finite_is_refused(full_weights: Weights) -> None:
    reference = Reference(load_model(full_weights, 2).requires_grad_(False), make_steps(full_weights.config, 1))
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="gives NaN or infinity at 8x16: export with --precision fp32"):
            difference(lambda image, noise, value=value: image * value, reference, 1, 8, 16)


def test_a_difference_is_of_the_whole_range(full_weights: Weights) -> None:
    reference = Reference(load_model(full_weights, 2).requires_grad_(False), make_steps(full_weights.config, 1))
    seen: list[torch.Tensor] = []

    def lighter(image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        seen.append(image)
        return sample(reference, reference.prepare(image), noise) + 0.02

    found = difference(lighter, reference, 2, 8, 16)
    assert found.max_abs == pytest.approx(0.02, rel=1e-3)
    assert found.psnr_db == pytest.approx(40, abs=0.01)  # 10 log10(2² / 0.02²)
    assert sorted(seen[0][..., :4].unique().tolist()) == [-1, 1]


def test_other_weights_are_not_verified(full_export: Path, plain_weights: Weights) -> None:
    manifest = read_manifest(full_export)
    with pytest.raises(UserError, match=r"differs from the model.* 60 dB that fp32 must reach; do not use .*full"):
        verify(full_export, manifest, plain_weights, OrtStepper(full_export, manifest, CPU))


def test_the_manifest_is_plain_json(full_export: Path) -> None:
    content = json.loads((full_export / "manifest.json").read_text())
    assert content["task"] == "derain" and content["sampler"]["steps"] == 4 and content["noise_fields"] == 4
    assert content["compared"][0]["psnr_db"] >= 60
    assert set(content["files"]) == {"prepare.onnx", "step.onnx"}
