"""Layer by layer: what an engine computes against the same graph in float32, to see where 16 bits go wrong.

The graph's intermediate maps become outputs, so that this engine fuses less than the one that is shipped: a fault shows
here when it lies in a layer, and not when it lies in a fusion. The reference is ONNX Runtime on the CPU; the graph in
it has been compared with the PyTorch model before.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dtpm_fast.export.manifest import Manifest
from dtpm_fast.export.onnx_graph import in_float32
from dtpm_fast.export.ort import open_session
from dtpm_fast.export.tensorrt_buckets import Bucket
from dtpm_fast.export.tensorrt_build import BuildSettings, build_engine
from dtpm_fast.export.tensorrt_engine import Engine, run_once
from dtpm_fast.runtime.noise import noise_fields

NAME = "layers.json"
# What is worth a row: where numbers are summed up, and where branches meet.
OPERATORS = ("Conv", "Gemm", "MatMul", "LayerNormalization", "ReduceMean", "DepthToSpace", "Add", "Mul", "Div")


@dataclass(frozen=True)
class Layer:
    """One map. `peak`: the reference's largest magnitude; `max_abs`: the largest difference; `snr_db`: signal to error,
    None where the engine's values are not all finite."""

    graph: str
    name: str
    operator: str
    shape: tuple[int, ...]
    peak: float
    max_abs: float | None
    snr_db: float | None

    @property
    def rank(self) -> float:
        """Low where the error is large; lowest where values are not finite."""
        return -math.inf if self.snr_db is None else self.snr_db

    def __str__(self) -> str:
        found = "NaN or infinity" if self.snr_db is None else f"max difference {self.max_abs:.2e}, {self.snr_db:.1f} dB"
        return f"{self.graph:8} {self.operator:20} {self.name:32} peak {self.peak:9.2e}   {found}"


def compare_layers(folder: Path, manifest: Manifest, timing_cache: Path | None, device: torch.device) -> list[Layer]:
    """Every map of the folder's ONNX graphs, in the order in which they are computed."""
    m = manifest.multiple
    size = Bucket(1, 8 * m, 8 * m)
    settings = BuildSettings((size,), refit=False, timing_cache=timing_cache)
    image = torch.rand(1, 3, size.height, size.width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image[..., : size.width // 4] = image[..., : size.width // 4].sign()
    noise = noise_fields(0, size.height, size.width, manifest.noise_fields)
    given = {
        "image": image, "noise": noise, "x": noise[:1], "previous": torch.zeros_like(image),
        "index": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    found: list[Layer] = []
    for name, graph in manifest.graphs.items():
        with tempfile.TemporaryDirectory() as temporary:
            opened = Path(temporary) / "graph.onnx"
            operators = _write_opened(folder / graph.file, opened, [spec.name for spec in graph.outputs])
            session = open_session(in_float32(opened), torch.device("cpu"))
            inputs = [spec.name for spec in graph.inputs]
            names = list(operators)
            values = session.run(names, {key: given[key].numpy() for key in inputs})
            expected = {key: torch.from_numpy(value) for key, value in zip(names, values, strict=True)}
            engine = Engine(build_engine(opened.read_bytes(), f"{name} with every layer", graph, m, settings), name)
        got = run_once(engine, 0, given, device)
        found += [layer_of(name, key, operators[key], expected[key], got[key]) for key in names]
        given.update({spec.name: expected[spec.name] for spec in graph.outputs})
    return found


def write_layers(folder: Path, layers: Iterable[Layer]) -> None:
    rows = ",\n".join(json.dumps(dataclasses.asdict(layer)) for layer in layers)
    (folder / NAME).write_text(f"[\n{rows}\n]\n")


def read_layers(folder: Path) -> list[Layer]:
    """What `write_layers` wrote."""
    rows = json.loads((folder / NAME).read_text())
    return [Layer(**{**row, "shape": tuple(row["shape"])}) for row in rows]


def _write_opened(source: Path, target: Path, outputs: list[str]) -> dict[str, str]:
    """The graph with every float map of `OPERATORS` as an output; returns the operators of all outputs, in
    the order in which they are computed."""
    import onnx
    from onnx import TensorProto

    model = onnx.load(source)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {value.name: value for value in inferred.graph.value_info}
    operators = {}
    for node in model.graph.node:
        name = node.output[0]
        if name in outputs:
            operators[name] = node.op_type
        elif node.op_type in OPERATORS and name in types:
            kind = types[name].type.tensor_type.elem_type
            if kind in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
                model.graph.output.append(types[name])
                operators[name] = node.op_type
    target.write_bytes(model.SerializeToString())
    return operators


def layer_of(graph: str, name: str, operator: str, expected: Tensor, got: Tensor) -> Layer:
    """One row from the reference's values and the engine's."""
    reference, value = expected.double(), got.cpu().double()
    peak = float(reference.abs().max())
    if not bool(value.isfinite().all()):
        return Layer(graph, name, operator, tuple(got.shape), peak, None, None)
    error = value - reference
    noise, signal = float(error.square().sum()), float(reference.square().sum())
    snr = 999.0 if noise == 0 else 10 * math.log10(max(signal, 1e-30) / noise)
    return Layer(graph, name, operator, tuple(got.shape), peak, float(error.abs().max()), snr)
