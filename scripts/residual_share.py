"""How much of what the predictor gets wrong the sampled residual takes back, over the pairs of a data set.

    python scripts/residual_share.py --task derain --data rain100L --split-file rain100_project_split.csv

Prints means over the pairs, in levels of 255: the residual's mean and deviation, the deviation of the predictor's
error, and the correlation of the two (1: the residual is the error; 0: they have nothing to do with each other).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dtpm_fast import Restorer
from dtpm_fast.data.layouts import find_pairs
from dtpm_fast.exit_code import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split-file", type=Path)
    options = parser.parse_args()
    return run(lambda: measure(options.task, options.data, options.split_file))


def measure(task: str, data: Path, split_file: Path | None) -> int:
    pairs = find_pairs(task, data, "test", split_file).pairs
    restorer = Restorer.from_pretrained("light", task=task, precision="float32", device="cpu")
    rows = []
    for degraded, clean in tqdm(pairs, unit="pair"):
        y_d, y_g = read(degraded), read(clean)
        y_eps = restorer.predict(y_d)
        residual, error = 255 * (restorer(y_d) - y_eps), 255 * (y_g - y_eps)
        correlation = torch.corrcoef(torch.stack([residual.flatten(), error.flatten()]))[0, 1]
        rows.append([residual.mean().item(), residual.std().item(), error.std().item(), correlation.item()])
    mean, deviation, error_deviation, correlation = np.mean(rows, axis=0)
    print(f"residual: mean {mean:.3f}, deviation {deviation:.3f}; error: deviation {error_deviation:.3f}")
    print(f"correlation {correlation:.3f}; {len(rows)} pairs")
    return 0


def read(path: Path) -> torch.Tensor:
    """1x3xHxW float32 in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255


if __name__ == "__main__":
    raise SystemExit(main())
