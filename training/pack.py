"""Halve a weights file for shipping, and split a task from its prior: `python -m dtpm_fast.training.pack`."""

import argparse
import sys
from pathlib import Path

import torch

from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run
from dtpm_fast.given_path import given_path
from dtpm_fast.weights_file import Weights, read_weights, save_weights, sha256

EXAMPLE = """examples:
  python -m dtpm_fast.training.pack runs/prior/weights.safetensors shipped/light-prior.safetensors
  python -m dtpm_fast.training.pack runs/derain/weights.safetensors shipped/light-derain.safetensors \\
      --prior shipped/light-prior.safetensors"""
TASK = ("adapters.", "predictor.")


def pack(source: Path, target: Path, prior: Path | None = None) -> None:
    """Copy weights with floating-point tensors in float16; loading gives float32 again. With `prior`, a packed stage I
    file beside the target, only adapters and predictor are written, and a reference to that file.

    Raises `UserError`, also when the prior is not the one that the source was trained on."""
    weights = read_weights(source)
    tensors, reference = weights.tensors, None
    if prior is not None:
        if prior.resolve().parent != target.resolve().parent:
            raise UserError(f"{prior}: must lie beside {target}, where restoring will look for it")
        _check_prior(weights, read_weights(prior))
        tensors = {name: value for name, value in tensors.items() if name.startswith(TASK)}
        reference = {"file": prior.name, "sha256": sha256(prior)}
    save_weights(
        target, tensors, weights.config, weights.stage, weights.task, weights.trained, torch.float16, reference
    )


def _check_prior(weights: Weights, prior: Weights) -> None:
    if (weights.stage, prior.stage) != (2, 1):
        raise UserError(
            f"{weights.path}: is of stage {weights.stage} and the prior of stage {prior.stage}, not 2 and 1"
        )
    for name, value in weights.tensors.items():
        if name.startswith(TASK):
            continue
        other = prior.tensors.get(name)
        if other is None or not torch.equal(value.half(), other.half()):
            raise UserError(f"{weights.path}: was not trained on {prior.path}: they differ in {name}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.training.pack",
        description="Store a weights file in float16, half the size, for shipping.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=given_path)
    parser.add_argument("target", type=given_path)
    parser.add_argument(
        "--prior", type=given_path, help="packed stage 1 file beside TARGET: write the task's own part alone"
    )
    args = parser.parse_args(argv)

    def work() -> int:
        pack(args.source, args.target, args.prior)
        print(f"written: {args.target} ({args.target.stat().st_size / 1e6:.1f} MB)")
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
