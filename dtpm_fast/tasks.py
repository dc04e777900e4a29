"""The restoration tasks, by the names used on every command line."""

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
