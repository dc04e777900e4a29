"""Training samples: random crops of photos and of pairs, without end and without state.

Sample `index` (any integer >= 0) of a data set is a pure function of the data set's arguments and the index: its random
generator is `numpy.random.default_rng([seed, index])`. Resuming a run is therefore starting at a later index, and the
number of workers changes nothing. The data sets have no length: give the loader the range of indices as its sampler,

    DataLoader(PhotoCrops("photos", crop=96, seed=0), batch_size=8, sampler=range(first, last), num_workers=2)

Every picture is decoded and checked when a data set is made (`check=False` leaves that out, for the further processes
of one machine), so that a broken file stops a run before it starts, with a `UserError` that names the file.

`augment` is "all" (flips and quarter turns), "flip" (left-right only: what keeps gravity, for streaks and flakes that
fall) or "none". `rotate45=True` also turns every second sample by 45 degrees (bilinear), cut from the inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dtpm_fast.data.degradations import border, degrade
from dtpm_fast.data.pictures import (
    PictureCache,
    check_pairs,
    check_photos,
    different_sizes,
    find_photos,
)
from dtpm_fast.errors import UserError
from dtpm_fast.smoothing import rtv_smooth
from dtpm_fast.tasks import check_task

Augment = Literal["all", "flip", "none"]
Photos = Path | str | Sequence[Path]


class PhotoCrops(Dataset[Tensor]):
    """Clean crops: `self[index]` is float32 (3, crop, crop) in [-1, 1], from a photo chosen uniformly.

    `folder` is searched with its subfolders; a list of paths is taken as it is. Photos smaller than the crop are
    reflect-padded. Raises `UserError` for a missing or empty folder and a broken picture.
    """

    def __init__(
        self,
        folder: Photos,
        crop: int,
        seed: int = 0,
        *,
        augment: Augment = "all",
        rotate45: bool = False,
        cache: PictureCache | None = None,
        check: bool = True,
    ) -> None:
        self.photos = _photos(folder)
        self.crop, self.seed, self.augment, self.rotate45 = _checked_crop(crop), seed, _checked(augment), rotate45
        self.cache = PictureCache() if cache is None else cache
        if check:
            check_photos(self.photos, self.cache)

    def __getitem__(self, index: int) -> Tensor:
        rng = sample_rng(self.seed, index)
        photo = self.cache.read(self.photos[rng.integers(len(self.photos))])
        window = Window.draw(photo.shape[0], photo.shape[1], self.crop, rng, self.augment, self.rotate45)
        return to_tensor(window.cut(photo))


# RTV's windows see zeros beyond a picture's border: the smoothed one is another in a frame of some pixels.
_SMOOTHED_AROUND = 8


class SmoothedCrops(Dataset[tuple[Tensor, Tensor]]):
    """Stage I (eq. 4): `self[index]` is (x_g, y_s), both float32 (3, crop, crop) in [-1, 1]: a clean crop and its
    texture-free form.

    y_s is `dtpm_fast.smoothing.rtv_smooth` of the crop and 8 pixels around it, on one thread, or, with `smoothed`, the
    same place of the picture of the same name (any picture suffix, same subfolder; of a list of photos, the name alone)
    in that folder, as `dtpm-smooth` writes it; or of a list that has one for each photo, as `smoothed_of` makes it.
    Raises `UserError` as `PhotoCrops` does, and for a smoothed picture that is missing or of another size.
    """

    def __init__(
        self,
        folder: Photos,
        crop: int,
        seed: int = 0,
        *,
        smoothed: Photos | None = None,
        augment: Augment = "all",
        rotate45: bool = False,
        cache: PictureCache | None = None,
        check: bool = True,
    ) -> None:
        self.photos = _photos(folder)
        self.crop, self.seed, self.augment, self.rotate45 = _checked_crop(crop), seed, _checked(augment), rotate45
        self.cache = PictureCache() if cache is None else cache
        self.smoothed: Sequence[Path] | None
        if isinstance(smoothed, (str, Path)):
            self.smoothed = smoothed_of(folder, self.photos, Path(smoothed))
        else:
            self.smoothed = smoothed
        if check and self.smoothed is not None:
            check_pairs(list(zip(self.smoothed, self.photos, strict=True)), self.cache)
        elif check:
            check_photos(self.photos, self.cache)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = sample_rng(self.seed, index)
        choice = int(rng.integers(len(self.photos)))
        photo = self.cache.read(self.photos[choice])
        margin = 0 if self.smoothed is not None else _SMOOTHED_AROUND
        size = self.crop + 2 * margin
        window = Window.draw(photo.shape[0], photo.shape[1], size, rng, self.augment, self.rotate45)
        clean = window.cut(photo)
        if self.smoothed is not None:
            return to_tensor(clean), to_tensor(window.cut(self.cache.read(self.smoothed[choice])))
        inside = slice(margin, margin + self.crop)
        smooth = rtv_smooth(clean.astype(np.float32) / 255, threads=1)[inside, inside].transpose(2, 0, 1)
        return to_tensor(clean[inside, inside]), torch.from_numpy(np.ascontiguousarray(smooth)).mul_(2).sub_(1)


class PairCrops(Dataset[tuple[Tensor, Tensor]]):
    """Pairs: `self[index]` is (y_d, y_g), both float32 (3, crop, crop) in [-1, 1]: the same place of a degraded picture
    and of its target.

    `pairs` is a list of (degraded path, target path), as `find_pairs(...).pairs` gives it. Raises `UserError` for an
    empty list, a broken picture and a pair of different sizes.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        crop: int,
        seed: int = 0,
        *,
        augment: Augment = "all",
        rotate45: bool = False,
        cache: PictureCache | None = None,
        check: bool = True,
    ) -> None:
        self.pairs = [(Path(degraded), Path(target)) for degraded, target in pairs]
        self.crop, self.seed, self.augment, self.rotate45 = _checked_crop(crop), seed, _checked(augment), rotate45
        self.cache = PictureCache() if cache is None else cache
        if check:
            check_pairs(self.pairs, self.cache)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = sample_rng(self.seed, index)
        degraded_path, target_path = self.pairs[rng.integers(len(self.pairs))]
        degraded, target = self.cache.read(degraded_path), self.cache.read(target_path)
        if degraded.shape != target.shape:  # only without the check at the start
            raise UserError(different_sizes(degraded_path, degraded.shape, target_path, target.shape))
        window = Window.draw(target.shape[0], target.shape[1], self.crop, rng, self.augment, self.rotate45)
        return to_tensor(window.cut(degraded)), to_tensor(window.cut(target))


