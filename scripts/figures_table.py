"""Markdown rows of records that `dtpm-evaluate --json` wrote: the tables of docs/model-card.md.

python scripts/figures_table.py benchmarks/results/light-*.json
python scripts/figures_table.py --each benchmarks/results/light-raindrop-real.json    # a row for every picture
python scripts/figures_table.py benchmarks/results/light-deblur-reds.json --group test000 test001  # a row for each clip
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

Figures = dict[str, dict[str, float]]  # method: metric: value


def rows(record: dict, each: bool, groups: list[str]) -> list[tuple[str, int, Figures]]:
    """(name, number of pictures, mean figures) of a record's rows."""
    pictures = record["per_image"]
    if each:
        return [(picture["name"], 1, picture["figures"]) for picture in pictures]
    if not groups:
        return [("mean", record["images"], record["mean"])]
    found = []
    for group in groups:
        chosen = [picture["figures"] for picture in pictures if group in picture["name"]]
        if not chosen:
            raise SystemExit(f"error: no picture of the record has {group!r} in its name")
        mean = {row: {m: fmean(f[row][m] for f in chosen) for m in chosen[0][row]} for row in chosen[0]}
        found.append((f"{group}, mean", len(chosen), mean))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--each", action="store_true", help="every picture, not the mean")
    parser.add_argument(
        "--group", nargs="+", default=[], metavar="PART", help="a row for those with PART in their name"
    )
    options = parser.parse_args()
    for path in options.records:
        record = json.loads(path.read_text(encoding="utf-8"))
        psnr, ssim = record["protocol"]["psnr"], record["protocol"]["ssim"]
        for name, count, figures in rows(record, options.each, options.group):
            cells = [f"{found[psnr]:.2f} / {found[ssim]:.4f}" for found in figures.values()]
            print(f"| {record['task']} | {Path(record['data']).name}: {name} of {count} | " + " | ".join(cells) + " |")
        print(f"  ({', '.join(figures)}; {psnr} in dB / {ssim}; {record['device']}, {record['date'][:10]})")


if __name__ == "__main__":
    main()
