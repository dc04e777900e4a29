"""Markdown rows of records that `dtpm-evaluate --json` wrote: the tables of docs/model-card.md.

python scripts/figures_table.py benchmarks/results/light-*.json
python scripts/figures_table.py --each benchmarks/results/light-raindrop-real.json    # a row for every picture
"""

import argparse
import json
from pathlib import Path


def rows(record: dict, each: bool) -> list[tuple[str, int, dict[str, dict[str, float]]]]:
    if each:
        return [(picture["name"], 1, picture["figures"]) for picture in record["per_image"]]
    return [("mean", record["images"], record["mean"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--each", action="store_true", help="every picture, not the mean")
    options = parser.parse_args()
    for path in options.records:
        record = json.loads(path.read_text(encoding="utf-8"))
        psnr, ssim = record["protocol"]["psnr"], record["protocol"]["ssim"]
        for name, count, figures in rows(record, options.each):
            cells = [f"{found[psnr]:.2f} / {found[ssim]:.4f}" for found in figures.values()]
            print(f"| {record['task']} | {Path(record['data']).name}: {name} of {count} | " + " | ".join(cells) + " |")
        print(f"  ({', '.join(figures)}; {psnr} in dB / {ssim}; {record['device']}, {record['date'][:10]})")


if __name__ == "__main__":
    main()
