"""A stand-in for TensorRT that runs on the CPU: it takes the calls that the export makes, holds each against the
recorded surface of the real bindings (tensorrt_surface.json), and computes with ONNX Runtime.

A name that some recorded version lacks fails when the stand-in is defined; a call that no recorded overload takes
fails when it is made. With it comes a stand-in for the CUDA streams and graphs of PyTorch (`replace_cuda`), whose
graphs replay the recorded operations on the same memory.
"""

import ctypes
import functools
import hashlib
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto
from torch.utils._python_dispatch import TorchDispatchMode

from dtpm_fast.export.onnx_graph import in_float32
from dtpm_fast.export.ort import open_session

SURFACE = json.loads((Path(__file__).parent / "tensorrt_surface.json").read_text())
NUMPY = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.INT64: np.dtype(np.int64),
}
TYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT64: "INT64",
}


class Fake:
    """The module `tensorrt` of one version. `calls` lists what was called, as "Class.method"; `captured` is where calls
    go while a CUDA graph is captured."""

    def __init__(self, version: str, capability: str = "9.0") -> None:
        self.version, self.capability = version, capability
        self.calls: list[str] = []
        self.captured: list[Callable[[], object]] | None = None
        self.builds: list[dict] = []
        self.refuse_build = ""
        self.module = types.ModuleType("tensorrt")
        self.module.__version__ = version  # type: ignore[attr-defined]
        for kind in _classes(self):
            setattr(self.module, kind.__name__, kind)
        for name in ("BuilderFlag", "DataType", "ExecutionContextAllocationStrategy", "NetworkDefinitionCreationFlag",
                     "ProfilingVerbosity", "SerializationFlag", "TensorIOMode", "TensorLocation"):  # fmt: skip
            setattr(self.module, name, _enum(name, version))
        for name in vars(self.module):
            assert name.startswith("_") or all(name in s["module"] for s in SURFACE.values()), name


def _enum(name: str, version: str) -> Any:
    """The recorded values of this version; a value that some version lacks is not there, but for what the code asks for
    by name."""
    values = SURFACE[version]["classes"][name]["values"]
    if name == "SerializationFlag":
        return types.SimpleNamespace(**{key: Value(name, key, values[key]) for key in values})
    common = [key for key in values if all(key in s["classes"][name]["values"] for s in SURFACE.values())]
    return types.SimpleNamespace(**{key: Value(name, key, values[key]) for key in common})


class Value(int):
    def __new__(cls, kind: str, key: str, number: int) -> "Value":
        value = super().__new__(cls, number)
        value.text = f"{kind}.{key}"  # type: ignore[attr-defined]
        return value

    def __repr__(self) -> str:
        return self.text  # type: ignore[attr-defined,no-any-return]


def _takes(signature: str, count: int, keywords: set[str]) -> bool:
    """Whether a recorded overload, as "name(self: C, a: T, b: T = x) -> R", takes so many arguments and keywords."""
    inner = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    depth, parts, part = 0, [], ""
    for character in inner:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += character
    parts.append(part)
    given = [p.strip() for p in parts[1:]]  # without self
    names = [p.split(":")[0] for p in given]
    needed = sum(" = " not in p for p in given)
    return keywords <= set(names[count:]) and needed <= count + len(keywords) <= len(given)


def _held_to_the_surface(fake: Fake, kind: type) -> type:
    name = kind.__name__
    for version, recorded in SURFACE.items():
        assert name in recorded["classes"], f"TensorRT {version} has no {name}"
    known = [recorded["classes"][name] for recorded in SURFACE.values()]
    for key, member in list(vars(kind).items()):
        if key.startswith("_") and key != "__init__":
            continue
        if isinstance(member, property):
            assert all(key in r["properties"] for r in known), f"{name}.{key} is no property of every version"
        elif inspect.isfunction(member):
            assert all(key in r["methods"] for r in known), f"{name}.{key} is no method of every version"
            setattr(kind, key, _recorded(fake, name, key, member))

    def set_attribute(self: Any, key: str, value: Any) -> None:
        if type(self) is kind:  # a subclass may have attributes of its own
            assert key.startswith("_") or all(key in r["properties"] for r in known), f"{name}.{key} cannot be set"
        object.__setattr__(self, key, value)

    kind.__setattr__ = set_attribute  # type: ignore[method-assign,assignment]
    return kind


