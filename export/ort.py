"""ONNX Runtime as a backend: `prepare` and `step` of an exported folder, through IOBinding.

Tensors of PyTorch and of ONNX Runtime share memory: nothing is copied on the way in or out.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.export.manifest import DTYPES, GraphSpec, Manifest
from dtpm_fast.export.onnx_graph import in_float32
from dtpm_fast.runtime.sampler import Conditions, sample

# IOBinding takes numpy types, and ONNX's number where numpy has none.
ELEMENT_TYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
    torch.bfloat16: 16,
}


class OrtStepper:
    """A `Stepper` over prepare.onnx and step.onnx.

    Args:
        device: "cpu" or "cuda[:N]". CUDA is asserted, never replaced by the CPU.
        threads: of the CPU provider; 0 leaves the choice to ONNX Runtime.

    On the CPU a bfloat16 folder runs in float32 (with the weights' bfloat16 values): ONNX Runtime has no bfloat16
    operators there. Raises `UserError` when ONNX Runtime is missing or the CUDA provider is not there.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device, threads: int = 0) -> None:
        self.manifest, self.device = manifest, device
        self.steps = manifest.steps
        self.widened = manifest.precision == "bf16" and device.type == "cpu"
        self.sessions = {
            name: open_session(self._source(folder / graph.file), device, threads)
            for name, graph in manifest.graphs.items()
            if name in ("prepare", "step")
        }
        self.indices = [torch.tensor([i], device=device) for i in range(len(self.steps))]

    def prepare(self, y_d: Tensor) -> Conditions:
        return self._run("prepare", {"image": y_d}, y_d.shape)

    def step(self, x: Tensor, previous: Tensor, i: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
        given = {"x": x, "previous": previous, "index": self.indices[i], **conditions}
        found = self._run("step", given, x.shape)
        return found["next_x"], found["x0"]

    def restore(self, y_d: Tensor, noise: Tensor) -> Tensor:
        return sample(self, self.prepare(y_d), noise)

    def _run(self, name: str, given: Conditions, shape: torch.Size) -> Conditions:
        graph = self.manifest.graphs[name]
        return bound_run(self.sessions[name], graph, given, (shape[0], shape[2], shape[3]), self.device, self.widened)

    def _source(self, file: Path) -> str | bytes:
        return in_float32(file) if self.widened else str(file)


def open_session(source: str | bytes, device: torch.device, threads: int = 0) -> Any:
    """An ONNX Runtime session on exactly this device. Raises `UserError`."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"running ONNX files needs ONNX Runtime: pip install 'dtpm-fast[export]' ({error})") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    wanted = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise UserError(
            f"this ONNX Runtime has no {wanted}: install onnxruntime-gpu, and no plain onnxruntime beside it"
        )
    settings: list[Any] = [wanted]
    if device.type == "cuda":  # float32 means float32, as in the engines
        settings = [(wanted, {"device_id": str(device.index or 0), "use_tf32": "0"})]
    try:
        session = onnxruntime.InferenceSession(source, options, providers=settings)
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        where = source if isinstance(source, str) else "the graph"
        raise UserError(f"{where}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from error
    if wanted not in session.get_providers():
        raise UserError(
            f"ONNX Runtime did not start its {wanted} and would have run elsewhere "
            f"({', '.join(session.get_providers())}): check CUDA and cuDNN, or use --device cpu"
        )
    return session


def bound_run(
    session: Any, graph: GraphSpec, given: Conditions, size: tuple[int, int, int], device: torch.device, widened: bool
) -> Conditions:
    """Run with every tensor bound where it lies; returns the outputs by name."""
    place = (device.type, device.index or 0)
    binding = session.io_binding()
    held = []  # contiguous copies must outlive the run
    for spec in graph.inputs:
        value = given[spec.name].to(device).contiguous()
        held.append(value)
        kind = ELEMENT_TYPES[_dtype(spec.dtype, widened)]
        binding.bind_input(spec.name, *place, kind, tuple(value.shape), value.data_ptr())
    found = {}
    for spec in graph.outputs:
        dtype = _dtype(spec.dtype, widened)
        value = torch.empty(spec.sides(*size), dtype=dtype, device=device)
        found[spec.name] = value
        binding.bind_output(spec.name, *place, ELEMENT_TYPES[dtype], tuple(value.shape), value.data_ptr())
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # ONNX Runtime runs on a stream of its own
    try:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        cause = str(error).strip().splitlines()[0]
        if "allocate" in cause or "out of memory" in cause:
            raise MemoryError(cause) from error
        raise UserError(f"{graph.file}: ONNX Runtime failed to run it ({cause})") from error
    return found


def _dtype(name: str, widened: bool) -> torch.dtype:
    dtype = DTYPES[name]
    return torch.float32 if widened and dtype == torch.bfloat16 else dtype
