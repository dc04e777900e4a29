"""`--task` beside `--weights`, of the commands that restore and export."""

import argparse
from pathlib import Path

from dtpm_fast.tasks import TASKS


def add_task(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--task", choices=tuple(TASKS), help=f"{help}; a weights file or an export knows its own")


def check_task_known(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """A name of shipped weights stands for every task's; ends as bad usage where nothing says which."""
    weights = Path(options.weights)
    if options.task is None and weights.suffix != ".safetensors" and not (weights / "manifest.json").is_file():
        parser.error(f"--task is needed: --weights {options.weights} is no weights file or export that knows its own")
