"""AOTInductor packages: `prepare` and `step` compiled ahead of time, loadable in Python and in C++ without tracing."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtpm_fast.errors import UserError
from dtpm_fast.export.manifest import Manifest
from dtpm_fast.runtime.sampler import Conditions, sample


def write_aoti(module: nn.Module, inputs: Sequence[Tensor], dynamic: Any, file: Path, device: torch.device) -> None:
    """Compile `module` called with `inputs` for `device` into a package. Raises `UserError` when no C++ compiler works
    here, or the disk is full."""
    module = module.to(device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the compiler's own notes
        example = tuple(value.to(device) for value in inputs)
        program = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
        except Exception as error:  # the compiler's exceptions have no base class of their own
            cause = str(error).strip().splitlines()
            raise UserError(
                f"{file.name}: AOTInductor could not compile it ({cause[0] if cause else type(error).__name__}); it "
                "needs a C++ compiler on the PATH and room for temporary files"
            ) from error


def compute_capability(device: torch.device) -> str | None:
    """As "9.0", of a CUDA device, for which a package is compiled."""
    if device.type != "cuda":
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


class AotiStepper:
    """A `Stepper` over prepare.pt2 and step.pt2, on the device that they were compiled for.

    The packages are native code: load only a folder that you exported yourself. Raises `UserError` when the device is
    of another kind, or a package cannot be loaded.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        built_for = manifest.engine.get("device", "cpu")
        if device.type != built_for:
            raise UserError(f"{folder}: was compiled for {built_for} and cannot run on {device.type}; export again")
        built, here = manifest.engine.get("compute_capability"), compute_capability(device)
        if built not in (None, here):
            raise UserError(f"{folder}: was compiled for compute capability {built}, {device} has {here}; export again")
        self.manifest, self.device, self.steps = manifest, device, manifest.steps
        index = device.index if device.index is not None else -1  # -1: the current device
        self.models = {}
        for name, graph in manifest.graphs.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.models[name] = torch._inductor.aoti_load_package(str(folder / graph.file), device_index=index)
            except RuntimeError as error:
                raise UserError(
                    f"{folder / graph.file}: cannot be loaded ({str(error).splitlines()[0]}); it was made with torch "
                    f"{manifest.versions.get('torch')}, this is {torch.__version__}"
                ) from error
        self.indices = [torch.tensor([i], device=device) for i in range(len(self.steps))]

    def prepare(self, y_d: Tensor) -> Conditions:
        names = [spec.name for spec in self.manifest.graphs["prepare"].outputs]
        return dict(zip(names, self.models["prepare"](y_d.contiguous()), strict=True))

    def step(self, x: Tensor, previous: Tensor, i: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
        next_x, x0 = self.models["step"](
            x.contiguous(),
            previous.contiguous(),
            self.indices[i],
            *(value.contiguous() for value in conditions.values()),
        )
        return next_x, x0

    def restore(self, y_d: Tensor, noise: Tensor) -> Tensor:
        return sample(self, self.prepare(y_d), noise)
