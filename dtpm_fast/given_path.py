"""The type of an argument that names a file or a folder."""

import argparse
from pathlib import Path


def given_path(text: str) -> Path:
    """Raises `argparse.ArgumentTypeError` for "", what an unset shell variable gives: `Path` would make it the current
    folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; an unset variable?")
    return Path(text)