def _recorded(fake: Fake, kind: str, key: str, member: Any) -> Any:
    @functools.wraps(member)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        for version, recorded in SURFACE.items():
            overloads = recorded["classes"][kind]["methods"][key]
            assert any(_takes(overload, len(arguments), set(keywords)) for overload in overloads), (
                f"TensorRT {version}: {kind}.{key} takes {overloads}, not {len(arguments)} and {set(keywords)}"
            )
        fake.calls.append(f"{kind}.{key}")
        return member(self, *arguments, **keywords)

    return call


def _classes(fake: Fake) -> list[type]:
    class Severity:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    class ILogger:
        def __init__(self) -> None: ...

        def log(self, severity: int, msg: str) -> None: ...

    class IHostMemory:
        def __init__(self, content: bytes) -> None:
            self._content = content

        def __bytes__(self) -> bytes:
            return self._content

    class ParserError:
        def __init__(self, text: str, node: str = "", operator: str = "") -> None:
            self._text, self._node, self._operator = text, node, operator

        def desc(self) -> str:
            return self._text

        def node_name(self) -> str:
            return self._node

        def node_operator(self) -> str:
            return self._operator

    class INetworkDefinition:
        def __init__(self, flags: int) -> None:
            assert flags == 1 << int(fake.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            self._onnx = b""

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, tuple] = {}

        def set_shape(self, input: str, min: tuple, opt: tuple, max: tuple) -> None:
            self._shapes[input] = (min, opt, max)

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> IHostMemory:
            return IHostMemory(self._content)

    class IBuilderConfig:
        def __init__(self) -> None:
            self._flags = {"BuilderFlag.TF32"}
            self._profiles: list[IOptimizationProfile] = []
            self._cache: ITimingCache | None = None
            self._verbosity: Any = None

        def set_flag(self, flag: Value) -> None:
            self._flags.add(flag.text)  # type: ignore[attr-defined]

        def clear_flag(self, flag: Value) -> None:
            self._flags.discard(flag.text)  # type: ignore[attr-defined]

        @property
        def profiling_verbosity(self) -> Any:
            return self._verbosity

        @profiling_verbosity.setter
        def profiling_verbosity(self, value: Any) -> None:
            self._verbosity = value

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            for shapes in profile._shapes.values():
                if any(not 1 <= a <= b <= c for a, b, c in zip(*shapes, strict=True)):
                    return -1
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            header = f"timing {fake.version} {fake.capability}\n".encode()
            return ITimingCache(serialized_timing_cache or header)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            if not cache._content.startswith(f"timing {fake.version} {fake.capability}\n".encode()):
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> ITimingCache | None:
            return self._cache

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
            model = onnx.load_from_string(network._onnx)
            free = {v.name for v in model.graph.input if any(d.dim_param for d in v.type.tensor_type.shape.dim)}
            problem = fake.refuse_build
            if not config._profiles or any(set(p._shapes) != free for p in config._profiles):
                problem = "a dynamic input has no shapes in a profile\nand more lines"
            if problem:
                self._logger.log(fake.module.ILogger.Severity.ERROR, problem)
                return None
            profiles = [p._shapes for p in config._profiles]
            mark = hashlib.sha256(network._onnx).digest()
            known = config._cache is not None and mark in config._cache._content
            if config._cache is not None and not known:
                config._cache._content += mark
            fake.builds.append({"flags": sorted(config._flags), "profiles": profiles, "timed_before": known})
            header = {"version": fake.version, "profiles": profiles, "refit": "BuilderFlag.REFIT" in config._flags}
            return IHostMemory(json.dumps(header).encode() + b"\n" + network._onnx)

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: Any) -> None:
            self._network = network
            self._errors: list[ParserError] = []

        def parse(self, model: bytes, path: str | None = None) -> bool:
            try:
                loaded = onnx.load_from_string(model)
            except DecodeError:
                self._errors.append(ParserError("Failed to parse the model.\nsecond line"))
                return False
            foreign = [node for node in loaded.graph.node if node.op_type == "Det"]
            self._errors += [ParserError("no importer", node.name, node.op_type) for node in foreign]
            self._network._onnx = model
            return not foreign

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

    class ISerializationConfig:
        def __init__(self) -> None:
            self._flags: set[str] = set()

        def set_flag(self, flag: Any) -> bool:
            self._flags.add(repr(flag))
            return True

        def clear_flag(self, flag: Any) -> bool:
            self._flags.discard(repr(flag))
            return True

        def get_flag(self, flag: Any) -> bool:
            return repr(flag) in self._flags

    class ICudaEngine:
        def __init__(self, plan: bytes) -> None:
            header, _, self._onnx = plan.partition(b"\n")
            self._header = json.loads(header)
            self._load()

        def _load(self) -> None:
            model = onnx.load_from_string(self._onnx)
            self._types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
            self._inputs = [v.name for v in model.graph.input]
            self._shapes = {
                v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input
            }
            self._session = open_session(in_float32(_Bytes(self._onnx)), torch.device("cpu"))

        @property
        def num_io_tensors(self) -> int:
            return len(self._types)

        def get_tensor_name(self, index: int) -> str:
            return list(self._types)[index]

        def get_tensor_dtype(self, name: str) -> Any:
            return getattr(fake.module.DataType, TYPES[self._types[name]])

        def get_tensor_mode(self, name: str) -> Any:
            modes = fake.module.TensorIOMode
            return modes.INPUT if name in self._inputs else modes.OUTPUT

        def get_tensor_location(self, name: str) -> Any:
            return fake.module.TensorLocation.DEVICE

        def create_execution_context(self, strategy: Any = None) -> "IExecutionContext":
            return IExecutionContext(self)

        def create_serialization_config(self) -> ISerializationConfig:
            return ISerializationConfig()

        def serialize_with_config(self, config: ISerializationConfig) -> IHostMemory:
            keep = getattr(fake.module.SerializationFlag, "INCLUDE_REFIT", None)
            header = {**self._header, "refit": self._header["refit"] and (keep is None or config.get_flag(keep))}
            return IHostMemory(json.dumps(header).encode() + b"\n" + self._onnx)

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine, self._profile = engine, 0
            self._given: dict[str, tuple] = {}
            self._found: dict[str, tuple] = {}
            self._addresses: dict[str, int] = {}

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            assert stream_handle != 0
            self._profile = profile_index
            self._given.clear()
            return profile_index < len(self._engine._header["profiles"])

        def set_input_shape(self, name: str, shape: tuple) -> bool:
            limits = self._engine._header["profiles"][self._profile].get(name)
            if limits is None:  # no free side
                fits = list(shape) == self._engine._shapes[name]
            else:
                fits = all(low <= side <= high for low, side, high in zip(limits[0], shape, limits[2], strict=True))
            self._given[name] = tuple(shape)
            self._found.clear()
            return fits

        def infer_shapes(self) -> list[str]:
            return [name for name in self._engine._inputs if name not in self._given]

        def get_tensor_shape(self, name: str) -> tuple:
            if name in self._given:
                return self._given[name]
            if not self._found:
                zeros = {key: np.zeros(shape, self._widened(key)) for key, shape in self._given.items()}
                self._found = {key: value.shape for key, value in self._compute(zeros).items()}
            return self._found[name]

        def set_tensor_address(self, name: str, memory: int) -> bool:
            assert name in self._engine._types and memory != 0
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert stream_handle != 0, "the default stream"
            assert set(self._addresses) == set(self._engine._types) and not self.infer_shapes()
            run = functools.partial(self._execute, dict(self._addresses))
            if fake.captured is None:
                run()
            else:
                fake.captured.append(run)
            return True

        def _execute(self, addresses: dict[str, int]) -> None:
            given = {key: self._memory(key, addresses).astype(self._widened(key)) for key in self._engine._inputs}
            for key, value in self._compute(given).items():
                self._memory(key, addresses)[...] = value

        def _memory(self, name: str, addresses: dict[str, int]) -> np.ndarray:
            kind, shape = NUMPY[self._engine._types[name]], self.get_tensor_shape(name)
            size = int(np.prod(shape)) * kind.itemsize
            buffer = (ctypes.c_char * size).from_address(addresses[name])
            return np.frombuffer(buffer, kind).reshape(shape)

        def _widened(self, name: str) -> np.dtype:
            kind = NUMPY[self._engine._types[name]]
            return kind if kind == np.int64 else np.dtype(np.float32)

        def _compute(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            names = [name for name in self._engine._types if name not in self._engine._inputs]
            return dict(zip(names, self._engine._session.run(names, given), strict=True))

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            try:
                engine = ICudaEngine(serialized_engine)
                fits = engine._header["version"] == fake.version
            except ValueError:
                fits = False
            if not fits:
                self._logger.log(fake.module.ILogger.Severity.ERROR, "The engine plan file is not compatible")
                return None
            return engine

    class Refitter:
        def __init__(self, engine: ICudaEngine, logger: Any) -> None:
            self._engine, self._new, self._missing = engine, b"", []

        def get_missing_weights(self) -> list[str]:
            return self._missing

        def refit_cuda_engine(self) -> bool:
            self._engine._onnx = self._new
            self._engine._load()
            return bool(self._engine._header["refit"])

    class OnnxParserRefitter:
        def __init__(self, refitter: Refitter, logger: Any) -> None:
            self._refitter = refitter
            self._errors: list[ParserError] = []

        def refit_from_bytes(self, model: bytes, path: str | None = None) -> bool:
            old, new = onnx.load_from_string(self._refitter._engine._onnx), onnx.load_from_string(model)
            shapes = [{t.name: tuple(t.dims) for t in m.graph.initializer} for m in (old, new)]
            if shapes[0] != shapes[1]:
                self._errors.append(ParserError("Failed to refit all the weights."))
            self._refitter._new = model
            return not self._errors

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

    kinds = [
        ILogger, IHostMemory, ParserError, IOptimizationProfile, ITimingCache, IBuilderConfig,
        Builder, OnnxParser, ISerializationConfig, ICudaEngine, IExecutionContext, Runtime, Refitter,
        OnnxParserRefitter,
    ]  # fmt: skip
    made_by_others = (IHostMemory, ParserError, IOptimizationProfile, ITimingCache, IBuilderConfig,
                      ISerializationConfig, ICudaEngine, IExecutionContext)  # fmt: skip
    for kind in kinds:
        init = vars(kind)["__init__"]
        if kind in made_by_others:  # the bindings have no constructor
            del kind.__init__  # type: ignore[misc]
        _held_to_the_surface(fake, kind)
        if kind in made_by_others:
            kind.__init__ = init  # type: ignore[misc]
    ILogger.Severity = Severity  # type: ignore[attr-defined]
    return kinds


class _Bytes:
    """What `onnx.load` takes for a file: the graph is in memory."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self) -> bytes:
        return self._content


class Recorder(TorchDispatchMode):
    """Runs PyTorch's operations and keeps them, with the tensors that they were given, for a replay."""

    def __init__(self, kept: list[Callable[[], object]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kept.append(functools.partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


class Graph:
    def __init__(self) -> None:
        self.kept: list[Callable[[], object]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for operation in self.kept:
            operation()


class Stream:
    def __init__(self, device: object = None, handle: int = 7) -> None:
        self.cuda_stream = handle

    def wait_stream(self, other: "Stream") -> None: ...

    def synchronize(self) -> None: ...


def replace_cuda(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Let code for a CUDA device run on the CPU, with `fake` as TensorRT. Returns the list of the graphs captured."""
    stack = [Stream(handle=0)]
    graphs: list[Graph] = []

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        stack.append(stream)
        yield
        stack.pop()

    @contextmanager
    def capture(graph: Graph, stream: Stream, capture_error_mode: str = "global") -> Iterator[None]:
        fake.captured = graph.kept
        with on(stream), Recorder(graph.kept):
            yield
        fake.captured = None
        graphs.append(graph)

    major, minor = fake.capability.split(".")
    replaced = {
        "Stream": Stream, "stream": on, "device": lambda device: nullcontext(), "graph": capture, "CUDAGraph": Graph,
        "current_stream": lambda device=None: stack[-1], "synchronize": lambda device=None: None,
        "get_device_capability": lambda device=None: (int(major), int(minor)),
        "get_device_name": lambda device=None: "Stand-in",
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    for module in ("tensorrt_export", "tensorrt_stepper"):
        monkeypatch.setattr(f"dtpm_fast.export.{module}.require_cuda", lambda device: None)
    return graphs
