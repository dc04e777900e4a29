"""A page to look at restored pictures: one HTML file, nothing loaded from elsewhere, for keyboard, mouse and touch."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dtpm_fast.atomic import atomic_path
from dtpm_fast.report_style import SCRIPT, STYLE

LONG_SIDE = 1600  # of an embedded picture; crops are cut from the full one
CROP = 96  # pixels a side, at most
CROPS = 2
Crop = tuple[int, int, int, int]  # left, top, right, bottom
NAMES = {"psnr_y": "PSNR Y", "ssim_y": "SSIM Y", "psnr_rgb": "PSNR RGB", "ssim_rgb": "SSIM RGB", "mae": "MAE"}
DIGITS = {"psnr_y": 2, "psnr_rgb": 2, "fid": 2, "niqe": 2}


@dataclass(frozen=True)
class Picture:
    """One version of a picture: HxWx3 uint8, what it is ("input", "4 steps"), and its figures by name."""

    label: str
    image: np.ndarray
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One picture of the page: its versions, the input first and the result last, and the ground truth where there is
    one, all of one size."""

    name: str
    versions: Sequence[Picture]
    truth: Picture | None = None


def write_report(
    cases: Iterable[Case],
    path: Path | str,
    title: str = "dtpm-restore",
    about: Mapping[str, str] | None = None,
    means: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Write the page: for each case a before/after slider, every version, and crops from where input and result differ
    most.

    Args:
        cases: at least one, each with at least two versions of equal size. They are embedded one after the other, so
            that an iterator need not keep their pictures.
        about: facts for the head of the page, by name.
        means: mean figures by version, for a table at the head.

    Raises `ValueError` for a case that breaks these rules, `UserError` when the file cannot be written.
    """
    with atomic_path(path) as temporary:  # first: a place that cannot be written to is an error before long work
        sections = [_case(case, number) for number, case in enumerate(cases)]
        if not sections:
            raise ValueError("a report needs at least one case")
        body = [
            f"<header><h1>{html.escape(title)}</h1>",
            _facts(about or {}),
            _table(means, "mean over the set") if means else "",
            "</header><main>",
            *sections,
            "</main>",
        ]
        page = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(part for part in body if part)
            + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # names that are no UTF-8


def evenly(total: int, count: int) -> set[int]:
    """Up to `count` of the numbers 0..total-1, evenly spaced: which pictures of a set a report shows."""
    count = min(total, count)
    return {round(i * (total - 1) / max(1, count - 1)) for i in range(count)}


def chosen(count: int, total: int) -> str:
    """How `evenly` chose, for a report's head."""
    return "all of them" if count == total else f"{count} of them below, evenly spaced by name, not by result"


def find_crops(before: np.ndarray, after: np.ndarray, count: int = CROPS) -> list[Crop]:
    """(left, top, right, bottom) of up to `count` squares that do not overlap, where the two pictures (HxWx3 uint8)
    differ most."""
    height, width = before.shape[:2]
    side = min(CROP, height, width)
    change = np.abs(before.astype(np.float32) - after.astype(np.float32)).mean(axis=2)
    rows, columns = height // side, width // side
    cells = change[: rows * side, : columns * side].reshape(rows, side, columns, side).mean(axis=(1, 3))
    best = np.argsort(-cells, axis=None, kind="stable")[:count]
    corners = [(int(cell % columns) * side, int(cell // columns) * side) for cell in best]
    return [(left, top, left + side, top + side) for left, top in corners]


def _case(case: Case, number: int) -> str:
    pictures = _all(case)
    shapes = {picture.image.shape for picture in pictures}
    if len(case.versions) < 2 or len(shapes) > 1:
        raise ValueError(f"{case.name}: needs at least two versions, all of one size, got {sorted(shapes)}")
    height, width = pictures[0].image.shape[:2]
    sources = [_embedded(picture.image) for picture in pictures]
    crops = find_crops(case.versions[0].image, case.versions[-1].image)
    return "\n".join(
        [
            f'<section class="case" aria-labelledby="case{number}">',
            f'<h2 id="case{number}">{html.escape(case.name)} <small>{width}×{height}</small></h2>',
            _slider(pictures, len(case.versions) - 1, crops),
            '<div class="versions">',
            *(_version(picture, source) for picture, source in zip(pictures, sources, strict=True)),
            "</div>",
            _zooms(pictures, crops),
            "</section>",
        ]
    )


def _slider(pictures: Sequence[Picture], after: int, crops: Sequence[Crop]) -> str:
    """The first version on the left of the divider, the result on the right; both can be chosen. Frames show where the
    crops below lie. The script takes the pictures from the row below, so that each is in the file once, and shows the
    slider."""

    def choice(side: str, chosen: int) -> str:
        options = "".join(
            f'<option value="{i}"{" selected" if i == chosen else ""}>{html.escape(picture.label)}</option>'
            for i, picture in enumerate(pictures)
        )
        return f'<label>{side} <select data-side="{side}">{options}</select></label>'

    height, width = pictures[0].image.shape[:2]
    frames = "".join(
        f'<span class="frame" style="left:{100 * left / width:.3f}%;top:{100 * top / height:.3f}%;'
        f'width:{100 * (right - left) / width:.3f}%;height:{100 * (bottom - top) / height:.3f}%" aria-hidden="true">'
        f"{number}</span>"
        for number, (left, top, right, bottom) in enumerate(crops, 1)
    )
    return (
        f'<div class="compare" style="--aspect:{width / height:.5f};--width:{width}px" hidden><div class="stage">'
        f'<img class="right" alt=""><img class="left" alt="">{frames}'
        '<span class="divider" aria-hidden="true"></span>'
        '<span class="tag tag-left" aria-hidden="true"></span><span class="tag tag-right" aria-hidden="true"></span>'
        '<input type="range" min="0" max="100" step="0.5" value="50" '
        'aria-label="divider between the two pictures, arrow keys move it"></div>'
        f'<div class="choices">{choice("left", 0)}{choice("right", after)}</div></div>'
    )


def _version(picture: Picture, source: str) -> str:
    figures = "".join(
        f"<div><dt>{NAMES.get(name, name.upper())}</dt><dd>{_number(name, value)}</dd></div>"
        for name, value in picture.figures.items()
    )
    return (
        f'<figure><img src="{source}" alt="{html.escape(picture.label)}" loading="lazy">'
        f"<figcaption>{html.escape(picture.label)}</figcaption>{f'<dl>{figures}</dl>' if figures else ''}</figure>"
    )


def _zooms(pictures: Sequence[Picture], crops: Sequence[Crop]) -> str:
    """Every version of each crop, enlarged."""
    zooms = []
    for number, (left, top, right, bottom) in enumerate(crops, 1):
        cells = "".join(
            f'<figure><img class="crop" src="{_embedded(picture.image[top:bottom, left:right], lossless=True)}" '
            f'alt="{html.escape(picture.label)}, enlarged">'
            f"<figcaption>{html.escape(picture.label)}</figcaption></figure>"
            for picture in pictures
        )
        where = f"<b>{number}</b> {right - left}×{bottom - top} pixels at x {left}, y {top}, enlarged"
        zooms.append(f'<div><p class="where">{where}</p><div class="crops">{cells}</div></div>')
    return f'<div class="zooms">{"".join(zooms)}</div>'


def _table(means: Mapping[str, Mapping[str, float]], caption: str) -> str:
    figures = list(dict.fromkeys(name for found in means.values() for name in found))
    head = "".join(f'<th scope="col">{NAMES.get(name, name.upper())}</th>' for name in figures)
    lines = "".join(
        f'<tr><th scope="row">{html.escape(label)}</th>'
        + "".join(f"<td>{_number(name, found[name]) if name in found else '–'}</td>" for name in figures)
        + "</tr>"
        for label, found in means.items()
    )
    return (
        f'<div class="scroll"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _facts(about: Mapping[str, str]) -> str:
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>" for name, text in about.items()
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def _all(case: Case) -> list[Picture]:
    return [*case.versions, *([case.truth] if case.truth else [])]


def _number(name: str, value: float) -> str:
    return f"{value:.{DIGITS.get(name, 4)}f}"


def _embedded(image: np.ndarray, lossless: bool = False) -> str:
    """A data URL: WebP at quality 92, shrunk when it is large; crops are lossless PNG."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if lossless:
        picture.save(stream, "PNG")
    else:
        picture.save(stream, "WEBP", quality=92)
    kind = "png" if lossless else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
