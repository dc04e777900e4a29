"""The backends by name, and which one `auto` takes."""

import torch

from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.runtime.compiled import Compiled
from dtpm_fast.runtime.graph import Graph
from dtpm_fast.runtime.plan import Plan, native_form
from dtpm_fast.runtime.precision import choose_precision
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.sampler import Stepper, Steps

BACKENDS = ("auto", "reference", "fused", "compiled", "graph")
EXPORTED = ("onnx", "aoti", "tensorrt")  # what a folder of `dtpm-export` runs in


def choose_backend(
    name: str, model: DTPM, steps: Steps, device: torch.device, precision: str = "auto"
) -> tuple[Stepper, str]:
    """The backend, and one line that says which and why.

    reference: the plain modules in float32. fused: the plan, on the CPU with folded blocks, on a GPU with the fused
    kernels. compiled: the plan with folded blocks through torch.compile. graph: the fused plan, predictor and all steps
    in one CUDA graph. auto: graph on a GPU, fused on a CPU, reference where adapters are gated.

    Raises `UserError` for an unknown name, for one that runs exported folders, for graph without CUDA, for gated
    adapters on any but the reference, and for the reference in another precision than float32.
    """
    if name in EXPORTED:
        raise UserError(
            f"backend {name}: runs a folder that dtpm-export wrote, and these are weights; export them first "
            f"(dtpm-export --format {name} ... -o DIR), then give --weights DIR"
        )
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS + EXPORTED)}")
    why = "as asked"
    if name == "auto":
        name, why = _auto(model, device)
    if name == "reference":
        if precision == "bfloat16":
            raise UserError("backend reference: runs in float32 only; use --backend fused for bfloat16")
        return Reference(model, steps), f"backend reference, float32: {why}"
    blocks = native_form if name == "fused" and device.type == "cpu" else (lambda *_: None)
    dtype, why_dtype = choose_precision(precision, device, lambda dtype: blocks(model, dtype))
    said = f"backend {name}: {why}; precision {str(dtype).removeprefix('torch.')}: {why_dtype}"
    if name == "compiled":
        return Compiled(model, steps, dtype), said
    if name == "graph" and device.type != "cuda":
        raise UserError("backend graph: CUDA graphs need a CUDA device, and this is a CPU; use --backend fused")
    if device.type == "cuda":
        plan = Plan(model, steps, dtype, "kernels")
        return (Graph(plan, device) if name == "graph" else plan), said
    isa = blocks(model, dtype)
    if isa is None:
        return Plan(model, steps, dtype), f"{said}; blocks in PyTorch"
    return Plan(model, steps, dtype, "native"), f"{said}; C++ blocks for {isa}"


def _auto(model: DTPM, device: torch.device) -> tuple[str, str]:
    if model.config.adapter_kind == "gated" and model.adapters:
        return "reference", "chosen by auto, because gated adapters cannot be merged"
    if device.type == "cuda":
        return "graph", "chosen by auto, one graph launch a picture"
    return "fused", "chosen by auto, the fastest on a CPU"
