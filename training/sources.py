"""What a run trains and validates on: photos for stage I; pairs, clean photos with synthetic degradations, or both
mixed, for stage II. Everything is found and checked here, before training starts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from dtpm_fast.config import TrainConfig
from dtpm_fast.data.crops import Augment, MixedCrops, PairCrops, SmoothedCrops, SomeClean, SyntheticCrops, smoothed_of
from dtpm_fast.data.layouts import LayoutNotFound, SplitNotFound, find_pairs
from dtpm_fast.data.pictures import PictureCache, find_photos
from dtpm_fast.errors import UserError

Pair = tuple[Tensor, Tensor]


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
        kept, held_out = _hold_out_photos(find_photos(photos), train.validation_images)
    else:
        kept, held_out = find_photos(photos), find_photos(validation)[: train.validation_images]
    options = {"seed": train.seed, "rotate45": train.rotate45, "cache": cache, "check": check}
    partners = None if smoothed is None else smoothed_of(photos, kept, smoothed)
    data = SmoothedCrops(kept, train.crop, smoothed=partners, **options)  # type: ignore[arg-type]
    count = min(train.validation_images, len(held_out))
    unseen = None
    if count:
        unseen = SmoothedCrops(held_out, train.crop, train.seed + 1, augment="none", cache=cache, check=check)
    return Source(
        data,
        [unseen[i] for i in range(count)] if unseen is not None else [],
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
    `validation`. `check` as for `stage1_source`."""
    cache = PictureCache()
    crop, seed = train.crop, train.seed
    pairs = _pairs_or_none(task, data, "train", split_file)
    if pairs is None and split_file is not None:
        raise UserError(f"--split-file {split_file}: chooses among pairs, and --data {data} holds none of {task}")
    if pairs is None and synthetic is not None:
        raise UserError(
            f"--synthetic {synthetic}: --data {data} holds clean photos already; give pairs there, or one of both"
        )
    if pairs is None:
        photos = find_photos(data)
        kept, held_out = hold_out(photos, train.validation_images) if validation is None else (photos, [])
        source: Dataset[Pair] = _synthetic(kept, task, train, cache, check)
        about = f"{len(kept)} clean photos of {data.name}, synthetic {task}"
        unseen = _validation(task, validation, train, cache, check) or SyntheticCrops(
            held_out, task, crop, seed + 1, strength=train.strength, augment="none", cache=cache,
            check=check and bool(held_out),
        )  # fmt: skip
    else:
        held_out_pairs: Sequence[tuple[Path, Path]] = []
        if validation is None:
            held_out_pairs = _pairs_or_none(task, data, "test", split_file) or []
            if not held_out_pairs or set(held_out_pairs) & set(pairs):
                pairs, held_out_pairs = hold_out(pairs, train.validation_images)
        source = PairCrops(pairs, crop, seed, augment=_augment(task), rotate45=train.rotate45, cache=cache, check=check)
        about = f"{len(pairs)} pairs of {data.name}"
        if synthetic is not None:
            photos = find_photos(synthetic)
            share = train.synthetic_share
            source = MixedCrops([(source, 1 - share), (_synthetic(photos, task, train, cache, check), share)], seed)
            about += f", and a share of {share:g} synthetic {task} on {len(photos)} clean photos of {synthetic.name}"
        unseen = _validation(task, validation, train, cache, check) or PairCrops(
            held_out_pairs, crop, seed + 1, augment="none", cache=cache, check=check and bool(held_out_pairs)
        )
    count = min(train.validation_images, len(getattr(unseen, "pairs", getattr(unseen, "photos", []))))
    if train.clean_share:
        source = SomeClean(source, train.clean_share, seed)
        about += f", {train.clean_share:g} of all samples clean"
    return Source(source, [unseen[i] for i in range(count)], about)


def hold_out(items: Sequence, count: int) -> tuple[list, list]:
    """(kept, held out): every tenth item, at least one and at most `count`. A single item is kept and held out both."""
    if count == 0:
        return list(items), []
    if len(items) == 1:
        return list(items), list(items)
    held_out = list(items[::10])[:count]
    taken = set(held_out)
    return [item for item in items if item not in taken], held_out


def _hold_out_photos(photos: list[Path], count: int) -> tuple[list[Path], list[Path]]:
    """As `hold_out`; of a photo that was cut into crops, all are out of training and the middle one validates."""
    crops: dict[Path, list[Path]] = {}
    for path in photos:
        crops.setdefault(path.with_name(re.sub(r"_y\d{5,}_x\d{5,}$", "", path.stem)), []).append(path)
    kept, held_out = hold_out(list(crops), count)
    middle = [crops[photo][len(crops[photo]) // 2] for photo in held_out]
    return [path for photo in kept for path in crops[photo]], middle


def _validation(
    task: str, folder: Path | None, train: TrainConfig, cache: PictureCache, check: bool
) -> PairCrops | SyntheticCrops | None:
    if folder is None:
        return None
    for split in ("test", "val", "train"):
        pairs = _pairs_or_none(task, folder, split, None)
        if pairs is not None:
            return PairCrops(pairs, train.crop, train.seed + 1, augment="none", cache=cache, check=check)
    return SyntheticCrops(
        find_photos(folder),
        task,
        train.crop,
        train.seed + 1,
        strength=train.strength,
        augment="none",
        cache=cache,
        check=check,
    )


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
