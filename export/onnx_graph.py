"""ONNX files from the graphs: opset 18 (22 with bfloat16), standard operators, named dynamic sides, one file each."""

import gc
import hashlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtpm_fast.errors import UserError
from dtpm_fast.export.manifest import TensorSpec

OPSET = 18
# The first version whose Conv takes bfloat16. For the operators in these graphs the versions between add types and
# optional attributes only, so that the number is all that changes.
OPSET_BFLOAT16 = 22
LARGEST = (1 << 31) - (1 << 24)  # bytes of weights: protobuf's limit, less room for the graph itself


def write_onnx(
    module: nn.Module,
    inputs: Sequence[Tensor],
    dynamic: Any,
    input_specs: Sequence[TensorSpec],
    output_specs: Sequence[TensorSpec],
    file: Path,
) -> None:
    """Export `module` called with `inputs` to `file`; `dynamic` as `torch.export` takes it. The specs name the tensors
    and their sides. The result has passed onnx.checker and ONNX's shape inference in strict mode."""
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise UserError(f"ONNX export needs the extra: pip install 'dtpm-fast[export]' ({error})") from error
    model = _converted(
        module, inputs, dynamic, [[spec.name for spec in given] for given in (input_specs, output_specs)]
    )
    gc.collect()  # the exporter's programs hold each other in cycles, and through them copies of weights
    # The exporter notes its Python stack at every node: the paths of this machine, and megabytes.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:], model.graph.value_info[:]
    for value, spec in zip([*model.graph.input, *model.graph.output], [*input_specs, *output_specs], strict=True):
        del value.metadata_props[:]
        for dim, side in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            dim.Clear()
            if isinstance(side, str):
                dim.dim_param = side
            else:
                dim.dim_value = side
    if any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer):
        model.opset_import[0].version = OPSET_BFLOAT16
    foreign = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    if foreign or model.functions:
        raise UserError(f"{file.name}: holds operators outside the ONNX standard ({', '.join(foreign)})")
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST:
        raise UserError(f"{file.name}: would be larger than the 2 GiB that an ONNX file can be; try --precision fp16")
    file.write_bytes(model.SerializeToString())
    del model  # the checker reads the file: one copy at a time
    onnx.checker.check_model(str(file), full_check=True)


def _converted(module: nn.Module, inputs: Sequence[Tensor], dynamic: Any, names: list[list[str]]) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter's own deprecations and notes on its optimiser: nothing that a user could act on.
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=dynamic, strict=False)
        exported = torch.onnx.export(
            program, (), input_names=names[0], output_names=names[1], dynamo=True, opset_version=OPSET, verbose=False
        )
    assert exported is not None
    return exported.model_proto


def structure(file: Path) -> str:
    """SHA-256 of a graph without the values of its floating-point weights: two graphs that share it differ in their
    weights alone."""
    import onnx
    from onnx import TensorProto

    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            for values in ("raw_data", "float_data", "int32_data"):
                tensor.ClearField(values)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def in_float32(file: Path) -> bytes:
    """The same graph with every 16-bit type replaced by float32 (weights keep their rounded values): for runtimes that
    lack bfloat16 operators, ONNX Runtime on the CPU among them."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(file)
    narrow = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for tensor in model.graph.initializer:
        if tensor.data_type in narrow:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
                attribute.i = TensorProto.FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in narrow:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype("float32")))
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]
    content: bytes = model.SerializeToString()
    return content
