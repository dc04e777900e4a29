"""`--tile`, of the commands that restore."""

import argparse


def add_tile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tile",
        type=_tile,
        default="auto",
        metavar="T",
        help="side of a tile's core in pixels, beyond which it reaches 64; none never tiles, auto does where the "
        "memory asks for it (default: auto)",
    )


def _tile(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return text if text == "auto" else None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: use auto, none or a number of pixels") from None
