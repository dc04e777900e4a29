"""The exported graphs against what TensorRT's ONNX parser documents: operators, types, opset and restrictions."""

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from dtpm_fast.export.exporter import export_folder
from dtpm_fast.weights_file import Weights

DOCUMENTED = json.loads((Path(__file__).parent / "tensorrt_operators.json").read_text())
NAMES = {
    TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16", TensorProto.BFLOAT16: "BF16", TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64", TensorProto.BOOL: "BOOL",
}  # fmt: skip
INDICES = "INT64"  # shapes, axes and indices: of every operator that takes them


def problems(model: onnx.ModelProto) -> list[str]:
    """What in a graph the documentation does not promise."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*inferred.value_info, *inferred.input, *inferred.output]}
    constants = {tensor.name for tensor in model.graph.initializer}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    low, high = DOCUMENTED["opsets"]
    found = [f"opset {o.version}" for o in model.opset_import if not low <= o.version <= high]
    for node in model.graph.node:
        rule = DOCUMENTED["operators"].get(node.op_type)
        if rule is None:
            found.append(f"{node.op_type}: not supported")
            continue
        values = [name for name in (node.input[0], *node.output) if name]
        types = {NAMES.get(kinds[name], str(kinds[name])) for name in values}
        found += [f"{node.op_type} of {kind}" for kind in types - set(rule["types"])]
        others = {NAMES.get(kinds[name], str(kinds[name])) for name in node.input[1:] if name}
        found += [f"{node.op_type} with {kind}" for kind in others - set(rule["types"]) - {INDICES}]
        # Strongly typed: no operator casts for itself. Both sides of an operation have one type.
        floats = (types | others) - {INDICES}
        if node.op_type not in ("Cast", "Shape", "Gather") and len(floats) > 1:
            found.append(f"{node.op_type} mixes {sorted(floats)}")
        fixed = rule.get("constant_input")
        if fixed is not None and not constants.issuperset(node.input[fixed:]):
            found.append(f"{node.op_type} {node.name}: its input {fixed} is not constant")
        if node.op_type == "LayerNormalization" and any(node.output[1:]):
            found.append("LayerNormalization: a second output")
    return found


def test_float32_with_everything(full_export: Path) -> None:
    for name in ("prepare", "step"):
        model = onnx.load(full_export / f"{name}.onnx")
        assert len(model.graph.node) > 200
        assert problems(model) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits(tmp_path: Path, full_weights: Weights, precision: str) -> None:
    """The unrolled graph as well, which is what a server runs."""
    export_folder(full_weights, tmp_path / "x", steps=1, precision=precision, unrolled=True)
    for name in ("prepare", "step", "restore"):
        assert problems(onnx.load(tmp_path / "x" / f"{name}.onnx")) == []


def test_the_check_can_fail(full_export: Path) -> None:
    model = onnx.load(full_export / "step.onnx")
    mean = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    mean.input[1] = "index"
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    norm.output.append("second")
    model.opset_import[0].version = 18
    found = problems(model)
    assert (
        any("ReduceMean" in p and "not constant" in p for p in found) and "LayerNormalization: a second output" in found
    )
    model = onnx.load(full_export / "step.onnx")
    next(node for node in model.graph.node if node.op_type == "Neg").op_type = "Floor"
    assert problems(model) == ["Floor: not supported"]
