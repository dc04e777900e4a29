"""The pictures of a data set: found in folders, checked before training starts, kept decoded in memory."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dtpm_fast.errors import UserError
from dtpm_fast.images import SUFFIXES, read_image

DEFAULT_CACHE_BYTES = 2 * 2**30


def find_photos(folder: Path | str) -> list[Path]:
    """Every picture inside a folder, its subfolders and links to folders included, sorted by path; hidden names are
    left out, and so is what is no file (a pipe); a link that leads nowhere is not, so that it will be named. Raises
    `UserError` when there is no such folder or no picture in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(
        path for path in _files(folder) if path.suffix.lower() in SUFFIXES and (path.is_file() or not path.exists())
    )
    if not found:
        raise UserError(f"{folder}: no pictures in it (looked for {', '.join(sorted(SUFFIXES))})")
    return found


def named_photos(names: Iterable[Path | str]) -> list[Path]:
    """The files among these, and the photos of the folders among them, in this order. Raises `UserError` for a folder
    without pictures."""
    paths = [Path(name) for name in names]
    return [photo for path in paths for photo in (find_photos(path) if path.is_dir() else [path])]


_HALVES = ("input", "target", "inputC", "gt", "data", "synthetic", "blur", "sharp", "source")


def half_of_pairs(photos: Iterable[Path], root: Path) -> Path | None:
    """A folder inside `root` that holds some of the photos under a name that layouts of pairs give their halves."""
    folders = dict.fromkeys(photo.parent for photo in photos)
    return next((folder for folder in folders if folder != root and folder.name in _HALVES), None)


def _files(top: Path) -> Iterator[Path]:
    """Links to folders come last, and a folder only once: links may lead in a circle."""
    seen: set[str] = set()
    tops = [top]
    for start in tops:
        for folder, below, names in os.walk(start):  # lists links among `below` and does not enter them
            below[:] = sorted(name for name in below if not name.startswith("."))
            if (place := os.path.realpath(folder)) in seen:
                below.clear()
                continue
            seen.add(place)
            tops += [path for name in below if (path := Path(folder, name)).is_symlink()]
            yield from (Path(folder, name) for name in names if not name.startswith("."))


class PictureCache:
    """Decoded pictures, HxWx3 uint8, kept until `max_bytes` are full; later ones are decoded at each use.

    Nothing is evicted: crops fall on photos uniformly, where an older picture is worth as much as a newer one, and the
    pages that are filled before a DataLoader forks its workers stay shared between them. One cache may serve several
    data sets. A pickled copy (DataLoader workers under "spawn") starts empty.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._pictures: dict[Path, np.ndarray] = {}

    def read(self, path: Path) -> np.ndarray:
        """HxWx3 uint8, read-only. Raises `UserError` naming the file when it is no picture."""
        picture = self.decode(path)
        self.keep(path, picture)
        return picture

    def decode(self, path: Path) -> np.ndarray:
        """As `read`, without keeping it: what threads may call."""
        picture = self._pictures.get(path)
        if picture is None:
            picture = read_image(path)
            picture.setflags(write=False)
        return picture

    def keep(self, path: Path, picture: np.ndarray) -> None:
        """Keep a decoded picture if there is room."""
        if path not in self._pictures and self.used_bytes + picture.nbytes <= self.max_bytes:
            self._pictures[path] = picture
            self.used_bytes += picture.nbytes

    def __getstate__(self) -> dict[str, Any]:
        return {"max_bytes": self.max_bytes, "used_bytes": 0, "_pictures": {}}


def check_photos(paths: Sequence[Path], cache: PictureCache | None = None) -> None:
    """Decode every picture once (into `cache`, while it has room). Raises `UserError` naming the first broken one, or
    when there is none."""
    if not paths:
        raise UserError("no pictures to train on: the list is empty")
    cache = cache or PictureCache(0)
    for _ in _decoded(paths, cache, "checking photos"):
        pass


def check_pairs(pairs: Sequence[tuple[Path, Path]], cache: PictureCache | None = None) -> list[tuple[int, int]]:
    """Decode every picture of every pair once (into `cache`, while it has room): (height, width) of every pair. Raises
    `UserError` naming the first broken picture or pair of different sizes, or when there is no pair."""
    if not pairs:
        raise UserError("no pairs: the list is empty")
    cache = cache or PictureCache(0)
    paths = [path for pair in pairs for path in pair]
    shapes = [picture.shape for picture in _decoded(paths, cache, "checking pairs")]
    for (degraded, target), shape, target_shape in zip(pairs, shapes[::2], shapes[1::2], strict=True):
        if shape != target_shape:
            raise UserError(different_sizes(degraded, shape, target, target_shape))
    return [shape[:2] for shape in shapes[::2]]


def different_sizes(degraded: Path, shape: Sequence[int], target: Path, target_shape: Sequence[int]) -> str:
    """The line that says so; shapes are HxWx3."""
    return (
        f"{degraded}: {shape[1]}x{shape[0]} pixels, but its target {target} has {target_shape[1]}x{target_shape[0]}; "
        "both pictures of a pair must have one size"
    )


def _decoded(paths: Sequence[Path], cache: PictureCache, what: str) -> Iterable[np.ndarray]:
    # Pillow decodes without the interpreter's lock; a bounded batch keeps at most a few pictures outside the cache.
    with ThreadPoolExecutor(4) as pool, tqdm(total=len(paths), desc=what, leave=False, disable=None) as bar:
        for start in range(0, len(paths), 16):
            batch = paths[start : start + 16]
            for path, picture in zip(batch, pool.map(cache.decode, batch), strict=True):
                cache.keep(path, picture)
                bar.update()
                yield picture
