"""Weights by name: "light" is the file of that preset and task inside the package; anything else is a path."""

from pathlib import Path

from dtpm_fast.errors import UserError
from dtpm_fast.tasks import check_task, check_trained_for
from dtpm_fast.weights_file import Weights, read_weights

FOLDER = Path(__file__).parent.parent / "weights"


def find_weights(name_or_path: str | Path, task: str | None = None) -> Weights:
    """The stage II weights for a task, by name or path; without a task a file's own, or derain's of a name. Raises
    `UserError` for an unknown name, an unreadable file, a stage I file, or weights of another task."""
    weights = read_weights(locate(str(name_or_path), task or "derain"))
    if weights.stage != 2:
        raise UserError(
            f"{weights.path}: holds stage {weights.stage} weights, the prior alone; restoring needs stage 2 weights "
            f"(python -m dtpm_fast.train --stage 2 --task {task or 'TASK'} --prior {weights.path} ...)"
        )
    if task is not None:
        check_trained_for(task, weights.task, weights.path)
    return weights


def find_prior(name_or_path: str | Path) -> Weights:
    """Stage I weights: the shipped prior of a preset ("light"), or a file. Raises `UserError` for one of stage II."""
    path = Path(name_or_path)
    shipped_file = FOLDER / f"{name_or_path}-prior.safetensors"
    weights = read_weights(shipped_file if path.suffix != ".safetensors" and shipped_file.is_file() else path)
    if weights.stage != 1:
        raise UserError(f"{weights.path}: holds stage {weights.stage} weights; the prior is stage 1")
    return weights


def is_export(name_or_path: str | Path) -> bool:
    """Whether this is a folder that `dtpm-export` wrote."""
    return (Path(name_or_path) / "manifest.json").is_file()


def shipped() -> list[str]:
    """What ships for restoring, as "preset-task": ["light-derain", ...]."""
    return sorted(path.stem for path in FOLDER.glob("*-*.safetensors") if not path.stem.endswith("-prior"))


def locate(name: str, task: str) -> Path:
    """The file of weights given by name or path. Raises `UserError` when there is none."""
    check_task(task)
    path = Path(name)
    found = FOLDER / f"{name}-{task}.safetensors"
    if path.name == name and found.is_file():  # whatever lies in the working directory; ./name is that
        return found
    if path.suffix == ".safetensors" or path.name != name or path.exists():
        if path.is_dir():
            what = "a folder that dtpm-export wrote" if is_export(path) else "a folder"
            raise UserError(f"{path}: is {what}; a weights file is needed here")
        if not path.is_file():
            raise UserError(f"{path}: no such weights file")
        return path
    what = ", ".join(shipped()) or "no restoring weights"
    raise UserError(
        f"no weights {name!r} for the task {task!r} ship with this package (it ships {what}); give a weights file that "
        "python -m dtpm_fast.train --stage 2 wrote"
    )
