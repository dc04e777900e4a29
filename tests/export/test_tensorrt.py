"""TensorRT engines without TensorRT: the flow runs through a stand-in that is held to the recorded surface of the real
bindings, the graphs are held to the documented operator support."""

import ast
import dataclasses
import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import SURFACE, Fake, Graph, replace_cuda

from dtpm_fast.commands import export as command
from dtpm_fast.errors import UserError
from dtpm_fast.export import exporter
from dtpm_fast.export.compare import difference
from dtpm_fast.export.manifest import read_manifest, write_manifest
from dtpm_fast.export.onnx_graph import structure
from dtpm_fast.export.ort import OrtStepper
from dtpm_fast.export.restorer import ExportedRestorer
from dtpm_fast.export.tensorrt_api import listener, tensorrt
from dtpm_fast.export.tensorrt_buckets import Bucket, choose_bucket
from dtpm_fast.export.tensorrt_build import BuildSettings, build_engine
from dtpm_fast.export.tensorrt_engine import Context, Engine, NoRoom
from dtpm_fast.export.tensorrt_export import EngineOptions, compare_engines, replace_graphs
from dtpm_fast.export.tensorrt_layers import layer_of, read_layers
from dtpm_fast.export.tensorrt_stepper import TensorRTStepper
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.restorer import Restorer
from dtpm_fast.runtime.sampler import make_steps
from dtpm_fast.weights_file import Weights, load_model

CPU = torch.device("cpu")
NEWEST = "11.4.0.106"
EXPORT = Path(exporter.__file__).parent


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Fake(NEWEST)
    made.graphs = replace_cuda(made, monkeypatch)  # type: ignore[attr-defined]
    return made


def built(source: Path, folder: Path, options: EngineOptions) -> Path:
    """The exported ONNX folder `source` as a folder of engines."""
    shutil.copytree(source, folder)
    manifest = dataclasses.replace(read_manifest(source), kind="tensorrt")
    replace_graphs(folder, manifest, options, CPU, lambda stage: None)
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, full_export: Path) -> Path:
    """Two buckets, refittable, four steps with fresh noise (eta > 0)."""
    folder = tmp_path_factory.mktemp("tensorrt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake = Fake(NEWEST)
        replace_cuda(fake, monkeypatch)
        built(full_export, folder / "x", EngineOptions(("2x40x56", "24x100"), timing_cache=folder / "cache"))
        (folder / "builds.json").write_text(json.dumps(fake.builds))
    return folder / "x"


@pytest.fixture(scope="module")
def reference(full_weights: Weights) -> Reference:
    return Reference(load_model(full_weights, 2).requires_grad_(False), make_steps(full_weights.config, 4))


@pytest.fixture
def other_graphs(full_export: Path, tmp_path: Path) -> Path:
    """The exported folder with other weights: every bias of the blocks is moved."""
    shutil.copytree(full_export, tmp_path / "other")
    for name in ("prepare", "step"):
        model = onnx.load(full_export / f"{name}.onnx")
        moved = [t for t in model.graph.initializer if t.name.endswith(("b1", "b2", "b4")) and "blocks" in t.name]
        assert len(moved) == 21
        for tensor in moved:
            tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) + np.float32(0.3)).tobytes()
        onnx.save(model, tmp_path / "other" / f"{name}.onnx")
    write_manifest(tmp_path / "other", read_manifest(full_export))
    return tmp_path / "other"


def test_engines_and_what_they_are_tied_to(engines: Path) -> None:
    manifest = read_manifest(engines)
    assert sorted(path.name for path in engines.iterdir()) == [
        "manifest.json", "manifest.sha256", "prepare.plan", "step.plan",
    ]  # fmt: skip
    assert manifest.kind == "tensorrt" and manifest.graphs["step"].file == "step.plan"
    assert {k: v for k, v in manifest.engine.items() if k != "structure"} == {
        "device": "cuda", "tensorrt": NEWEST, "compute_capability": "9.0", "gpu": "Stand-in", "refit": True,
        "buckets": [{"batch": 2, "height": 40, "width": 56}, {"batch": 1, "height": 24, "width": 104}],
    }  # fmt: skip
    prepare, step = json.loads((engines.parent / "builds.json").read_text())
    for build in (prepare, step):
        assert build["flags"] == ["BuilderFlag.REFIT"]  # no TF32, and no flag that 11 lacks
    assert prepare["profiles"][0] == {"image": [[1, 3, 8, 8], [2, 3, 40, 56], [2, 3, 40, 56]]}
    assert prepare["profiles"][1]["image"][2] == [1, 3, 24, 104]
    smallest, best, _ = step["profiles"][0]["adapter_middle_blks_0"]
    assert (smallest[2:], best[2:]) == ([1, 1], [5, 7])
    assert "index" not in step["profiles"][0]


