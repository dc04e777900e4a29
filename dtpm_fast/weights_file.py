"""Weights as safetensors with the config inside: one file is all that restoring needs, or two where several tasks share
their prior.

The header's metadata: `format`, `stage` (1 or 2), `task` (stage II), `config` (JSON of model and diffusion), `trained`
(JSON, free-form: data, steps, device). The ResNet-18 of the semantic code is not stored (torchvision fetches it by
hash); the compact encoder is. A task's file may hold its adapters and predictor alone: `prior` (JSON: `file`, `sha256`)
then names the stage I file beside it that holds the rest.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtpm_fast.atomic import atomic_path
from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM, load_semantic_weights

FORMAT = "dtpm-fast-1"


@dataclass(frozen=True)
class Weights:
    """A weights file's content, not yet a model."""

    path: Path
    config: Config
    stage: int
    task: str
    tensors: dict[str, Tensor]
    trained: dict[str, Any] = field(default_factory=dict)
    prior: dict[str, str] = field(default_factory=dict)  # file and sha256, where the prior is a file of its own


def save_weights(
    path: Path | str,
    tensors: dict[str, Tensor],
    config: Config,
    stage: int,
    task: str = "",
    trained: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    prior: dict[str, str] | None = None,
) -> None:
    """Write a model's state dict; `dtype` converts floating-point tensors (float16 halves the file). With `prior`, the
    tensors are a task's alone and `prior` says which file beside it has the rest."""
    kept = {}
    for key, value in tensors.items():
        if key.startswith("semantic.") and config.model.semantic_code != "compact":
            continue
        value = value.detach().cpu().contiguous()
        kept[key] = value.to(dtype) if dtype is not None and value.is_floating_point() else value
    metadata = {
        "format": FORMAT, "stage": str(stage), "task": task, "config": config.to_json(),
        "trained": json.dumps(trained or {}),
    }  # fmt: skip
    if prior is not None:
        metadata["prior"] = json.dumps(prior)
    with atomic_path(path) as temporary:
        save_file(kept, temporary, metadata)


def read_weights(path: Path | str) -> Weights:
    """Read a weights file, and the prior that it names. Raises `UserError` when one is missing, damaged, or not one of
    ours, and when the prior is another than the one it was trained with."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path}: not weights of dtpm-fast (no {FORMAT!r} in its header)")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        config = Config.from_json(metadata["config"])
        prior, trained = (dict(json.loads(metadata.get(key, "{}"))) for key in ("prior", "trained"))
        if prior:
            tensors = {**_prior_tensors(path, prior), **tensors}
        return Weights(path, config, int(metadata["stage"]), metadata["task"], tensors, trained, prior)
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _prior_tensors(path: Path, prior: dict[str, str]) -> dict[str, Tensor]:
    name = str(prior["file"])
    if Path(name).name != name:
        raise UserError(f"{path}: names its prior {name!r}, which is no plain file name")
    beside = path.parent / name
    if not beside.is_file():
        raise UserError(f"{path}: holds a task's adapters and predictor alone; its prior {name} is not beside it")
    found = sha256(beside)
    if found != prior["sha256"]:
        raise UserError(
            f"{beside}: is not the prior that {path.name} was trained with (SHA-256 {found[:12]}..., "
            f"expected {str(prior['sha256'])[:12]}...)"
        )
    return read_weights(beside).tensors


def load_model(weights: Weights, stage: int | None = None) -> DTPM:
    """A float32 model in evaluation mode. Raises `UserError` when the stage is not the one asked for, or the tensors do
    not fit the config in the file."""
    if stage is not None and weights.stage != stage:
        raise UserError(
            f"{weights.path}: holds stage {weights.stage} weights, stage {stage} is needed"
            + ("; train the task's adapters first (--stage 2)" if stage == 2 else "")
        )
    model = DTPM(weights.config.model, weights.stage)
    if weights.config.model.semantic_code == "resnet18":
        load_semantic_weights(model)
    fill(model, weights)
    return model.eval()


def fill(model: DTPM, weights: Weights) -> None:
    """Copy the file's tensors into the model. A stage I file may fill a stage II model: adapters and predictor keep
    their fresh values. Raises `UserError` naming the first tensor that does not fit."""
    own = model.state_dict()
    for key, value in weights.tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{weights.path}: is damaged: {key} has values that are not finite")
        if key not in own or own[key].shape != value.shape:
            had = "no such tensor" if key not in own else f"shape {tuple(own[key].shape)}"
            raise UserError(
                f"{weights.path}: does not fit this model: {key} has shape {tuple(value.shape)}, the model has {had} "
                f"(the file's preset is {weights.config.model.preset})"
            )
    fresh = ("adapters.", "predictor.") if weights.stage < model.stage else ()
    skipped = ("semantic.",) if model.config.semantic_code == "resnet18" else ()
    missing = [key for key in own if key not in weights.tensors and not key.startswith(fresh + skipped)]
    if missing:
        raise UserError(f"{weights.path}: lacks {len(missing)} tensors of this model, the first is {missing[0]}")
    model.load_state_dict(weights.tensors, strict=False)


def fill_start(model: DTPM, weights: Weights, has_prior: bool = False) -> None:
    """Copy what of the file a run starts from: the denoiser of a file of either stage, where it trains and comes from
    no prior; adapters and predictor of any task, whether they train or not. Raises `UserError` naming the first
    tensor that is missing or does not fit."""
    start = {
        name: p
        for name, p in model.named_parameters()
        if name.startswith(("adapters.", "predictor.")) or (p.requires_grad and not has_prior)
    }
    for name, parameter in start.items():
        found = weights.tensors.get(name)
        if found is None or found.shape != parameter.shape:
            had = "no such tensor" if found is None else f"shape {tuple(found.shape)}"
            raise UserError(
                f"{weights.path}: cannot start from it: {name} has shape {tuple(parameter.shape)} here, the file has "
                f"{had} (it holds stage {weights.stage} of preset {weights.config.model.preset})"
            )
    model.load_state_dict({name: weights.tensors[name] for name in start}, strict=False)
