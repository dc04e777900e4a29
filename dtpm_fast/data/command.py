"""`python -m dtpm_fast.data check | sheet | make | measure`."""

import argparse
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from dtpm_fast.data.check import check_folder
from dtpm_fast.data.crops import SyntheticCrops
from dtpm_fast.data.layouts import SPLITS, find_pairs
from dtpm_fast.data.make import make_pairs
from dtpm_fast.data.pictures import check_pairs
from dtpm_fast.data.residuals import quantile_table, residual_statistics
from dtpm_fast.data.sheet import write_sheet
from dtpm_fast.exit_code import run
from dtpm_fast.given_path import given_path
from dtpm_fast.images import read_image
from dtpm_fast.tasks import TASKS

EXAMPLE = """examples:
  python -m dtpm_fast.data check --task deblur GoPro
  python -m dtpm_fast.data check --task derain rain100L --split train --split-file split.csv
  python -m dtpm_fast.data sheet -o degradations.jpg
  python -m dtpm_fast.data make --task dehaze photos/ --strength 0.6 1.2 --seed 7 -o hazy
  python -m dtpm_fast.data measure --task derain --photos photos --pairs rain100L --split test"""


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
    check.add_argument("folder", type=given_path, metavar="DIR", help="the data set's folder")
    check.add_argument("--split", choices=SPLITS, help="only this split (default: all that are there)")
    check.add_argument(
        "--split-file", type=given_path, help="CSV (name, split) or list of names that chooses the pictures"
    )
    check.add_argument("--show", type=_at_least(0), default=10, metavar="N", help="problems to print (default: 10)")
    sheet = commands.add_parser(
        "sheet",
        help="write one picture that shows every degradation",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sheet.add_argument(
        "photos",
        nargs="*",
        type=given_path,
        metavar="PHOTO",
        help="files or folders (default: scikit-image's sample photos)",
    )
    sheet.add_argument("-o", "--output", required=True, type=given_path, metavar="FILE", help="a .jpg or .png")
    sheet.add_argument("--seed", type=_at_least(0), default=0)
    make = commands.add_parser(
        "make",
        help="write a synthetic test set: degraded photos and their targets",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument(
        "photos",
        nargs="*",
        type=given_path,
        metavar="PHOTO",
        help="files or folders (default: scikit-image's colour photos)",
    )
    make.add_argument("--task", required=True, choices=list(TASKS))
    make.add_argument("--strength", type=float, nargs="+", default=[1.0], metavar="X", help="0 is clean (default: 1)")
    make.add_argument("--seed", type=_at_least(0), default=0)
    make.add_argument(
        "--noise", type=float, default=0.0, metavar="X", help="noise on the inputs, standard deviation in 8-bit levels"
    )
    make.add_argument("--jpeg", type=int, metavar="Q", help="the inputs have been JPEG files of this quality, 1 to 100")
    make.add_argument("-o", "--output", required=True, type=given_path, metavar="DIR", help="a new or empty folder")
    measure = commands.add_parser(
        "measure",
        help="hold a synthetic degradation against the pairs of a data set, in numbers",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measure.add_argument("--task", required=True, choices=list(TASKS))
    measure.add_argument("--photos", type=given_path, required=True, metavar="DIR", help="clean photos to degrade")
    measure.add_argument("--pairs", type=given_path, metavar="DIR", help="pairs to compare with")
    measure.add_argument("--split", choices=SPLITS, default="train")
    measure.add_argument("--split-file", type=given_path)
    measure.add_argument("--strength", type=float, default=1.0)
    measure.add_argument(
        "--count", type=_at_least(1), default=100, metavar="N", help="synthetic pictures (default: 100)"
    )
    measure.add_argument("--crop", type=_at_least(1), default=320, help="their side in pixels (default: 320)")
    measure.add_argument("--seed", type=_at_least(0), default=0)
    options = parser.parse_args(arguments)

    def work() -> int:
        if options.command == "sheet":
            write_sheet(options.output, options.photos, options.seed)
            return 0
        if options.command == "make":
            count = make_pairs(
                options.task,
                options.output,
                options.photos,
                options.strength,
                options.seed,
                options.noise,
                options.jpeg,
            )
            about = f"synthetic {options.task}, seed {options.seed}"
            if options.noise:
                about += f", noise {options.noise:g}"
            if options.jpeg is not None:
                about += f", JPEG of quality {options.jpeg}"
            print(f"{options.output}: {count} pairs, {about}")
            return 0
        if options.command == "measure":
            print(compare(options))
            return 0
        report = check_folder(options.task, options.folder, options.split, options.split_file)
        print(report.text(options.show))
        return 1 if report.problems else 0

    return run(work)


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or more")
        return int(text)

    return whole_number


def compare(options: argparse.Namespace) -> str:
    """The table of `measure`, and the time that a crop takes."""
    crops = SyntheticCrops(
        options.photos, options.task, options.crop, options.seed, strength=options.strength, augment="none"
    )
    synthetic = []
    for index in tqdm(range(options.count), desc="synthetic", leave=False, disable=None):
        degraded, clean = (((tensor + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for tensor in crops[index])
        synthetic.append(residual_statistics(degraded, clean))
    columns = [("synthetic", synthetic)]
    if options.pairs is not None:
        found = find_pairs(options.task, options.pairs, options.split, options.split_file)
        check_pairs(found.pairs)
        real = [
            residual_statistics(read_image(degraded), read_image(clean))
            for degraded, clean in tqdm(found.pairs, desc="pairs", leave=False, disable=None)
        ]
        columns.append((options.pairs.name, real))
    table = quantile_table(columns)
    started = time.process_time()
    for index in range(20):
        crops[index]
    milliseconds = (time.process_time() - started) / 20 * 1000
    return f"{table}\n\n{milliseconds:.1f} ms of processor time for one {options.crop}x{options.crop} sample"
