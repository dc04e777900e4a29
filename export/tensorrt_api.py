"""TensorRT itself, from 10.12 on: found, asked for its errors, and what ties an engine to where it was built."""

from functools import cache
from typing import Any

import torch

from dtpm_fast.errors import UserError
from dtpm_fast.export.manifest import Manifest

OLDEST = (10, 12)  # strongly typed networks with the 16-bit types of these graphs; 11 has no other kind


def tensorrt() -> Any:
    """The module. Raises `UserError` when it is missing, cannot be loaded, or is older than 10.12."""
    try:
        import tensorrt as trt
    except ImportError as error:  # a library that is missing is one too
        raise UserError(
            f"TensorRT engines need TensorRT {OLDEST[0]}.{OLDEST[1]} or newer and an NVIDIA GPU: "
            f"pip install 'dtpm-fast[tensorrt]' ({error})"
        ) from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < OLDEST:
        raise UserError(f"TensorRT {trt.__version__} is too old: {OLDEST[0]}.{OLDEST[1]} or newer is needed")
    return trt


def listener(trt: Any) -> Any:
    """The process's logger, for one operation: it keeps the errors that TensorRT reports from now on, so that a failure
    can be told in one line (`cause`). One and never freed: TensorRT goes on with the first that it was given."""
    log = _listener(trt)
    log.errors.clear()
    return log


@cache
def _listener(trt: Any) -> Any:
    class Listener(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the bindings ask for this form
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

        @property
        def cause(self) -> str:
            return self.errors[0].splitlines()[0] if self.errors and self.errors[0] else "TensorRT gave no reason"

    return Listener()


def place(trt: Any, device: torch.device) -> dict[str, str]:
    """What an engine is tied to: TensorRT's version and the GPU's compute capability. The GPU's name is for people."""
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "tensorrt": trt.__version__,
        "compute_capability": f"{major}.{minor}",
        "gpu": torch.cuda.get_device_name(device),
    }


def require_cuda(device: torch.device) -> None:
    """Raises `UserError` unless `device` is a GPU."""
    if device.type != "cuda":
        raise UserError("TensorRT engines are built for, and run on, an NVIDIA GPU; use --device cuda")


def check_place(folder: object, manifest: Manifest, trt: Any, device: torch.device) -> None:
    """Raises `UserError` when the folder's engines were built by another version or for another compute capability."""
    built, here = manifest.engine, place(trt, device)
    if any(built.get(key) != here[key] for key in ("tensorrt", "compute_capability")):
        raise UserError(
            f"{folder}: built by TensorRT {built.get('tensorrt')} for compute capability "
            f"{built.get('compute_capability')} ({built.get('gpu')}); this is TensorRT {here['tensorrt']} on "
            f"{here['compute_capability']} ({here['gpu']}), and an engine runs only where both agree: export again here"
        )
