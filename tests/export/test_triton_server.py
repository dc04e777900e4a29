"""The model repository: its configuration against the server's published schema, its Python model with a stand-in for
the server that runs the network in ONNX Runtime."""

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_tensorrt import Fake, replace_cuda

from dtpm_fast.errors import UserError
from dtpm_fast.export.exporter import export_folder
from dtpm_fast.export.manifest import read_manifest
from dtpm_fast.export.ort import open_session
from dtpm_fast.export.tensorrt_export import EngineOptions, compare_engines, replace_graphs
from dtpm_fast.export.triton_server import write_repository
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.sampler import sample
from dtpm_fast.weights_file import Weights, load_model


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, plain_weights: Weights) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    export_folder(plain_weights, folder, kind="triton", steps=1)
    return folder


class Tensor:
    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self.value = name, value

    def as_numpy(self) -> np.ndarray:
        return self.value


class Response:
    def __init__(self, output_tensors: list[Tensor], error: Any = None) -> None:
        self.tensors, self.failure = output_tensors, error

    def has_error(self) -> bool:
        return self.failure is not None

    def error(self) -> Any:
        return self.failure


def server(network: Path, calls: list[dict]) -> types.ModuleType:
    """`triton_python_backend_utils` as far as its documentation describes what the model uses."""
    session = open_session(str(network), torch.device("cpu"))

    class Request:
        def __init__(self, **options: Any) -> None:
            self.options = options

        def exec(self) -> Response:
            calls.append(self.options)
            names = self.options["requested_output_names"]
            found = session.run(names, {tensor.name: tensor.value for tensor in self.options["inputs"]})
            return Response([Tensor(name, value) for name, value in zip(names, found, strict=True)])

    utils = types.ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.InferenceRequest = Tensor, Response, Request  # type: ignore[attr-defined]
    utils.TritonError = str  # type: ignore[attr-defined]
    utils.PreferredMemory = lambda kind, device: (kind, device)  # type: ignore[attr-defined]
    utils.TRITONSERVER_MEMORY_CPU = "cpu"  # type: ignore[attr-defined]
    pick = {"get_input_tensor_by_name", "get_output_tensor_by_name"}
    for name in pick:
        setattr(utils, name, lambda holder, key: next((t for t in holder.tensors if t.name == key), None))
    return utils


