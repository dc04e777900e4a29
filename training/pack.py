"""Halve a weights file for shipping: `python -m dtpm_fast.training.pack SOURCE TARGET`."""

import argparse
import sys
from pathlib import Path

import torch

from dtpm_fast.commands.run import run
from dtpm_fast.weights_file import read_weights, save_weights


def pack(source: Path, target: Path) -> None:
    """Copy weights with floating-point tensors in float16; loading gives float32 again. Raises `UserError`."""
    weights = read_weights(source)
    save_weights(
        target, weights.tensors, weights.config, weights.stage, weights.task, weights.trained, dtype=torch.float16
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.training.pack",
        description="Store a weights file in float16: half the size, for shipping.",
        epilog="example: python -m dtpm_fast.training.pack runs/derain/weights.safetensors light-derain.safetensors",
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args(argv)

    def work() -> int:
        pack(args.source, args.target)
        print(f"written: {args.target} ({args.target.stat().st_size / 1e6:.1f} MB)")
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