class SyntheticCrops(Dataset[tuple[Tensor, Tensor]]):
    """Pairs made from clean photos: `self[index]` is (y_d, y_g), both float32 (3, crop, crop) in [-1, 1].

    y_d is `dtpm_fast.data.degradations.degrade(task, ...)` of the crop, rounded to 8 bits as a picture on disk is;
    where a degradation reaches beyond the crop (blur), a larger piece is degraded and its inside cut. `strength` is one
    number (1 is the range of degradations that a data set of the task has) or a (low, high) range, drawn uniformly per
    sample.
    Raises `UserError` as `PhotoCrops` does, and for an unknown task or a negative strength.
    """

    def __init__(
        self,
        folder: Photos,
        task: str,
        crop: int,
        seed: int = 0,
        *,
        strength: float | tuple[float, float] = 1.0,
        augment: Augment = "all",
        rotate45: bool = False,
        cache: PictureCache | None = None,
        check: bool = True,
    ) -> None:
        self.photos = _photos(folder)
        self.task = check_task(task)
        self.crop, self.seed, self.augment, self.rotate45 = _checked_crop(crop), seed, _checked(augment), rotate45
        self.strength = strength if isinstance(strength, tuple) else (strength, strength)
        if not 0 <= self.strength[0] <= self.strength[1]:
            raise UserError(f"strength {strength}: must be a number >= 0 or a range (low, high) with 0 <= low <= high")
        self.cache = PictureCache() if cache is None else cache
        if check:
            check_photos(self.photos, self.cache)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = sample_rng(self.seed, index)
        photo = self.cache.read(self.photos[rng.integers(len(self.photos))])
        strength = float(rng.uniform(*self.strength))
        margin = border(self.task, strength)
        size = self.crop + 2 * margin
        window = Window.draw(photo.shape[0], photo.shape[1], size, rng, self.augment, self.rotate45)
        clean = window.cut(photo)
        degraded = degrade(self.task, clean.astype(np.float32) / 255, rng, strength)
        degraded8 = np.rint(degraded * 255).astype(np.uint8)
        inside = slice(margin, margin + self.crop)
        return to_tensor(degraded8[inside, inside]), to_tensor(clean[inside, inside])


class MixedCrops(Dataset[tuple[Tensor, Tensor]]):
    """Several sources in one: `self[index]` is `source[index]` of a source drawn with probability weight / sum of
    weights, by a generator of its own, so that the choice is independent of what the source draws.

    Raises `UserError` when there is no source, or a weight is negative or not finite, or all are 0.
    """

    def __init__(self, sources: Sequence[tuple[Dataset[tuple[Tensor, Tensor]], float]], seed: int = 0) -> None:
        weights = np.array([weight for _, weight in sources], dtype=np.float64)
        if not np.all(np.isfinite(weights)) or np.any(weights < 0) or weights.sum() <= 0:
            raise UserError(f"weights of the mixed data sets {weights.tolist()}: must be >= 0, and one of them above 0")
        self.sources = [source for source, _ in sources]
        self.cumulative = np.cumsum(weights / weights.sum())
        self.seed = seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        draw = sample_rng(self.seed, index, Stream.SOURCE).random() * self.cumulative[-1]
        return self.sources[int(np.searchsorted(self.cumulative, draw, side="right"))][index]


