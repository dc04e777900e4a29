"""The cores that this process may run on."""

import os


def usable_cores() -> int:
    """Their number: of its affinity where the system has one, else of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
