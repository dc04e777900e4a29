"""ONNX files from the graphs: opset 18 (22 with bfloat16), standard operators, named dynamic sides, one file each."""

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from dtpm_fast.errors import UserError
from dtpm_fast.export.manifest import DTYPES, TensorSpec
from dtpm_fast.export.onnx_trace import TYPES, trace

OPSET = 18
# The first version whose Conv takes bfloat16. For the operators in these graphs the versions between add types and
# optional attributes only, so that the number is all that changes.
OPSET_BFLOAT16 = 22
IR = 10  # the format's version: what opset 22 needs, and runtimes since 2024 read
LARGEST = (1 << 31) - (1 << 24)  # bytes of weights: protobuf's limit, less room for the graph itself


def write_onnx(
    module: nn.Module,
    inputs: dict[str, Tensor],
    input_specs: Sequence[TensorSpec],
    output_specs: Sequence[TensorSpec],
    file: Path,
) -> None:
    """Write `module` as it would run on `inputs` to `file`. The specs name the tensors and their sides. The result has
    passed onnx.checker and ONNX's shape inference in strict mode."""
    try:
        import onnx
        from onnx import helper
    except ImportError as error:
        raise UserError(f"ONNX export needs the extra: pip install 'dtpm-fast[export]' ({error})") from error
    traced = trace(module, inputs, [spec.name for spec in output_specs])
    if sum(value.nbytes for value in traced.weights.values()) > LARGEST:
        raise UserError(f"{file.name}: would be larger than the 2 GiB that an ONNX file can be; try --precision fp16")
    bfloat16 = any(value.dtype == torch.bfloat16 for value in traced.weights.values())
    opset = helper.make_opsetid("", OPSET_BFLOAT16 if bfloat16 else OPSET)
    inputs_info, outputs_info = (
        [helper.make_tensor_value_info(spec.name, TYPES[DTYPES[spec.dtype]], spec.shape) for spec in given]
        for given in (input_specs, output_specs)
    )
    graph = helper.make_graph(traced.nodes, file.stem, inputs_info, outputs_info)
    model = helper.make_model(
        graph,
        opset_imports=[opset],
        ir_version=IR,
        producer_name="dtpm-fast",
        producer_version=metadata.version("dtpm-fast"),
    )
    with file.open("wb") as stream:
        write_model(model, traced.weights, stream)
    del traced, model, graph  # the checker reads the file: one copy at a time
    onnx.checker.check_model(str(file), full_check=True)


def write_model(model: Any, weights: dict[str, Tensor], stream: BinaryIO) -> None:
    """`model` with `weights` as its initializers, in protobuf's wire format, a tensor at a time: with the message built
    whole, a network would be in memory three times."""
    from onnx import TensorProto

    head, body = type(model)(), model.graph.SerializeToString()
    head.CopyFrom(model)
    head.ClearField("graph")
    protos = ((TensorProto(name=name, data_type=TYPES[w.dtype], dims=w.shape), w) for name, w in weights.items())
    tensors = [(proto.SerializeToString(), weight) for proto, weight in protos]
    # Fields 5 of GraphProto (initializer) and 9 of TensorProto (raw_data), both of wire type 2: bytes behind a length.
    lengths = [len(start) + len(field_start(9, w.nbytes)) + w.nbytes for start, w in tensors]
    length = len(body) + sum(len(field_start(5, n)) + n for n in lengths)
    stream.write(head.SerializeToString() + field_start(7, length) + body)
    for n, (start, weight) in zip(lengths, tensors, strict=True):
        stream.write(field_start(5, n) + start + field_start(9, weight.nbytes))
        stream.write(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def field_start(number: int, length: int) -> bytes:
    """The start of a protobuf field of bytes: number and wire type, and the length as a varint."""
    found, value = bytearray([number << 3 | 2]), length
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


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