@dataclass(frozen=True)
class Window:
    """A square place in a picture, with the flip and turns applied to what is cut there."""

    top: int
    left: int
    size: int
    flip: bool = False
    quarter_turns: int = 0
    diagonal: bool = False

    @staticmethod
    def draw(
        height: int, width: int, size: int, rng: np.random.Generator, augment: Augment = "all", rotate45: bool = False
    ) -> "Window":
        """Uniform over the places inside HxW; where the picture is smaller than the window, the middle of the
        reflect-padded picture."""
        diagonal = bool(rng.random() < 0.5) if rotate45 else False
        outer = _outer(size) if diagonal else size
        top = int(rng.integers(max(height - outer, 0) + 1))
        left = int(rng.integers(max(width - outer, 0) + 1))
        flip = bool(rng.random() < 0.5) if augment != "none" else False
        turns = int(rng.integers(4)) if augment == "all" else 0
        return Window(top, left, size, flip, turns, diagonal)

    def cut(self, picture: np.ndarray) -> np.ndarray:
        """size x size x C uint8 of an HxWxC uint8 picture. Equal windows of equal-sized pictures show one place."""
        outer = _outer(self.size) if self.diagonal else self.size
        height, width = picture.shape[:2]
        if height < outer or width < outer:
            short = max(outer - height, 0), max(outer - width, 0)
            pads = [(missing // 2, missing - missing // 2) for missing in short]
            picture = np.pad(picture, [*pads, (0, 0)], mode="reflect")
        piece = picture[self.top : self.top + outer, self.left : self.left + outer]
        if self.diagonal:
            turned = np.asarray(Image.fromarray(piece).rotate(45, Image.Resampling.BILINEAR))
            inset = (outer - self.size) // 2
            piece = turned[inset : inset + self.size, inset : inset + self.size]
        if self.flip:
            piece = piece[:, ::-1]
        return np.ascontiguousarray(np.rot90(piece, self.quarter_turns))


class Stream(IntEnum):
    """What a sample draws independently of the rest of it."""

    CROP = 0  # the picture, the window, the degradation
    SOURCE = 1  # of mixed data sets
    NOISE = 2  # eps and gamma
    CLEAN = 3  # whether the degraded picture is the clean one
    JPEG = 4  # whether the degraded picture comes out of a JPEG file, and of which
    SENSOR = 5  # whether the degraded picture has a sensor's noise, and which


def sample_rng(seed: int, index: int, stream: Stream = Stream.CROP) -> np.random.Generator:
    """The generator of one sample. Raises `IndexError` for a negative index: there is no end to count from."""
    if index < 0:
        raise IndexError(f"sample index {index}: must be 0 or more")
    return np.random.default_rng([seed, index] if stream == Stream.CROP else [seed, index, stream])


def to_tensor(picture: np.ndarray) -> Tensor:
    """float32 (3, H, W) in [-1, 1] of HxWx3 uint8."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).float().div_(127.5).sub_(1)


def _outer(size: int) -> int:
    """The side of the square that holds a size x size square turned by 45 degrees, with a pixel for interpolation; of
    the size's parity, so that both share their middle."""
    outer = int(np.ceil(size * np.sqrt(2))) + 2
    return outer + (outer - size) % 2


def _photos(folder: Photos) -> list[Path]:
    return find_photos(folder) if isinstance(folder, (str, Path)) else [Path(path) for path in folder]


def smoothed_of(folder: Photos, photos: Sequence[Path], smoothed: Path) -> list[Path]:
    """For each photo the picture of the same name, whatever its suffix, in the folder `smoothed`. Raises `UserError`
    where there is none, and where two photos or two of the smoothed pictures have one name."""
    by_name = _by_name(find_photos(smoothed), smoothed)
    of = _by_name(photos, Path(folder) if isinstance(folder, (str, Path)) else None)
    for name, photo in of.items():
        if name not in by_name:
            raise UserError(f"{photo}: no smoothed picture of this name in {smoothed}; make them with dtpm-smooth")
    return [by_name[name] for name in of]


def _by_name(paths: Sequence[Path], root: Path | None) -> dict[Path, Path]:
    """In their order, by their names without suffix, below `root` if there is one."""
    found: dict[Path, Path] = {}
    for path in paths:
        name = (path.relative_to(root) if root else Path(path.name)).with_suffix("")
        if name in found:
            raise UserError(f"{found[name]} and {path}: have one name, and so one smoothed picture; rename one")
        found[name] = path
    return found


def _checked_crop(crop: int) -> int:
    if crop < 1:
        raise UserError(f"crop {crop}: must be at least 1 pixel")
    return crop


def _checked(augment: Augment) -> Augment:
    if augment not in ("all", "flip", "none"):
        raise UserError(f"augment {augment!r}: must be one of all, flip, none")
    return augment
