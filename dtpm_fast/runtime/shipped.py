"""Weights by name: "light" is the file of that preset and task inside the package; anything else is a path."""

from pathlib import Path

from dtpm_fast.errors import UserError
from dtpm_fast.tasks import check_task
from dtpm_fast.weights_file import Weights, read_weights

FOLDER = Path(__file__).parent.parent / "weights"


def find_weights(name_or_path: str | Path, task: str) -> Weights:
    """The stage II weights for a task. Raises `UserError` for an unknown name, an unreadable file, a stage I file, or
    weights of another task."""
    check_task(task)
    weights = read_weights(_locate(str(name_or_path), task))
    if weights.stage != 2:
        raise UserError(
            f"{weights.path}: holds stage {weights.stage} weights, the prior alone; restoring needs stage 2 weights "
            f"(python -m dtpm_fast.train --stage 2 --task {task} --prior {weights.path} ...)"
        )
    # The paper's one task for rain and haze covers both of its halves; a half does not cover the whole.
    if weights.task != task and not (weights.task == "rainhaze" and task in ("derain", "dehaze")):
        raise UserError(f"{weights.path}: trained for the task {weights.task!r}, not for {task!r}")
    return weights


def shipped() -> list[str]:
    """What ships, as "preset-task": ["light-derain", ...]."""
    return sorted(path.stem for path in FOLDER.glob("*-*.safetensors"))


def _locate(name: str, task: str) -> Path:
    path = Path(name)
    if path.suffix == ".safetensors" or path.name != name or path.exists():
        return path
    found = FOLDER / f"{name}-{task}.safetensors"
    if found.is_file():
        return found
    what = ", ".join(shipped()) or "no restoring weights"
    raise UserError(
        f"no weights {name!r} for the task {task!r} ship with this package (it ships {what}); give a weights file that "
        "python -m dtpm_fast.train --stage 2 wrote"
    )
