"""What a run trains and validates on: photos for stage I; pairs, clean photos with synthetic degradations, or both
mixed, for stage II. Everything is found and checked here, before training starts."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from dtpm_fast.config import TrainConfig
from dtpm_fast.data.crops import (
    Augment,
    MixedCrops,
    PairCrops,
    SmoothedCrops,
    SyntheticCrops,
    smoothed_of,
)
from dtpm_fast.data.layouts import LayoutNotFound, SplitNotFound, find_pairs
from dtpm_fast.data.pictures import PictureCache, find_photos, half_of_pairs
from dtpm_fast.data.shares import SomeClean, SomeJpeg, SomeNoisy
from dtpm_fast.errors import UserError

Pair = tuple[Tensor, Tensor]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """Training data, validation pairs, and a line that says what they are."""

    data: Dataset[Pair]
    validation: list[Pair]
    about: str


def stage1_source(
    photos: Path, smoothed: Path | None, validation: Path | None, train: TrainConfig, check: bool = True
) -> Source:
    """(x_g, y_s) crops of a folder of photos; validation on another folder, else on every tenth photo, held out with
    all the crops that `dtpm-smooth` cut from it.
    `check=False` leaves out the decoding of every picture: another process of this machine has done it."""
    cache = PictureCache()
    if validation is None:
        kept, held_out = hold_out(find_photos(photos), train.validation_images, _photo_of)
    else:
        kept, held_out = find_photos(photos), find_photos(validation)

    def partners(of: list[Path]) -> list[Path] | None:
        return None if smoothed is None else smoothed_of(photos, of, smoothed)

    data = SmoothedCrops(
        kept, train.crop, train.seed, smoothed=partners(kept), rotate45=train.rotate45, cache=cache, check=check
    )

    def unseen(photo: Path) -> SmoothedCrops:
        ahead = partners([photo]) if validation is None else None
        return SmoothedCrops(
            [photo], train.crop, train.seed + 1, smoothed=ahead, augment="none", cache=cache, check=check
        )

    return Source(
        data,
        _crop_of_each(held_out, train.validation_images, unseen),
        f"{len(data.photos)} photos of {photos.name}" + (", smoothed ahead" if smoothed else ", smoothed on the fly"),
    )


def stage2_source(
    task: str,
    data: Path,
    split_file: Path | None,
    synthetic: Path | None,
    validation: Path | None,
    train: TrainConfig,
    check: bool = True,
) -> Source:
    """(y_d, y_g) crops. `data` holds pairs in a layout of the task, or clean photos that are degraded synthetically;
    `synthetic` is a folder of clean photos to mix in beside real pairs. Validation: the layout's test split, else every
    tenth pair or photo, held out; or the pairs (of the first of test, val and train that it has) or photos of
    `validation`. What is held out of `data` is so with all crops of its photo and all pairs of its target, and is no
    photo of `synthetic` either. `check` as for `stage1_source`."""
    cache = PictureCache()
    crop, seed = train.crop, train.seed
    held_out: Sequence[Any] = []  # photos or pairs
    pairs = _pairs_or_none(task, data, "train", split_file)
    if pairs is None and split_file is not None:
        raise UserError(f"--split-file {split_file}: chooses among pairs, and --data {data} holds none of {task}")
    if pairs is None and synthetic is not None:
        raise UserError(
            f"--synthetic {synthetic}: --data {data} holds clean photos already; give pairs there, or one of both"
        )
    if pairs is None:
        photos = _clean_photos(data)
        kept = photos
        if validation is None:
            kept, held_out = hold_out(photos, train.validation_images, _photo_of)
        source: Dataset[Pair] = _synthetic(kept, task, train, cache, check)
        about = f"{len(kept)} clean photos of {data.name}, synthetic {task}"
    else:
        if validation is None:
            held_out = _pairs_or_none(task, data, "test", split_file) or []
            if not held_out or set(held_out) & set(pairs):
                pairs, held_out = hold_out(pairs, train.validation_images, lambda pair: _photo_of(pair[1]))
        source = PairCrops(pairs, crop, seed, augment=_augment(task), rotate45=train.rotate45, cache=cache, check=check)
        about = f"{len(pairs)} pairs of {data.name}"
        if synthetic is not None:
            out = {_photo_of(target.resolve()) for _, target in held_out}
            photos = [photo for photo in _clean_photos(synthetic) if _photo_of(photo.resolve()) not in out]
            if not photos:
                raise UserError(f"--synthetic {synthetic}: all of its photos are held out for validation; add others")
            share = train.synthetic_share
            source = MixedCrops([(source, 1 - share), (_synthetic(photos, task, train, cache, check), share)], seed)
            about += f", and a share of {share:g} synthetic {task} on {len(photos)} clean photos of {synthetic.name}"
    if validation is not None:
        held_out = _pairs_or_photos(task, validation)

    def unseen(item: Any) -> PairCrops | SyntheticCrops:
        if isinstance(item, tuple):
            return PairCrops([item], crop, seed + 1, augment="none", cache=cache, check=check)
        return SyntheticCrops(
            [item], task, crop, seed + 1, strength=train.strength, augment="none", cache=cache, check=check
        )

    if train.clean_share:
        source = SomeClean(source, train.clean_share, seed)
        about += f", {train.clean_share:g} of all samples clean"
    if train.noise_share:
        source = SomeNoisy(source, train.noise_share, seed)
        about += f", {train.noise_share:g} with noise"
    if train.jpeg_share:
        source = SomeJpeg(source, train.jpeg_share, seed)
        about += f", {train.jpeg_share:g} out of JPEG files"
    return Source(source, _crop_of_each(held_out, train.validation_images, unseen), about)


def hold_out(items: Sequence[Item], count: int, photo_of: Callable[[Item], Path]) -> tuple[list[Item], list[Item]]:
    """(kept, held out): every tenth photo, at least one and at most `count`, is out of training with all that was made
    of it, and the middle one of that validates. A single photo is kept and held out both."""
    groups: dict[Path, list[Item]] = {}
    for item in items:
        groups.setdefault(photo_of(item), []).append(item)
    photos = list(groups)
    taken = photos[::10][:count]
    kept = photos if len(photos) == 1 else [photo for photo in photos if photo not in set(taken)]
    middle = [groups[photo][len(groups[photo]) // 2] for photo in taken]
    return [item for photo in kept for item in groups[photo]], middle


def _photo_of(path: Path) -> Path:
    """The photo that a crop is of, by the name that `dtpm-smooth` gives it."""
    return path.with_name(re.sub(r"_y\d{5,}_x\d{5,}$", "", path.stem))


def _crop_of_each(items: Sequence[Any], count: int, unseen: Callable[[Any], Any]) -> list[Pair]:
    """One crop of each of at most `count` items, spread over them all."""
    count = min(count, len(items))
    return [unseen(items[i * len(items) // count])[i] for i in range(count)]


def _pairs_or_photos(task: str, folder: Path) -> Sequence[tuple[Path, Path]] | list[Path]:
    for split in ("test", "val", "train"):
        pairs = _pairs_or_none(task, folder, split, None)
        if pairs is not None:
            return pairs
    return _clean_photos(folder)


def _clean_photos(folder: Path) -> list[Path]:
    photos = find_photos(folder)
    half = half_of_pairs(photos, folder)
    if half is not None:
        raise UserError(
            f"{folder}: {half.name} in it looks like one half of pairs whose other half is in no known place; give a "
            f"layout of docs/degradations.md, or {half} itself if its pictures are clean photos"
        )
    return photos


def _synthetic(photos: list[Path], task: str, train: TrainConfig, cache: PictureCache, check: bool) -> SyntheticCrops:
    return SyntheticCrops(
        photos,
        task,
        train.crop,
        train.seed,
        strength=train.strength,
        augment="all",
        rotate45=train.rotate45,
        cache=cache,
        check=check,
    )


def _augment(task: str) -> Augment:
    """Rain and snow fall: turning a real pair on its side would make a picture that does not occur."""
    return "flip" if task in ("derain", "rainhaze", "desnow", "raindrop") else "all"


def _pairs_or_none(task: str, root: Path, split: str, split_file: Path | None) -> list[tuple[Path, Path]] | None:
    """The pairs under `root`, or None when it holds no layout of pairs, or none of this split."""
    try:
        return find_pairs(task, root, split, split_file).pairs
    except LayoutNotFound:
        return None
    except SplitNotFound:
        if split == "train":  # a folder of test pairs alone must not be taken for clean photos
            raise
        return None
