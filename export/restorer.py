"""A photo in, a better photo out, from an exported folder instead of weights."""

from pathlib import Path

import torch

from dtpm_fast.device import choose_device
from dtpm_fast.errors import UserError
from dtpm_fast.export.aoti import AotiStepper
from dtpm_fast.export.compare import ExportedStepper
from dtpm_fast.export.manifest import PRECISIONS, Manifest, read_manifest
from dtpm_fast.export.ort import OrtStepper
from dtpm_fast.export.tensorrt_stepper import TensorRTStepper
from dtpm_fast.runtime.noise import check_seed
from dtpm_fast.runtime.restorer import Restorer, logger
from dtpm_fast.tasks import check_task, check_trained_for


class ExportedRestorer(Restorer):
    """A `dtpm_fast.Restorer` over a folder that `dtpm-export` wrote: its task, steps and number format, in the backend
    that its kind names. Same photos, same noise, same results. `Restorer.from_pretrained(folder)` gives one.

    Args:
        folder: written by `dtpm-export`; its hashes are checked.
        task, steps, backend, precision, sampler: None or "auto" is the folder's own; all else has to agree with it.
        device: "auto", "cpu", "cuda" or "cuda:N".
        seed: of the noise.
        tile: "auto" or None: an exported graph sees the whole picture and does not tile.
        threads: of ONNX Runtime on the CPU; 0 leaves the choice to it.

    Raises `UserError` for a folder that is not an export or was changed, a setting that the folder was not exported
    with, and a device that the folder's format cannot use here.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        task: str | None = None,
        steps: int | None = None,
        device: str = "auto",
        backend: str = "auto",
        seed: int = 0,
        tile: int | str | None = "auto",
        precision: str = "auto",
        sampler: str = "ddim",
        threads: int = 0,
    ) -> None:
        folder = Path(folder)
        self.manifest = manifest = read_manifest(folder)
        if task is not None:
            check_trained_for(check_task(task), manifest.task, folder)
        own = str(PRECISIONS[manifest.precision]).removeprefix("torch.")
        for name, asked, has in (
            ("steps", steps, len(manifest.steps)),
            ("backend", None if backend == "auto" else backend, manifest.kind),
            ("precision", None if precision == "auto" else precision, own),
            ("sampler", sampler, "ddim"),
        ):
            if asked is not None and asked != has:
                raise UserError(f"{folder}: was exported with {name} {has}, not {asked}; leave it out, or export again")
        if isinstance(tile, int):
            raise UserError(f"tile {tile}: an exported graph does not tile; restore from the weights instead")
        self.seed, self.tile, self.multiple, self.steps = check_seed(seed), tile, manifest.multiple, manifest.steps
        self.backend, self.device, why = open_stepper(folder, manifest, device, threads)
        self._running = folder, 0, manifest.task
        what = f"export {folder} ({manifest.task}, {manifest.preset}, from {manifest.weights['file']})"
        self._abouts = {self._running: what}
        self._why = f"{len(self.steps)} steps; {why}; precision {own}"
        logger.info("%s", self.about)

    def set_task(self, task: str, name_or_path: str | Path | None = None) -> None:
        """Raises `UserError`: the weights are part of the exported graphs."""
        raise UserError("an exported folder's task cannot be changed; open the other task's folder")


def open_stepper(
    folder: Path, manifest: Manifest, device: str = "auto", threads: int = 0
) -> tuple[ExportedStepper, torch.device, str]:
    """The folder's `prepare` and `step`, its device, and one line that says why that device."""
    if device == "auto" and manifest.kind in ("aoti", "tensorrt"):
        device = manifest.engine["device"]
    chosen, why = choose_device(device)
    if manifest.kind == "onnx":
        return OrtStepper(folder, manifest, chosen, threads), chosen, f"backend onnx (ONNX Runtime), device {why}"
    if manifest.kind == "aoti":
        return AotiStepper(folder, manifest, chosen), chosen, f"backend aoti (AOTInductor), device {why}"
    if manifest.kind == "tensorrt":
        return TensorRTStepper(folder, manifest, chosen), chosen, f"backend tensorrt (TensorRT), device {why}"
    raise UserError(f"{folder}: an export of kind {manifest.kind!r}, which this version does not run")
