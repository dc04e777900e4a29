"""Pairs of degraded and clean pictures, found in the folder layouts that people have on disk.

A pair is a picture in a folder of degraded pictures and its partner in the folder of targets beside it. Per task, with
{split} being train, test or val:

    deblur     GoPro          {split}/*/blur + sharp (the original), {split}/input + target
    defocus    DPDD           {split}/inputC + target, {split}_c/source + target (the original)
    desnow     Snow100K       {split}/input or synthetic + gt; Snow100K-training/all/synthetic + gt and
                              Snow100K-testset/Snow100K-*/synthetic + gt (the original); published S and L lists
                              are split files
    rainhaze   Outdoor-Rain   {split}/in or input or data + gt, where im_0301_s80_a04.png belongs to im_0301.png;
    derain                    without {split} folders scenes 301 to 350 are the test, all others train
    dehaze
    raindrop   RainDrop       {split}/data + gt, where 12_rain.png belongs to 12_clean.png; test_a is a test split too
    any        input+target   {split}/input + target, equal names

Each also without the {split} folder (then every split is the whole, except for Outdoor-Rain). Suffixes may differ
within a pair. A split file chooses pictures by name instead: a CSV with the columns `name` and `split` (or `project`),
or a text file with one name or path a line.
"""

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dtpm_fast.errors import UserError
from dtpm_fast.images import SUFFIXES
from dtpm_fast.tasks import check_task

SPLITS = ("train", "test", "val")
Pair = tuple[Path, Path]


class LayoutNotFound(UserError):
    """A folder has pairs in no known layout, in no split: it may hold clean photos."""


class SplitNotFound(UserError):
    """A folder has pairs, but none in the wanted split."""


class Pairs(NamedTuple):
    """What `find_pairs` found: the layout's name, and (degraded path, target path) of every pair, sorted."""

    layout: str
    pairs: list[Pair]


