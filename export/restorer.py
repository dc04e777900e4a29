"""A photo in, a better photo out, from an exported folder instead of weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtpm_fast.device import choose_device
from dtpm_fast.errors import UserError
from dtpm_fast.export.aoti import AotiStepper
from dtpm_fast.export.compare import ExportedStepper
from dtpm_fast.export.manifest import Manifest, read_manifest
from dtpm_fast.export.ort import OrtStepper
from dtpm_fast.export.tensorrt_stepper import TensorRTStepper
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.photo import from_network, open_photo, pad_to, round_up, to_network


class ExportedRestorer:
    """Restores photos of any size with a folder that `dtpm-export` wrote; its task and its steps.

    Takes and gives what `dtpm_fast.Restorer` does. Raises `UserError` for a folder that is not an export or was
    changed, and for a device that the folder's format cannot use here.
    """

    def __init__(self, folder: Path | str, *, device: str = "auto", seed: int = 0, threads: int = 0) -> None:
        self.manifest = read_manifest(folder)
        self.seed = seed
        self.stepper, self.device, why = open_stepper(Path(folder), self.manifest, device, threads)
        self.about = f"export {folder} ({self.manifest.kind}, {self.manifest.task}, {self.manifest.precision}); {why}"

    @torch.inference_mode()
    def __call__(self, photo: Any) -> Any:
        """As `dtpm_fast.Restorer.__call__`."""
        batch, back = open_photo(photo)
        return back(self._restore(batch))

    def _restore(self, batch: Tensor) -> Tensor:
        height, width = batch.shape[-2:]
        size = [round_up(side, self.manifest.multiple) for side in (height, width)]
        noise = pad_to(noise_fields(self.seed, height, width, self.manifest.noise_fields), *size)
        y_d = to_network(pad_to(batch.to(self.device), *size)).contiguous()
        restored = self.stepper.restore(y_d, noise.to(self.device))
        return from_network(restored[..., :height, :width], batch.dtype)


def open_stepper(
    folder: Path, manifest: Manifest, device: str = "auto", threads: int = 0
) -> tuple[ExportedStepper, torch.device, str]:
    """The folder's `prepare` and `step`, its device, and one line that says why that device."""
    if device == "auto" and manifest.kind in ("aoti", "tensorrt"):
        device = manifest.engine["device"]
    chosen, why = choose_device(device)
    if manifest.kind == "onnx":
        return OrtStepper(folder, manifest, chosen, threads), chosen, f"ONNX Runtime, device {why}"
    if manifest.kind == "aoti":
        return AotiStepper(folder, manifest, chosen), chosen, f"AOTInductor, device {why}"
    if manifest.kind == "tensorrt":
        return TensorRTStepper(folder, manifest, chosen), chosen, f"TensorRT, device {why}"
    raise UserError(f"{folder}: an export of kind {manifest.kind!r}, which this version does not run")