def test_photos_through_the_python_model(
    repository: Path, plain_weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict] = []
    monkeypatch.setitem(
        sys.modules, "triton_python_backend_utils", server(repository / "dtpm_network" / "1" / "model.onnx", calls)
    )
    spec = importlib.util.spec_from_file_location("triton_model", repository / "dtpm" / "1" / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    manifest = read_manifest(repository)
    parameters = {"multiple": {"string_value": "8"}, "noise_fields": {"string_value": "1"}}
    config = (repository / "dtpm" / "config.pbtxt").read_text()
    assert all(f'key: "{key}" value: {{ string_value: "{v["string_value"]}"' in config for key, v in parameters.items())
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": parameters})})
    photo = np.random.default_rng(3).integers(0, 256, (13, 22, 3), dtype=np.uint8)
    requests = [
        Response([Tensor("photo", photo), Tensor("seed", np.array([4]))]),
        Response([Tensor("photo", photo[:1, :1])]),
        Response([Tensor("photo", photo[..., 0])]),
        Response([Tensor("photo", photo), Tensor("seed", np.array([-4]))]),
    ]
    first, second, third, fourth = model.execute(requests)
    assert calls[0]["model_name"] == "dtpm_network" and calls[0]["preferred_memory"] == ("cpu", 0)
    padded = np.pad(photo, [(0, 3), (0, 2), (0, 0)], mode="reflect").transpose(2, 0, 1)
    image = torch.from_numpy(np.ascontiguousarray(padded[None], dtype=np.float32) / 127.5 - 1)
    noise = torch.from_numpy(np.random.default_rng(4).standard_normal((1, 3, 16, 24), np.float32))
    reference = Reference(load_model(plain_weights, 2).requires_grad_(False), manifest.steps)
    with torch.no_grad():
        picture = sample(reference, reference.prepare(image), noise)[0, :, :13, :22]
    expected = picture.permute(1, 2, 0) * 127.5 + 127.5
    restored = first.tensors[0].as_numpy()
    assert restored.dtype == np.uint8 and np.abs(restored - expected.numpy()).max() <= 0.52  # rounded, not cut off
    assert second.tensors[0].as_numpy().shape == (1, 1, 3)
    assert "must be height x width x 3" in third.error()
    negative = fourth.tensors[0].as_numpy()
    assert negative.shape == restored.shape and (negative != restored).any()
    refused = Response([], types.SimpleNamespace(message=lambda: "the network has no room"))
    refusing = types.SimpleNamespace(exec=lambda: refused)
    monkeypatch.setattr(module.pb_utils, "InferenceRequest", lambda **options: refusing)
    (answer,) = model.execute(requests[:1])
    assert answer.error() == "the network has no room" and not answer.tensors


def test_the_configuration_fits_the_schema(repository: Path) -> None:
    """tritonclient carries the server's model_config.proto, compiled."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    from google.protobuf import text_format

    photos = text_format.Parse((repository / "dtpm" / "config.pbtxt").read_text(), schema.ModelConfig())
    network = text_format.Parse((repository / "dtpm_network" / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (photos.name, photos.backend, photos.max_batch_size) == ("dtpm", "python", 0)
    assert [(i.name, i.data_type, list(i.dims), i.optional) for i in photos.input] == [
        ("photo", schema.TYPE_UINT8, [-1, -1, 3], False), ("seed", schema.TYPE_INT64, [1], True),
    ]  # fmt: skip
    assert [(i.name, i.data_type, list(i.dims)) for i in [*network.input, *network.output]] == [
        ("image", schema.TYPE_FP32, [-1, 3, -1, -1]),
        ("noise", schema.TYPE_FP32, [1, 3, -1, -1]),
        ("restored", schema.TYPE_FP32, [-1, 3, -1, -1]),
    ]


def test_an_engine_as_the_network(
    repository: Path, plain_weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_cuda(Fake("11.4.0.106"), monkeypatch)
    cpu, folder = torch.device("cpu"), tmp_path / "models"
    shutil.copytree(repository, folder)
    shutil.rmtree(folder / "dtpm")
    manifest = read_manifest(repository)
    options = EngineOptions(("16x16", "2x24x40"), timing_cache=tmp_path / "cache")
    replace_graphs(folder, manifest, options, cpu, lambda stage: None)
    write_repository(folder, manifest)
    assert [path.name for path in (folder / "dtpm_network" / "1").iterdir()] == ["model.plan"]
    reference = Reference(load_model(plain_weights, 2).requires_grad_(False), manifest.steps)
    found = compare_engines(folder, manifest, reference, cpu)
    assert len(found) == 4 and all(one.max_abs <= 1e-4 for one in found)
    config = (folder / "dtpm_network" / "config.pbtxt").read_text()
    assert 'backend: "tensorrt"' in config and 'profile: [ "0", "1" ]' in config
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    from google.protobuf import text_format

    network = text_format.Parse(config, schema.ModelConfig())
    assert [(group.kind, list(group.profile)) for group in network.instance_group] == [
        (schema.ModelInstanceGroup.KIND_GPU, ["0", "1"])
    ]
    assert [(i.name, list(i.dims)) for i in network.input] == [("image", [-1, 3, -1, -1]), ("noise", [1, 3, -1, -1])]


def test_many_steps_are_refused(tmp_path: Path, plain_weights: Weights) -> None:
    with pytest.raises(UserError, match="--format triton with 50 steps"):
        export_folder(plain_weights, tmp_path / "x", kind="triton", steps=50)
    assert not list(tmp_path.iterdir())
