"""The checker of a data set: counts, sizes, and what is wrong with it, before a training run finds out."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dtpm_fast.data.layouts import SPLITS, Pair, Scan, SplitNotFound, scan_pairs
from dtpm_fast.data.pictures import different_sizes, find_photos, half_of_pairs
from dtpm_fast.errors import UserError
from dtpm_fast.images import read_image

Size = tuple[int, int]  # width, height


@dataclass
class Report:
    """What `check_folder` found; `problems` is empty when the data set can be trained on."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def text(self, show: int = 10) -> str:
        """Counts and sizes, then the first `show` problems, a line each."""
        lines = list(self.lines)
        if self.problems:
            lines.append(f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}:")
            lines += [f"  {problem}" for problem in self.problems[:show]]
            if len(self.problems) > show:
                lines.append(f"  and {len(self.problems) - show} more")
        else:
            lines.append("no problems")
        return "\n".join(lines)


def check_folder(task: str, root: Path | str, split: str | None = None, split_file: Path | str | None = None) -> Report:
    """Look for pairs of `task` in every layout, or else for clean photos alone, and decode every picture.

    `split` None takes every split that is there. Raises `UserError` when there is no such folder, and when there is
    neither a pair nor a photo.
    """
    root = Path(root)
    report = Report()
    reason: UserError = SplitNotFound(f"{root}: no pair of {task} in it" + (f" for the split {split}" if split else ""))
    scans: dict[tuple[Pair, ...], tuple[list[str], Scan]] = {}  # without split folders, every split is the whole
    for each in SPLITS if split is None else (split,):
        try:
            scan = scan_pairs(task, root, each, split_file)
        except UserError as error:
            if split is not None:
                raise
            reason = error
            continue
        scans.setdefault(tuple(scan.pairs), ([], scan))[0].append(each)
        report.problems += [problem for problem in scan.problems if problem not in report.problems]
    for pairs, (names, scan) in scans.items():
        if not pairs:
            continue
        sizes = _sizes([path for pair in pairs for path in pair], report.problems)
        report.problems += [
            different_sizes(degraded, sizes[degraded][::-1], target, sizes[target][::-1])
            for degraded, target in pairs
            if degraded in sizes and target in sizes and sizes[degraded] != sizes[target]
        ]
        summary = _summary([sizes[pair[0]] for pair in pairs if pair[0] in sizes])
        name = names[0] if len(names) == 1 or split_file is not None else "not split"
        report.lines.append(f"{name}: {len(pairs)} pairs, layout {scan.layout}{summary}")
    if report.lines or report.problems:
        return report
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if split_file is not None:
        raise reason  # it chooses among pairs
    try:
        photos = find_photos(root)
    except UserError:
        raise reason from None
    if half_of_pairs(photos, root) is not None:
        raise reason  # half a set of pairs is no set of clean photos
    sizes = _sizes(photos, report.problems)
    summary = _summary(list(sizes.values()))
    report.lines.append(f"{len(photos)} clean photos, no pairs{summary}; {task} trains from them synthetically")
    return report


def _sizes(paths: list[Path], problems: list[str]) -> dict[Path, Size]:
    """The size of every picture, decoded whole; a broken one becomes a problem."""
    sizes: dict[Path, Size] = {}
    with ThreadPoolExecutor(4) as pool:
        results = tqdm(pool.map(_size, paths), total=len(paths), desc="opening", leave=False, disable=None)
        for path, size in zip(paths, results, strict=True):
            if isinstance(size, str):
                if size not in problems:
                    problems.append(size)
            else:
                sizes[path] = size
    return sizes


def _size(path: Path) -> Size | str:
    try:
        picture: np.ndarray = read_image(path)
    except UserError as error:
        return str(error)
    return picture.shape[1], picture.shape[0]


def _summary(sizes: list[Size]) -> str:
    if not sizes:
        return ""
    counted = Counter(sizes).most_common(3)
    shown = ", ".join(f"{count} of {width}x{height}" for (width, height), count in counted)
    others = len(set(sizes)) - len(counted)
    megapixels = sum(width * height for width, height in sizes) / 1e6
    return f", {megapixels:.1f} MP ({shown}{f' and {others} other sizes' if others else ''})"
