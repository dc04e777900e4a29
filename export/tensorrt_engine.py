"""A built engine, loaded: its tensors, and contexts that run it on PyTorch's tensors and streams."""

import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.export.tensorrt_api import listener, tensorrt


class Engine:
    """A deserialised plan. `inputs` and `outputs` are its tensors by name with their types.

    Raises `UserError` when TensorRT cannot load it. A plan is native code: load only engines that you built yourself.
    """

    def __init__(self, plan: bytes, name: str) -> None:
        self.trt, self.name = tensorrt(), name
        trt = self.trt
        log = listener(trt)
        self.runtime = trt.Runtime(log)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise UserError(f"{name}: TensorRT {trt.__version__} cannot load the engine ({log.cause})")
        dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
        }
        self.inputs: dict[str, torch.dtype] = {}
        self.outputs: dict[str, torch.dtype] = {}
        for i in range(self.engine.num_io_tensors):
            tensor = self.engine.get_tensor_name(i)
            kind = self.engine.get_tensor_dtype(tensor)
            on_gpu = self.engine.get_tensor_location(tensor) == trt.TensorLocation.DEVICE
            if kind not in dtypes or not on_gpu:
                raise UserError(f"{name}: the tensor {tensor} ({kind}) is none that a graph of this package has")
            to = self.inputs if self.engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT else self.outputs
            to[tensor] = dtypes[kind]

    def serialize(self) -> bytes:
        """As a plan with all weights, which can be exchanged again where they could before."""
        config = self.engine.create_serialization_config()
        config.clear_flag(self.trt.SerializationFlag.EXCLUDE_WEIGHTS)
        keep = getattr(self.trt.SerializationFlag, "INCLUDE_REFIT", None)  # before 10.14 a matter of course
        if keep is not None:
            config.set_flag(keep)
        return bytes(self.engine.serialize_with_config(config))


class NoRoom(UserError):
    """The GPU's memory does not hold an engine's context."""


class Context:
    """An engine at one shape: the profile and the shapes are set once, then it runs as often as asked.

    shapes: of the inputs, by name. stream: on which the profile is chosen, a raw handle. Raises `UserError` for shapes
    outside the profile.
    """

    def __init__(self, engine: Engine, profile: int, shapes: dict[str, tuple[int, ...]], stream: int) -> None:
        trt = engine.trt
        self.engine, log = engine, listener(trt)
        # Memory for this profile alone: by default a context takes what the largest profile needs.
        self.context = engine.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
        if self.context is None or not self.context.set_optimization_profile_async(profile, stream):
            raise NoRoom(f"{engine.name}: no room on the GPU to run the engine ({log.cause})")
        fits = all(self.context.set_input_shape(name, shapes[name]) for name in engine.inputs)
        if not fits or list(self.context.infer_shapes()):
            raise UserError(f"{engine.name}: the shapes do not fit the engine's profile {profile} ({log.cause})")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, an output's among them."""
        return tuple(self.context.get_tensor_shape(name))

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Where inputs are read and outputs written, all of them. The tensors must outlive the runs."""
        for name, dtype in {**self.engine.inputs, **self.engine.outputs}.items():
            tensor = tensors[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != self.shape(name) or not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous {dtype} of {self.shape(name)}, got {tensor.shape}")
            self.context.set_tensor_address(name, tensor.data_ptr())

    def run(self, stream: int) -> None:
        """Enqueue on a stream, not the default one: there TensorRT would synchronise the whole device."""
        log = listener(self.engine.trt)
        if not self.context.execute_async_v3(stream):
            raise UserError(f"{self.engine.name}: TensorRT failed while running ({log.cause})")


def run_once(engine: Engine, profile: int, given: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """All outputs for the given inputs, which are brought to the device and to the engine's types."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            tensors = {key: given[key].to(device, dtype).contiguous() for key, dtype in engine.inputs.items()}
            shapes = {key: tuple(value.shape) for key, value in tensors.items()}
            context = Context(engine, profile, shapes, stream.cuda_stream)
            for key, dtype in engine.outputs.items():
                tensors[key] = torch.empty(context.shape(key), dtype=dtype, device=device)
            context.bind(tensors)
            context.run(stream.cuda_stream)
        stream.synchronize()
    return {key: tensors[key] for key in engine.outputs}