@dataclass
class Scan:
    """The pairs of a folder, and a line for each picture that is in none."""

    layout: str
    pairs: list[Pair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_pairs(task: str, root: Path | str, split: str = "train", split_file: Path | str | None = None) -> Pairs:
    """The pairs of `task` under `root`, by the first layout that fits.

    With a CSV `split_file`, the pictures (in any split's folder) whose row says `split`; with a text file, those that
    it lists. Raises `LayoutNotFound` or `SplitNotFound`, both of them `UserError`s, when there is nothing, and
    `UserError` when a picture lacks its partner.
    """
    scan = scan_pairs(task, root, split, split_file)
    if scan.problems:
        more = f" (and {len(scan.problems) - 1} more like it)" if len(scan.problems) > 1 else ""
        raise UserError(f"{scan.problems[0]}{more}; list them: python -m dtpm_fast.data check --task {task} {root}")
    if not scan.pairs:
        raise SplitNotFound(f"{root}: no pairs for {task} in the split {split}, by the layout {scan.layout}")
    return Pairs(scan.layout, scan.pairs)


def scan_pairs(task: str, root: Path | str, split: str = "train", split_file: Path | str | None = None) -> Scan:
    """As `find_pairs`, with every picture without partner listed instead of the first one raised."""
    check_task(task)
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    layouts = [*LAYOUTS[task], GENERIC]
    wanted = SPLITS if split_file is not None else (split,)
    for layout in layouts:
        folders = [(each, pair) for each in wanted for pair in layout.find_folders(root, each)]
        if folders:
            scan = Scan(layout.name)
            for each, (degraded, targets) in dict.fromkeys(folders):
                _match(layout, degraded, targets, scan)
                if split_file is None and layout.belongs is not None and _is_unsplit(root, degraded):
                    scan.pairs = [pair for pair in scan.pairs if layout.belongs(pair[0].stem, each)]
            scan.pairs = sorted(set(scan.pairs))
            scan.problems = list(dict.fromkeys(scan.problems))
            if split_file is not None:
                _select(scan, Path(split_file), split)
            return scan
    others = [each for each in SPLITS if each != split and any(layout.find_folders(root, each) for layout in layouts)]
    if others:
        if split == "train":  # its test pictures must not be taken for a folder of clean photos
            raise SplitNotFound(
                f"{root}: pairs for {task} only in {' and '.join(others)}, none to train on; a split file chooses"
            )
        raise SplitNotFound(f"{root}: no pairs for {task} in the split {split}, only in {' and '.join(others)}")
    looked = [
        f"{pattern.format(split=split)} + {'/'.join(layout.targets)}"
        for layout in layouts
        for pattern in layout.patterns
    ]
    raise LayoutNotFound(f"{root}: no pairs for {task} in it; looked for {', '.join(dict.fromkeys(looked))}")


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps degraded pictures, and what their targets are called."""

    name: str
    patterns: tuple[str, ...]  # of the folder of degraded pictures, best first
    targets: tuple[str, ...]  # the folder beside it
    partner: Callable[[str], str] = str  # the target's stem for a degraded picture's stem
    belongs: Callable[[str, str], bool] | None = None  # (stem, split), where no folder says the split
    by_order: bool = False  # where no name is shared, the sorted lists correspond

    def find_folders(self, root: Path, split: str) -> list[Pair]:
        """(degraded folder, target folder) of the first pattern that is there."""
        for pattern in self.patterns:
            found = [
                (degraded, degraded.parent / target)
                for degraded in sorted(root.glob(pattern.format(split=split)))
                for target in self.targets
                if degraded.is_dir() and (degraded.parent / target).is_dir()
            ]
            if found:
                return found
        return []


def _scene_target(stem: str) -> str:
    """im_0301_s80_a04 -> im_0301; any other name stays."""
    scene = re.fullmatch(r"(im_\d+)_s\d+_a\d+", stem)
    return scene.group(1) if scene else stem


def _scene_belongs(stem: str, split: str) -> bool:
    number = re.match(r"im_(\d+)", stem)
    is_test = number is not None and 301 <= int(number.group(1)) <= 350
    return split == "test" if is_test else split == "train"


def _drop_target(stem: str) -> str:
    return stem[: -len("_rain")] + "_clean" if stem.endswith("_rain") else stem


def _patterns(*folders: str) -> tuple[str, ...]:
    return tuple(f"{{split}}/{folder}" for folder in folders) + folders


GENERIC = Layout("input+target", _patterns("input"), ("target",))
_OUTDOOR_RAIN = Layout("Outdoor-Rain", _patterns("in", "input", "data"), ("gt",), _scene_target, _scene_belongs)
LAYOUTS: dict[str, list[Layout]] = {
    "deblur": [Layout("GoPro", _patterns("*/blur"), ("sharp",))],
    "defocus": [
        Layout("DPDD", ("{split}/inputC", "{split}_c/source", "{split}_c/inputC", "inputC"), ("target",), by_order=True)
    ],
    "desnow": [
        Layout(
            "Snow100K",
            (
                "{split}/input",
                "{split}/synthetic",
                "Snow100K-{split}ing/all/synthetic",
                "Snow100K-{split}set/*/synthetic",
                "Snow100K-*/synthetic",
                "all/synthetic",
                "input",
                "synthetic",
            ),
            ("gt",),
        )
    ],
    "rainhaze": [_OUTDOOR_RAIN],
    "derain": [_OUTDOOR_RAIN],
    "dehaze": [_OUTDOOR_RAIN],
    "raindrop": [
        Layout("RainDrop", ("{split}/data", "{split}_a/data", "data"), ("gt",), _drop_target),
    ],
}


def _is_unsplit(root: Path, degraded: Path) -> bool:
    return degraded.parent == root


def _match(layout: Layout, degraded_folder: Path, target_folder: Path, scan: Scan) -> None:
    """Add the pairs of two folders to `scan`, and a problem for each picture that is in none."""
    degraded = _by_stem(degraded_folder, scan.problems)
    targets = _by_stem(target_folder, scan.problems)
    if not degraded:
        scan.problems.append(f"{degraded_folder}: no pictures in it")
        return
    if layout.by_order and not degraded.keys() & targets.keys() and len(degraded) == len(targets):
        scan.pairs += zip(degraded.values(), targets.values(), strict=True)
        return
    used = set()
    for stem, path in degraded.items():
        partner = stem if stem in targets else layout.partner(stem)
        if partner in targets:
            scan.pairs.append((path, targets[partner]))
            used.add(partner)
        else:
            scan.problems.append(f"{path}: no partner, {target_folder} has no picture named {partner}")
    for stem in targets.keys() - used:
        scan.problems.append(f"{targets[stem]}: no partner, no picture in {degraded_folder} belongs to it")


def _by_stem(folder: Path, problems: list[str]) -> dict[str, Path]:
    """The pictures of a folder by their name without suffix, sorted."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                problems.append(f"{path}: the same name as {found[path.stem].name}; one of them must go")
            found.setdefault(path.stem, path)
    return found


def _select(scan: Scan, split_file: Path, split: str) -> None:
    """Keep the pairs that the split file names; a problem of a picture outside the split stays a problem."""
    chosen: set[Pair] = set()
    for name in sorted(read_split(split_file, split)):
        parts = PurePosixPath(name.lstrip("./")).parts
        same_name = [pair for pair in scan.pairs if pair[0].stem == parts[-1]]
        same_path = [pair for pair in same_name if pair[0].parts[-len(parts) : -1] == parts[:-1]]
        found = same_path or same_name
        if not found:
            scan.problems.append(f"{split_file}: names {name}, which is no pair on disk")
        elif len(found) > 1:
            scan.problems.append(
                f"{split_file}: names {name}, and {len(found)} pairs have that name, the first two {found[0][0]} and "
                f"{found[1][0]}; give the folders as well, as in {'/'.join(found[0][0].parts[-3:])}"
            )
        else:
            chosen.add(found[0])
    scan.pairs = [pair for pair in scan.pairs if pair in chosen]


def read_split(split_file: Path | str, split: str) -> set[str]:
    """The names (without suffix, with the folders that are given, "/" between them) that a split file gives to `split`.
    Raises `UserError` when it cannot be read or lacks a column, `SplitNotFound` when it gives none."""
    split_file = Path(split_file)
    try:
        lines = split_file.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets begin with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{split_file}: not a readable split file ({error})") from error
    if split_file.suffix.lower() != ".csv":
        names = _without_suffix(lines)
    else:
        rows = list(csv.DictReader(lines))
        columns: Sequence[str] = list(rows[0]) if rows else []
        column = next((name for name in ("split", "project") if name in columns), None)
        if "name" not in columns or column is None:
            raise UserError(f"{split_file}: needs the columns name and split (or project), has {', '.join(columns)}")
        names = _without_suffix(row["name"] or "" for row in rows if row[column] == split)
    if not names:
        raise SplitNotFound(f"{split_file}: names no picture for the split {split!r}")
    return names


def _without_suffix(names: Iterable[str]) -> set[str]:
    """A dot in a name is no suffix: astronaut-0.7."""
    paths = {Path(name.strip()) for name in names if name.strip()}
    return {(path.with_suffix("") if path.suffix.lower() in SUFFIXES else path).as_posix() for path in paths}
