"""`python -m dtpm_fast.data check | sheet`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dtpm_fast.commands.run import run
from dtpm_fast.data.check import check_folder
from dtpm_fast.data.layouts import SPLITS
from dtpm_fast.data.sheet import write_sheet
from dtpm_fast.tasks import TASKS

EXAMPLE = """examples:
  python -m dtpm_fast.data check --task deblur GoPro
  python -m dtpm_fast.data check --task derain rain100L --split train --split-file split.csv
  python -m dtpm_fast.data sheet -o degradations.jpg"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 on a failure or when the checked data set has a problem, 2 on bad usage."""
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.data",
        description="Check a data set before training, or look at the synthetic degradations.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check",
        help="count the pictures of a data set, open every one, and list the first problems",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("--task", required=True, choices=list(TASKS), help="whose layouts to look for")
    check.add_argument("folder", type=Path, metavar="DIR", help="the data set's folder")
    check.add_argument("--split", choices=SPLITS, help="only this split (default: all that are there)")
    check.add_argument("--split-file", type=Path, help="CSV (name, split) or list of names that chooses the pictures")
    check.add_argument("--show", type=int, default=10, metavar="N", help="problems to print (default: 10)")
    sheet = commands.add_parser(
        "sheet",
        help="write one picture that shows every degradation",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sheet.add_argument("photos", nargs="*", type=Path, metavar="PHOTO", help="default: scikit-image's sample photos")
    sheet.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="a .jpg or .png")
    sheet.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    def work() -> int:
        if options.command == "sheet":
            write_sheet(options.output, options.photos, options.seed)
            return 0
        report = check_folder(options.task, options.folder, options.split, options.split_file)
        print(report.text(options.show))
        return 1 if report.problems else 0

    return run(work)
