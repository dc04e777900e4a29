"""A module's forward, called with `Node` instead of tensors, written down as ONNX operators.

PyTorch hands every operation on a `Node` to `Node.__torch_function__` (its documented protocol for classes like
tensors), and a writer of the operation's name adds the ONNX nodes: a graph is as long as its module's code and is made
in milliseconds, where `torch.onnx.export` traces, decomposes and rewrites for a minute. An operation without a writer
is a `TypeError` that names it. Beside its name a `Node` holds an example on the meta device, on which the operation
is run for type and rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from onnx import NodeProto

# torch's dtypes as ONNX's TensorProto numbers.
TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}


class Node:
    """A value of the graph. The side 1 of maps (the channels) is a number, `size` of another side is a `Node`."""

    def __init__(self, graph: Trace, name: str, example: Any) -> None:
        self.graph, self.name, self.example = graph, name, example

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        graph = next(value.graph for value in _flat(args) if isinstance(value, Node))
        return graph.call(function.__name__, function, args, kwargs)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Methods of a tensor."""
        if name not in WRITERS:
            raise AttributeError(f"{name}: no part of the exported graphs")
        return lambda *args, **kwargs: self.graph.call(name, getattr(Tensor, name), (self, *args), kwargs)

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.example)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def size(self, dim: int) -> int | Node:
        if dim == 1:
            return int(self.example.shape[1])
        shape = self.graph.add("Shape", [self.name])
        return Node(
            self.graph, self.graph.add("Gather", [shape, self.graph.scalar(dim, torch.int64)]), self.example.shape[dim]
        )

    def __add__(self, other: Any) -> Any:
        return self.graph.call("add", torch.add, (self, other))

    def __sub__(self, other: Any) -> Any:
        return self.graph.call("sub", torch.sub, (self, other))

    def __rsub__(self, other: Any) -> Any:
        return self.graph.call("sub", torch.sub, (other, self))

    def __mul__(self, other: Any) -> Any:
        return self.graph.call("mul", torch.mul, (self, other))

    def __truediv__(self, other: Any) -> Any:
        return self.graph.call("div", torch.div, (self, other))

    def __neg__(self) -> Any:
        return self.graph.call("neg", torch.neg, (self,))

    def __getitem__(self, index: Any) -> Any:
        return self.graph.call("__getitem__", Tensor.__getitem__, (self, index))

    __radd__, __rmul__ = __add__, __mul__


class Trace:
    """The nodes of one graph, and its constants: `weights` by name, in the order of their first use."""

    def __init__(self, module: nn.Module) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, Tensor] = {}
        self._names = {id(value): name for name, value in [*module.named_buffers(), *module.named_parameters()]}
        self._constants: dict[Any, str] = {}
        self._kept: list[Tensor] = []  # what `_names` and `_constants` know by identity must not be freed
        self._count = 0

    def call(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation on the examples, and write it."""
        if name not in WRITERS:
            raise TypeError(f"{name}: no ONNX form is written down for this operation (WRITERS in onnx_trace.py)")
        kwargs = kwargs or {}
        example = _examples(function(*_examples(args), **{key: _examples(value) for key, value in kwargs.items()}))
        written = WRITERS[name](self, example, *args, **kwargs)
        if isinstance(written, list):
            return tuple(Node(self, one, part) for one, part in zip(written, example, strict=True))
        return Node(self, written, example)

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node with one output; returns its name."""
        return self.add_many(operator, inputs, 1, **attributes)[0]

    def add_many(self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Append a node; returns the names of its outputs."""
        from onnx import helper

        self._count += 1
        name = f"{operator}_{self._count}"
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, name, **attributes))
        return names

    def name(self, value: Any, dtype: torch.dtype) -> str:
        """The name of an operand in the given type: a node's, cast if need be, a constant's or a weight's."""
        if isinstance(value, Node):
            return value.name if value.dtype == dtype else self.cast(value.name, dtype)
        if not isinstance(value, Tensor):
            return self.scalar(value, dtype)
        key = (id(value), dtype)
        if key not in self._constants:
            self._kept.append(value)
            known = self._names.get(id(value)) if value.dtype == dtype else None
            self._constants[key] = self._weight(known, value.to(dtype))
        return self._constants[key]

    def cast(self, name: str, dtype: torch.dtype) -> str:
        return self.add("Cast", [name], to=TYPES[dtype])

    def scalar(self, value: float, dtype: torch.dtype) -> str:
        """A constant without sides."""
        return self._small(torch.tensor(value, dtype=dtype))

    def integers(self, values: Sequence[int]) -> str:
        """A constant of int64."""
        return self._small(torch.tensor(values, dtype=torch.int64))

    def ones(self, count: int) -> str:
        return self._small(torch.ones(count))

    def _small(self, value: Tensor) -> str:
        key = (value.dtype, value.ndim, tuple(value.flatten().tolist()))
        if key not in self._constants:
            self._constants[key] = self._weight(None, value)
        return self._constants[key]

    def _weight(self, name: str | None, value: Tensor) -> str:
        name = name or f"constant_{len(self.weights)}"
        self.weights[name] = value
        return name


def trace(module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str]) -> Trace:
    """Call `module` with one `Node` for each of `inputs` and name what it returns `outputs`. Of the inputs types, ranks
    and channels count; values and other sides do not."""
    graph = Trace(module)
    with torch.no_grad():
        returned = module(*(Node(graph, name, value.to("meta")) for name, value in inputs.items()))
    returned = returned if isinstance(returned, tuple) else (returned,)
    renamed = {node.name: name for node, name in zip(returned, outputs, strict=True)}
    assert len(renamed) == len(outputs), "two outputs are one value"
    assert not renamed.keys() & inputs.keys(), "an output that is an input is no output for some runtimes"
    for node in graph.nodes:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    return graph


def _flat(values: Any) -> list[Any]:
    if isinstance(values, list | tuple):
        return [one for value in values for one in _flat(value)]
    return [values]


def _examples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_examples(one) for one in value)
    if isinstance(value, Node):
        return value.example
    return value.to("meta") if isinstance(value, Tensor) else value


