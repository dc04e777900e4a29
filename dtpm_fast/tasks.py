"""The restoration tasks, by the names used on every command line."""

from pathlib import Path

from dtpm_fast.errors import UserError

TASKS = {
    "deblur": "motion deblurring (GoPro)",
    "defocus": "defocus deblurring (DPDD)",
    "desnow": "snow removal (Snow100K)",
    "raindrop": "raindrop removal (RainDrop)",
    "rainhaze": "deraining and dehazing (Outdoor-Rain)",
    # The paper's one task by its halves: same data layout, but weights and synthetic degradations for one half alone.
    "derain": "deraining, a half of rainhaze",
    "dehaze": "dehazing, a half of rainhaze",
}


def check_task(name: str) -> str:
    """The name itself. Raises `UserError` for an unknown task."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    return name


def check_trained_for(task: str, trained: str, path: Path) -> None:
    """Raises `UserError` when what was trained for one task is asked for another. The paper's one task for rain and
    haze covers both of its halves; a half does not cover the whole."""
    if trained != task and not (trained == "rainhaze" and task in ("derain", "dehaze")):
        raise UserError(f"{path}: trained for the task {trained!r}, not for {task!r}")