@pytest.mark.parametrize("version", list(SURFACE))
def test_every_version_is_served_by_one_path(
    version: str, tmp_path: Path, full_export: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(version, "8.9")
    replace_cuda(fake, monkeypatch)
    options = EngineOptions(("16x24",), refit=False, timing_cache=tmp_path / "cache")
    folder = built(full_export, tmp_path / "x", options)
    manifest = read_manifest(folder)
    assert manifest.engine["tensorrt"] == version and manifest.engine["compute_capability"] == "8.9"
    assert [build["flags"] for build in fake.builds] == [[], []]
    assert all(found.psnr_db >= 60 for found in compare_engines(folder, manifest, reference, CPU))
    with pytest.raises(UserError, match="built with --fixed-weights"):
        TensorRTStepper(folder, manifest, CPU).refit({})
    with pytest.raises(UserError, match=r"whose weights can be exchanged \(kind 'tensorrt', refit False\)"):
        EngineOptions(refit_from=folder).check(CPU, "tensorrt")


def test_the_steps_are_one_graph_that_replays(engines: Path, reference: Reference, fake: Fake) -> None:
    manifest = read_manifest(engines)
    stepper = TensorRTStepper(engines, manifest, CPU)
    graphs: list[Graph] = fake.graphs  # type: ignore[attr-defined]
    for seed in range(3):
        assert difference(stepper.restore, reference, 1, 24, 40, seed=seed).max_abs <= 1e-4
        assert len(graphs) == (seed > 0)  # the first of its size is not captured
    assert graphs[0].replays == 2
    runs = fake.calls.count("IExecutionContext.execute_async_v3")
    assert runs == 3 + 2 * 4  # prepare for each picture; the steps of the first, and those that were captured
    for size in ((2, 8, 8), (1, 16, 104)):
        for seed in (4, 5):
            assert difference(stepper.restore, reference, *size, seed=seed).max_abs <= 1e-4
    assert len(graphs) == 3
    assert difference(stepper.restore, reference, 1, 24, 40, seed=9).max_abs <= 1e-4
    assert len(graphs) == 3 and graphs[0].replays == 3


def test_prepare_and_step_one_by_one(engines: Path, full_export: Path, fake: Fake) -> None:
    manifest = read_manifest(engines)
    stepper = TensorRTStepper(engines, manifest, CPU)
    image, x = torch.rand(1, 3, 16, 8) * 2 - 1, torch.randn(1, 3, 16, 8)
    first = stepper.prepare(image)
    kept = {name: value.clone() for name, value in first.items()}
    stepper.prepare(-image)
    assert all(torch.equal(first[name], kept[name]) for name in first)  # another picture leaves them alone
    same = OrtStepper(full_export, read_manifest(full_export), CPU)
    expected = same.step(x, 0 * x, 2, same.prepare(image))
    for got, value in zip(stepper.step(x, 0 * x, 2, first), expected, strict=True):
        assert (got - value).abs().max() <= 1e-5


def test_a_photo_of_odd_size(engines: Path, full_weights: Weights, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtpm_fast.export.restorer.choose_device", lambda device: (CPU, f"{device}: as a stand-in"))
    photo = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    restorer = ExportedRestorer(engines, seed=5)
    assert "backend tensorrt (TensorRT), device cuda" in restorer.about
    plain = Restorer(full_weights, steps=4, device="cpu", backend="reference", seed=5)(photo)
    assert np.abs(restorer(photo).astype(int) - plain.astype(int)).max() <= 1
    restorer.backend.restore(torch.zeros(1, 3, 40, 56), torch.zeros(4, 3, 40, 56))  # outside of inference mode, too
    with pytest.raises(UserError, match=r"fits none of the engine's buckets \(2x40x56, 1x24x104\): .* 1x48x56"):
        restorer(np.zeros((41, 51, 3), np.uint8))


def test_shapes_are_forgotten_in_turn(engines: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtpm_fast.export.tensorrt_stepper.CAPACITY", 2)
    stepper = TensorRTStepper(engines, read_manifest(engines), CPU)
    noise = torch.randn(stepper.manifest.noise_fields, 3, 8, 24)
    for width in (8, 16, 8, 24):
        stepper.restore(torch.zeros(1, 3, 8, width), noise[..., :width])
    assert [key[3] for key in stepper.shapes] == [8, 24]


def test_other_sizes_give_their_memory_back(engines: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Context] = weakref.WeakSet()
    room = 4  # contexts that the GPU holds; a shape has two

    class Narrow(Context):
        def __init__(self, engine: Engine, *given: Any) -> None:
            if len(alive) >= room:
                raise NoRoom(f"{engine.name}: no room on the GPU")
            super().__init__(engine, *given)
            alive.add(self)

    monkeypatch.setattr("dtpm_fast.export.tensorrt_stepper.Context", Narrow)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    stepper = TensorRTStepper(engines, read_manifest(engines), CPU)
    noise = torch.randn(stepper.manifest.noise_fields, 3, 8, 24)
    first = stepper.restore(torch.zeros(1, 3, 8, 8), noise[..., :8])
    for width in (16, 24):  # the third finds no room until both others are gone
        stepper.restore(torch.zeros(1, 3, 8, width), noise[..., :width])
    assert [key[3] for key in stepper.shapes] == [24] and len(alive) == 2
    assert torch.equal(stepper.restore(torch.zeros(1, 3, 8, 8), noise[..., :8]), first)
    stepper.shapes.clear()
    room = 1
    with pytest.raises(NoRoom, match=r"step\.plan: no room on the GPU"):
        stepper.restore(torch.zeros(1, 3, 8, 8), noise[..., :8])
    assert not alive


def test_a_profile_whose_memory_is_refused_is_no_room(
    engines: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT takes the memory when the profile is chosen, and says False."""
    context = sys.modules["tensorrt"].IExecutionContext
    choose, refused = context.set_optimization_profile_async, 1

    def refuse(self: Any, profile: int, stream: int) -> bool:
        nonlocal refused
        refused -= 1
        return refused < 0 and choose(self, profile, stream)

    stepper = TensorRTStepper(engines, read_manifest(engines), CPU)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(context, "set_optimization_profile_async", refuse)
    noise = torch.randn(stepper.manifest.noise_fields, 3, 8, 8)
    stepper.restore(torch.zeros(1, 3, 8, 8), noise)  # at the second try
    stepper.shapes.clear()
    refused = 2
    with pytest.raises(NoRoom, match="no room on the GPU"):
        stepper.restore(torch.zeros(1, 3, 8, 8), noise)


def test_an_error_of_before_is_not_told_again(engines: Path, fake: Fake) -> None:
    log = listener(tensorrt())
    log.log(log.Severity.ERROR, "of another operation")
    assert log.cause == "of another operation"
    assert listener(tensorrt()) is log and log.cause == "TensorRT gave no reason"


def test_new_weights_in_running_engines(
    engines: Path, full_export: Path, other_graphs: Path, tmp_path: Path, reference: Reference, fake: Fake
) -> None:
    stepper = TensorRTStepper(engines, read_manifest(engines), CPU)
    other = OrtStepper(other_graphs, read_manifest(other_graphs), CPU)
    assert difference(stepper.restore, reference, 1, 16, 16).max_abs <= 1e-4
    assert difference(stepper.restore, other, 1, 16, 16).psnr_db < 40
    graphs = {name: (other_graphs / f"{name}.onnx").read_bytes() for name in ("prepare", "step")}
    assert stepper.shapes
    stepper.refit(graphs)
    assert not stepper.shapes  # a captured graph would read the weights where they were
    assert difference(stepper.restore, other, 1, 16, 16).max_abs <= 1e-4
    model = onnx.load(full_export / "step.onnx")
    model.graph.initializer[0].dims[0] = 1
    model.graph.initializer[0].ClearField("raw_data")
    with pytest.raises(UserError, match=r"step\.plan: the weights do not fit the engine \(Failed to refit"):
        stepper.refit({**graphs, "step": model.SerializeToString()})


def test_a_folder_from_another_ones_engines(
    engines: Path, other_graphs: Path, full_export: Path, tmp_path: Path, fake: Fake
) -> None:
    options = EngineOptions(refit_from=engines)
    options.check(CPU, "tensorrt")
    folder = built(other_graphs, tmp_path / "x", options)
    manifest, before = read_manifest(folder), read_manifest(engines)
    assert not fake.builds and manifest.engine == before.engine
    assert manifest.files["step.plan"] != before.files["step.plan"]
    other = OrtStepper(other_graphs, read_manifest(other_graphs), CPU)
    assert difference(TensorRTStepper(folder, manifest, CPU).restore, other, 2, 16, 8).max_abs <= 1e-4
    # And from that one's, which can be exchanged as often as one likes.
    again = tmp_path / "again"
    shutil.copytree(full_export, again)
    once_more = built(again, tmp_path / "z", EngineOptions(refit_from=folder))
    reference = OrtStepper(full_export, read_manifest(full_export), CPU)
    stepper = TensorRTStepper(once_more, read_manifest(once_more), CPU)
    assert difference(stepper.restore, reference, 2, 16, 8).max_abs <= 1e-4
    model = onnx.load(full_export / "step.onnx")
    next(node for node in model.graph.node if node.op_type == "LayerNormalization").attribute[0].f = 0.5
    onnx.save(model, other_graphs / "step.onnx")
    write_manifest(other_graphs, read_manifest(full_export))
    with pytest.raises(UserError, match="its step is of another structure"):
        built(other_graphs, tmp_path / "y", options)
    with pytest.raises(
        UserError, match=r"no engines of --format tensorrt whose weights can be exchanged \(kind 'onnx'"
    ):
        EngineOptions(refit_from=full_export).check(CPU, "tensorrt")


def test_structure_is_all_but_the_weights(full_export: Path, tmp_path: Path) -> None:
    original = full_export / "step.onnx"
    model = onnx.load(original)
    weights = next(t for t in model.graph.initializer if t.name == "unet.blocks.0.w1")
    weights.raw_data = bytes(len(weights.raw_data))
    onnx.save(model, tmp_path / "other.onnx")
    assert structure(tmp_path / "other.onnx") == structure(original)
    next(node for node in model.graph.node if node.op_type == "LayerNormalization").attribute[0].f = 0.5
    onnx.save(model, tmp_path / "other.onnx")
    assert structure(tmp_path / "other.onnx") != structure(original)


@pytest.mark.parametrize(
    ("version", "capability"), [("10.16.1.11", "9.0"), (NEWEST, "8.0")], ids=["version", "architecture"]
)
def test_another_place_is_refused(
    engines: Path, version: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_cuda(Fake(version, capability), monkeypatch)
    with pytest.raises(UserError) as raised:
        TensorRTStepper(engines, read_manifest(engines), CPU)
    said = str(raised.value)
    assert f"built by TensorRT {NEWEST} for compute capability 9.0 (Stand-in)" in said
    assert f"this is TensorRT {version} on {capability}" in said and "export again here" in said
    with pytest.raises(UserError, match="export again here"):
        EngineOptions(refit_from=engines).check(CPU, "tensorrt")


def test_the_timing_cache_is_kept_and_checked(tmp_path: Path, full_export: Path, fake: Fake) -> None:
    cache = tmp_path / "cache" / "dtpm-fast" / "tensorrt" / f"{NEWEST}-9.0.timing"

    def timed_before(name: str) -> list[bool]:
        fake.builds.clear()
        built(full_export, tmp_path / name, EngineOptions(("8x8",)))
        return [build["timed_before"] for build in fake.builds]

    assert timed_before("a") == [False, False]
    assert timed_before("b") == [True, True]
    cache.write_bytes(b"of another version")
    assert timed_before("c") == [False, False]
    assert cache.read_bytes().startswith(f"timing {NEWEST} 9.0".encode())


def test_a_timing_cache_that_cannot_be_kept_costs_no_engine(
    tmp_path: Path, full_export: Path, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    built(full_export, tmp_path / "a", EngineOptions(("8x8",), timing_cache=Path("/proc/nowhere/timing")))
    assert (tmp_path / "a" / "step.plan").is_file()
    assert "/proc/nowhere/timing: cannot be written" in caplog.text


def test_a_wrong_engine_is_found_layer_by_layer(
    tmp_path: Path, full_export: Path, reference: Reference, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fake_tensorrt.in_float32

    def wrong(file: Any) -> bytes:
        model = onnx.load_from_string(honest(file))
        for tensor in model.graph.initializer:
            if tensor.name == "unet.blocks.3.w4":
                tensor.raw_data = (3 * np.frombuffer(tensor.raw_data, np.float32)).tobytes()
        return bytes(model.SerializeToString())

    monkeypatch.setattr(fake_tensorrt, "in_float32", wrong)
    folder = built(full_export, tmp_path / "x", EngineOptions(("16x16",), layers=True))
    layers = read_layers(folder)
    assert [layer.graph for layer in layers].index("step") > 100
    bad = [layer.snr_db is None or layer.snr_db < 60 for layer in layers]
    first = layers[bad.index(True)]  # the layer, and after it what depends on it
    assert (first.graph, first.operator) == ("step", "Conv") and sum(bad) > 20
    found = compare_engines(folder, read_manifest(folder), reference, CPU)
    with pytest.raises(UserError, match=r"differs from the model: .* nothing was written; worst layer: step "):
        exporter.accept(found, read_manifest(folder), layers)


def test_a_layer_that_is_not_finite_is_the_worst() -> None:
    values = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]), torch.tensor([-1.0, 2.0])]
    layers = [layer_of("step", f"l{i}", "Conv", values[0], value) for i, value in enumerate(values)]
    assert [layer.name for layer in sorted(layers, key=lambda layer: layer.rank)] == ["l1", "l2", "l0"]
    assert "NaN or infinity" in str(layers[1]) and layers[1].snr_db is None and layers[1].peak == 2.0
    assert layers[2].max_abs == 2.0 and layers[2].snr_db == pytest.approx(10 * np.log10(5 / 4))


def test_what_tensorrt_says_is_told(tmp_path: Path, full_export: Path, fake: Fake) -> None:
    fake.refuse_build = "Could not find any implementation for node X\nstack"
    with pytest.raises(UserError, match=r"prepare\.onnx: TensorRT 11\.4.* \(Could not find any .* node X\)$"):
        built(full_export, tmp_path / "x", EngineOptions(("8x8",)))
    with pytest.raises(UserError, match=r"g: .* cannot read the graph \(Failed to parse the model\.\)"):
        build_engine(b"no graph", "g", read_manifest(full_export).graphs["step"], 8, BuildSettings(()))
    node = onnx.helper.make_node("Det", ["a"], ["b"], "that_one")
    graph = onnx.helper.make_graph([node], "g", [], [])
    unread = onnx.helper.make_model(graph).SerializeToString()
    with pytest.raises(UserError, match=r"\(Det that_one: no importer\)"):
        build_engine(unread, "g", read_manifest(full_export).graphs["step"], 8, BuildSettings(()))
    with pytest.raises(UserError, match=r"p: .* cannot load the engine \(The engine plan file is not compatible\)"):
        Engine(b"no plan", "p")


def test_without_tensorrt_and_with_an_old_one(
    tmp_path: Path, plain_weights: Weights, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--task", "derain", "--weights", str(plain_weights.path), "-o", str(tmp_path / "x")]

    def said(*more: str) -> str:
        assert command.main([*arguments, *more]) == 1
        assert not (tmp_path / "x").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "need TensorRT 10.12 or newer and an NVIDIA GPU: pip install 'dtpm-fast[tensorrt]'" in said(
        "--format", "tensorrt"
    )
    old = Fake(NEWEST)
    old.module.__version__ = "10.11.0.33"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old.module)
    assert "TensorRT 10.11.0.33 is too old: 10.12 or newer" in said("--format", "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", Fake(NEWEST).module)
    if not torch.cuda.is_available():
        assert "no CUDA device is available" in said("--format", "tensorrt")
    assert "an NVIDIA GPU; use --device cuda" in said("--format", "tensorrt", "--device", "cpu")
    assert "bucket 'big': must be HEIGHTxWIDTH" in _checked("big", monkeypatch)


def _checked(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("dtpm_fast.export.tensorrt_export.require_cuda", lambda device: None)
    with pytest.raises(UserError) as raised:
        EngineOptions((bucket,)).check(CPU, "tensorrt")
    return str(raised.value)


@pytest.mark.slow
def test_the_command(
    tmp_path: Path, plain_weights: Weights, fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for module in ("dtpm_fast.device", "dtpm_fast.export.restorer"):
        monkeypatch.setattr(f"{module}.choose_device", lambda device: (CPU, f"{device}: as a stand-in"))
    kept: dict[str, bytes] = {}  # the second export is of the same weights
    write = exporter.write_onnx

    def write_once(*arguments: Any) -> None:
        file = arguments[-1]
        if file.name not in kept:
            write(*arguments)
            kept[file.name] = file.read_bytes()
        file.write_bytes(kept[file.name])

    monkeypatch.setattr(exporter, "write_onnx", write_once)
    base = ["--task", "derain", "--weights", str(plain_weights.path), "--steps", "2", "--precision", "fp16"]
    base += ["--format", "tensorrt"]
    assert command.main([*base, "--bucket", "3x40x32", "--verify", "--layers", "-o", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    assert "tensorrt, derain, 2 steps, fp16; against the model" in said and "layers.json" in said
    assert said.count("max difference") == 1 + 10 + 2  # one line, ten layers, two of the six sizes fit
    manifest = read_manifest(tmp_path / "x")
    assert "layers.json" in manifest.files and manifest.versions["tensorrt"] == NEWEST
    assert [one["size"] for one in manifest.compared] == [[3, 3, 40, 32], [1, 3, 16, 8]]
    layers = read_layers(tmp_path / "x")
    counts = {op: sum(layer.operator == op for layer in layers) for op in ("LayerNormalization", "DepthToSpace")}
    assert counts == {"LayerNormalization": 28, "DepthToSpace": 6}  # of both graphs
    assert any(layer.snr_db is not None and 30 < layer.snr_db < 90 for layer in layers)  # it is 16 bits
    assert command.main([*base, "--refit", str(tmp_path / "x"), "-o", str(tmp_path / "y")]) == 0
    assert read_manifest(tmp_path / "y").engine == manifest.engine and len(fake.builds) == 4


def test_a_changed_engine_is_refused(engines: Path, tmp_path: Path) -> None:
    shutil.copytree(engines, tmp_path / "x")
    (tmp_path / "x" / "step.plan").write_bytes(b"other")
    with pytest.raises(UserError, match=r"step\.plan: is not the file that was exported"):
        ExportedRestorer(tmp_path / "x")


def test_buckets() -> None:
    assert Bucket.parse("1080x1920", 16) == Bucket(1, 1088, 1920)
    assert Bucket.parse("4x256x250", 16) == Bucket(4, 256, 256)
    for text in ("", "8", "0x8", "8x-8", "1x2x3x4", "8x8 ", "ax8"):
        with pytest.raises(UserError, match="must be HEIGHTxWIDTH"):
            Bucket.parse(text, 16)
    buckets = [Bucket(1, 512, 512), Bucket(1, 256, 256), Bucket(4, 256, 256), Bucket(1, 128, 1024)]
    assert choose_bucket(buckets, 1, 128, 128) == 1
    assert choose_bucket(buckets, 2, 128, 128) == 2
    assert choose_bucket(buckets, 1, 300, 16) == 0
    assert choose_bucket(buckets, 1, 16, 1000) == 3
    with pytest.raises(UserError, match="fits none"):
        choose_bucket(buckets, 5, 16, 16)


def test_every_name_is_in_the_recorded_surface() -> None:
    """Names that the code reads from the module, by its syntax tree. What it calls on objects, the stand-in holds."""
    names = set()
    for file in EXPORT.glob("tensorrt_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            chain = []
            while isinstance(node, ast.Attribute):
                chain.append(node.attr)
                node = node.value
            if chain and isinstance(node, ast.Name) and node.id == "trt":
                names.add(tuple(reversed(chain)))
    names = {name for name in names if name[0] != "__version__"}
    assert ("BuilderFlag", "REFIT") in names and ("ILogger", "Severity", "ERROR") in names and len(names) > 15
    for version, recorded in SURFACE.items():
        for first, *rest in names:
            assert first in recorded["module"], (version, first)
            kind = recorded["classes"][first]
            if "values" in kind and rest:
                assert rest[0] in kind["values"], (version, first, rest)


def test_the_stand_in_refuses_what_a_version_lacks() -> None:
    fake = Fake("10.16.1.11")
    assert hasattr(fake.module.BuilderFlag, "REFIT") and not hasattr(fake.module.BuilderFlag, "FP16")  # gone in 11
    builder = fake.module.Builder(fake.module.ILogger())
    for wrong in (lambda: builder.create_network(1, 2), lambda: builder.create_network(kind=1)):
        with pytest.raises(AssertionError, match="create_network takes"):
            wrong()
    with pytest.raises(AttributeError):
        builder.max_batch_size  # noqa: B018
    with pytest.raises(AssertionError, match="cannot be set"):
        builder.create_builder_config().max_workspace_size = 1