def _dtype(example: Any) -> torch.dtype:
    return example.dtype if isinstance(example, Tensor) else torch.int64


# One writer for each operation. It takes the graph, the operation's result on the examples, and the operation's own
# arguments; it returns the name of the result, or a list of names.


def _elementwise(operator: str) -> Callable[..., str]:
    def write(graph: Trace, example: Tensor, *operands: Any) -> str:
        return graph.add(operator, [graph.name(value, example.dtype) for value in operands])

    return write


def _activation(operator: str, **attributes: float) -> Callable[..., str]:
    def write(graph: Trace, example: Tensor, x: Node, inplace: bool = False) -> str:
        return graph.add(operator, [x.name], **attributes)

    return write


def _conv2d(
    graph: Trace, example: Tensor, x: Node, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> str:  # fmt: skip
    inputs = [x.name, *(graph.name(value, example.dtype) for value in (weight, bias) if value is not None)]
    sides = {"strides": _pair(stride), "pads": 2 * _pair(padding), "dilations": _pair(dilation)}
    return graph.add("Conv", inputs, group=groups, kernel_shape=list(weight.shape[2:]), **sides)


def _max_pool2d(
    graph: Trace, example: Tensor, x: Node, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> str:  # fmt: skip
    sides = {"strides": _pair(stride or kernel_size), "pads": 2 * _pair(padding), "dilations": _pair(dilation)}
    return graph.add("MaxPool", [x.name], kernel_shape=_pair(kernel_size), ceil_mode=int(ceil_mode), **sides)


def _adaptive_avg_pool2d(graph: Trace, example: Tensor, x: Node, output_size: Any) -> str:
    if _pair(output_size) != [1, 1]:
        raise TypeError(f"adaptive_avg_pool2d to {output_size}: written down for 1x1 alone")
    return _mean(graph, example, x, (2, 3), keepdim=True)


def _linear(graph: Trace, example: Tensor, x: Node, weight: Tensor, bias: Tensor | None = None) -> str:
    inputs = [x.name, *(graph.name(value, example.dtype) for value in (weight, bias) if value is not None)]
    return graph.add("Gemm", inputs, transB=1)


def _layer_norm(
    graph: Trace, example: Tensor, x: Node, normalized_shape: Sequence[int], weight: None = None, bias: None = None,
    eps: float = 1e-5,
) -> str:  # fmt: skip
    (channels,) = normalized_shape
    assert weight is None and bias is None, "affine layer norms are folded before"
    return str(
        graph.add("LayerNormalization", [graph.name(x, torch.float32), graph.ones(channels)], axis=-1, epsilon=eps)
    )


def _mean(graph: Trace, example: Tensor, x: Node, dim: Sequence[int], keepdim: bool = False) -> str:
    return graph.add("ReduceMean", [x.name, graph.integers(dim)], keepdims=int(keepdim))


def _sum(graph: Trace, example: Tensor, x: Node, dim: int, keepdim: bool = False) -> str:
    return graph.add("ReduceSum", [x.name, graph.integers([dim])], keepdims=int(keepdim))


def _clamp(graph: Trace, example: Tensor, x: Node, min: float | None = None, max: float | None = None) -> str:
    bounds = ["" if bound is None else graph.scalar(bound, example.dtype) for bound in (min, max)]
    return graph.add("Clip", [x.name, *bounds])


def _to(graph: Trace, example: Tensor, x: Node, dtype: torch.dtype | None = None) -> str:
    return x.name if example.dtype == x.dtype else graph.cast(x.name, example.dtype)


def _permute(graph: Trace, example: Tensor, x: Node, *dims: int) -> str:
    return graph.add("Transpose", [x.name], perm=dims)


def _transpose(graph: Trace, example: Tensor, x: Node, dim0: int, dim1: int) -> str:
    order = list(range(x.example.ndim))
    order[dim0], order[dim1] = dim1, dim0
    return _permute(graph, example, x, *order)


def _split(graph: Trace, example: Any, x: Node, sizes: Sequence[int], dim: int = 0) -> list[str]:
    return graph.add_many("Split", [x.name, graph.integers(sizes)], len(sizes), axis=dim)


def _chunk(graph: Trace, example: Sequence[Tensor], x: Node, chunks: int, dim: int = 0) -> list[str]:
    return _split(graph, example, x, [part.shape[dim] for part in example], dim)


def _cat(graph: Trace, example: Tensor, parts: Sequence[Any], dim: int = 0) -> str:
    return graph.add("Concat", [graph.name(part, example.dtype) for part in parts], axis=dim)


def _pixel_shuffle(graph: Trace, example: Tensor, x: Node, factor: int) -> str:
    # ONNX Runtime has no DepthToSpace in bfloat16, on no device; float32 moves the same values.
    wide = torch.float32 if example.dtype == torch.bfloat16 else example.dtype
    shuffled = graph.add("DepthToSpace", [graph.name(x, wide)], blocksize=factor, mode="CRD")
    return shuffled if wide == example.dtype else graph.cast(shuffled, example.dtype)


def _expand_as(graph: Trace, example: Tensor, x: Node, other: Node) -> str:
    return graph.add("Expand", [x.name, graph.add("Shape", [other.name])])


def _filled(value: float) -> Callable[..., str]:
    def write(graph: Trace, example: Tensor, like: Node) -> str:
        return graph.add("Expand", [graph.scalar(value, example.dtype), graph.add("Shape", [like.name])])

    return write


def _arange(graph: Trace, example: Tensor, end: Node, dtype: torch.dtype = torch.int64, device: Any = None) -> str:
    zero, one = (graph.scalar(value, torch.int64) for value in (0, 1))
    numbers = graph.add("Range", [zero, end.name, one])
    return numbers if dtype == torch.int64 else graph.cast(numbers, dtype)


def _index_select(graph: Trace, example: Tensor, x: Any, dim: int, index: Node) -> str:
    return graph.add("Gather", [graph.name(x, example.dtype), index.name], axis=dim)


def _getitem(graph: Trace, example: Tensor, x: Node, index: Any) -> str:
    """Slices first, then single numbers, from the last side to the first, then new sides."""
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        raise TypeError("an index with ...: no ONNX form is written down")
    sides = [item for item in items if item is not None]
    slices = {side: item for side, item in enumerate(sides) if isinstance(item, slice) and item != slice(None)}
    name = x.name
    if slices:
        assert all(item.step in (None, 1) for item in slices.values()), "a slice with a step"
        starts = [item.start or 0 for item in slices.values()]
        ends = [2**63 - 1 if item.stop is None else item.stop for item in slices.values()]
        name = graph.add("Slice", [name, *(graph.integers(numbers) for numbers in (starts, ends, list(slices)))])
    for side in reversed(range(len(sides))):
        if isinstance(sides[side], int):
            name = graph.add("Gather", [name, graph.scalar(sides[side], torch.int64)], axis=side)
    left = [item for item in items if not isinstance(item, int)]
    new = [side for side, item in enumerate(left) if item is None]
    return graph.add("Unsqueeze", [name, graph.integers(new)]) if new else name


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


WRITERS: dict[str, Callable[..., Any]] = {
    "__getitem__": _getitem,
    "abs": _elementwise("Abs"),
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "add": _elementwise("Add"),
    "arange": _arange,
    "cat": _cat,
    "chunk": _chunk,
    "clamp": _clamp,
    "conv2d": _conv2d,
    "div": _elementwise("Div"),
    "expand_as": _expand_as,
    "float": _to,
    "hardsigmoid": _activation("HardSigmoid", alpha=1 / 6, beta=0.5),
    "hardswish": _activation("HardSwish"),
    "index_select": _index_select,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _elementwise("MatMul"),
    "max_pool2d": _max_pool2d,
    "maximum": _elementwise("Max"),
    "mean": _mean,
    "minimum": _elementwise("Min"),
    "mul": _elementwise("Mul"),
    "neg": _elementwise("Neg"),
    "ones_like": _filled(1.0),
    "permute": _permute,
    "pixel_shuffle": _pixel_shuffle,
    "relu": _activation("Relu"),
    "split": _split,
    "sub": _elementwise("Sub"),
    "sum": _sum,
    "to": _to,
    "transpose": _transpose,
    "zeros_like": _filled(0.0),
}
