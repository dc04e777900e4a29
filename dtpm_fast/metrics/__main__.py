"""`python -m dtpm_fast.metrics texture`: the paper's figure 1 on photos of your own."""

import argparse
import sys
from collections.abc import Sequence

from dtpm_fast.exit_code import run
from dtpm_fast.given_path import given_path

EXAMPLE = """example:
  python -m dtpm_fast.metrics texture photos/ -o texture.svg --report texture.html --niqe niqe_pris_params.npz"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 on a failure, 2 on bad usage."""
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.metrics",
        description="Experiments of the paper that need no restorer.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texture = commands.add_parser(
        "texture",
        help="figure 1: NIQE of photos whose texture is removed by degrees",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    texture.add_argument("photos", type=given_path, nargs="+", metavar="PHOTO", help="photos or folders of photos")
    texture.add_argument("-o", "--output", type=given_path, required=True, metavar="FILE.svg", help="the curve")
    texture.add_argument("--report", type=given_path, metavar="FILE.html", help="a page with the pictures")
    texture.add_argument("--niqe", type=given_path, metavar="FILE", help="niqe_pris_params.npz, else downloaded")
    options = parser.parse_args(arguments)
    return run(lambda: _texture(options))


def _texture(options: argparse.Namespace) -> int:
    from dtpm_fast.data.pictures import named_photos
    from dtpm_fast.metrics.curve import write_curve
    from dtpm_fast.metrics.niqe import Niqe
    from dtpm_fast.metrics.texture import measure_texture
    from dtpm_fast.report import write_report

    photos = named_photos(options.photos)
    found, cases = measure_texture(photos, Niqe(options.niqe))
    title = f"texture removal, {len(photos)} photo{'s' if len(photos) > 1 else ''}"
    write_curve(options.output, found, "niqe", "ssim_y", title, over="α, share of the texture that is kept")
    if options.report:
        means = {f"α = {alpha}": figures for alpha, figures in found.items()}
        write_report(cases, options.report, title=title, means=means)
    print("| α | NIQE | SSIM |\n| ---: | ---: | ---: |")
    for alpha, figures in found.items():
        print(f"| {alpha} | {figures['niqe']:.2f} | {figures['ssim_y']:.4f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
