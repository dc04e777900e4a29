import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dtpm_fast.data.crops import (
    MixedCrops,
    PairCrops,
    PhotoCrops,
    SmoothedCrops,
    SyntheticCrops,
    Window,
    sample_rng,
    to_tensor,
)
from dtpm_fast.data.layouts import find_pairs
from dtpm_fast.data.pictures import PictureCache
from dtpm_fast.errors import UserError
from dtpm_fast.images import read_image
from dtpm_fast.tasks import TASKS

CROP = 17


def make_pairs(folder: Path, picture: Callable[..., Path], count: int = 3) -> list[tuple[Path, Path]]:
    for seed in range(count):
        picture(folder / f"input/{seed}.png", 30 + seed, 21, seed)
        picture(folder / f"target/{seed}.png", 30 + seed, 21, seed)
    return find_pairs("derain", folder).pairs


def every_dataset(photos: Path, pairs: list[tuple[Path, Path]], seed: int) -> dict[str, object]:
    return {
        "photo": PhotoCrops(photos, CROP, seed, rotate45=True),
        "smoothed": SmoothedCrops(photos, CROP, seed),
        "pair": PairCrops(pairs, CROP, seed),
        "synthetic": SyntheticCrops(photos, "deblur", CROP, seed, strength=(0.5, 1.5)),
        "mixed": MixedCrops(
            [(PairCrops(pairs, CROP, seed), 1), (SyntheticCrops(photos, "derain", CROP, seed), 2)], seed
        ),
    }


def as_bytes(sample: object) -> bytes:
    tensors = sample if isinstance(sample, (tuple, list)) else [sample]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


@pytest.mark.parametrize("kind", ["photo", "smoothed", "pair", "synthetic", "mixed"])
def test_sample_is_a_function_of_seed_and_index(
    kind: str, photos: Path, tmp_path: Path, picture: Callable[..., Path]
) -> None:
    pairs = make_pairs(tmp_path / "pairs", picture)
    first, again, other = (every_dataset(photos, pairs, seed)[kind] for seed in (3, 3, 4))
    indices = [0, 1, 7, 10**9]
    forward = [as_bytes(first[index]) for index in indices]  # type: ignore[index]
    backward = [as_bytes(again[index]) for index in reversed(indices)]  # type: ignore[index]
    assert forward == backward[::-1]
    assert len(set(forward)) == len(indices)
    assert forward != [as_bytes(other[index]) for index in indices]  # type: ignore[index]


@pytest.mark.parametrize("kind", ["photo", "smoothed", "pair", "synthetic", "mixed"])
def test_shapes_types_and_range(kind: str, photos: Path, tmp_path: Path, picture: Callable[..., Path]) -> None:
    dataset = every_dataset(photos, make_pairs(tmp_path / "pairs", picture), 0)[kind]
    for index in range(12):
        sample = dataset[index]  # type: ignore[index]
        tensors = sample if isinstance(sample, tuple) else (sample,)
        assert len(tensors) == (1 if kind == "photo" else 2)
        for tensor in tensors:
            assert tensor.shape == (3, CROP, CROP)
            assert tensor.dtype == torch.float32
            assert -1 <= tensor.min() <= tensor.max() <= 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is one core
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, photos: Path) -> None:
    dataset = SyntheticCrops(photos, "derain", CROP, seed=5)
    expected = [as_bytes(dataset[index]) for index in range(40, 52)]
    loader = DataLoader(
        dataset, batch_size=4, sampler=range(40, 52), num_workers=workers, multiprocessing_context="spawn"
    )
    samples = [(degraded, clean) for batch in loader for degraded, clean in zip(*batch, strict=True)]
    assert [as_bytes(sample) for sample in samples] == expected


def test_negative_index_is_refused(photos: Path) -> None:
    with pytest.raises(IndexError, match="-1"):
        PhotoCrops(photos, CROP)[-1]


def test_crops_come_from_the_photo_and_reach_all_of_it() -> None:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    seen = set()
    for index in range(800):
        window = Window.draw(9, 12, 5, sample_rng(0, index))
        piece = window.cut(photo)
        upright = np.rot90(piece, -window.quarter_turns)
        if window.flip:
            upright = upright[:, ::-1]
        np.testing.assert_array_equal(upright, photo[window.top : window.top + 5, window.left : window.left + 5])
        seen.add((window.top, window.left))
    assert seen == {(top, left) for top in range(5) for left in range(8)}


@pytest.mark.parametrize(("augment", "variants"), [("all", 8), ("flip", 2), ("none", 1)])
def test_augmentations(augment: str, variants: int) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    pieces = {Window.draw(6, 6, 6, sample_rng(1, index), augment).cut(photo).tobytes() for index in range(100)}  # type: ignore[arg-type]
    assert len(pieces) == variants
    assert photo.tobytes() in pieces


@pytest.mark.parametrize("size", [5, 6, 31, 64])
def test_diagonal_cut_lies_inside_the_photo(size: int) -> None:
    """White stays white: nothing of the corners that a turned picture lacks (black) is in the crop."""
    white = np.full((120, 120, 3), 255, dtype=np.uint8)
    window = Window(3, 5, size, diagonal=True)
    assert window.cut(white).shape == (size, size, 3)
    assert window.cut(white).min() == 255


def test_diagonal_cut_turns_by_45_degrees() -> None:
    down, right = np.mgrid[:80, :80]
    stripes = np.repeat(((down + right) // 8 % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)  # along the diagonal
    turned = Window(0, 0, 32, diagonal=True).cut(stripes).astype(float)
    along = min(np.abs(np.diff(turned, axis=0)).mean(), np.abs(np.diff(turned, axis=1)).mean())
    across = max(np.abs(np.diff(turned, axis=0)).mean(), np.abs(np.diff(turned, axis=1)).mean())
    assert along < 0.2 * across


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 40), (40, 3), (16, 17)])
def test_small_photos_are_reflected(height: int, width: int) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    piece = Window.draw(height, width, CROP, sample_rng(0, 0), "none").cut(photo)
    assert piece.shape == (CROP, CROP, 3)
    assert {tuple(pixel) for pixel in piece.reshape(-1, 3)} <= {tuple(pixel) for pixel in photo.reshape(-1, 3)}


@pytest.mark.parametrize("rotate45", [False, True])
def test_both_pictures_of_a_pair_are_cut_alike(tmp_path: Path, picture: Callable[..., Path], rotate45: bool) -> None:
    pairs = make_pairs(tmp_path, picture)  # equal contents
    dataset = PairCrops(pairs, CROP, 0, rotate45=rotate45)
    for index in range(10):
        degraded, clean = dataset[index]
        assert torch.equal(degraded, clean)


def test_smoothed_ahead_is_cut_from_the_same_place(photos: Path, tmp_path: Path) -> None:
    smoothed = tmp_path / "smoothed"
    for path in photos.rglob("*.*"):
        target = (smoothed / path.relative_to(photos)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - read_image(path)).save(target)
    dataset = SmoothedCrops(photos, CROP, 0, smoothed=smoothed)
    for index in range(10):
        clean, smooth = dataset[index]
        torch.testing.assert_close(clean, -smooth, atol=1e-6, rtol=0)
    tiny = smoothed / "deep/tiny.png"
    twice = tiny.with_suffix(".bmp")
    twice.write_bytes(tiny.read_bytes())
    with pytest.raises(UserError, match=r"tiny\.bmp and .*tiny\.png: have one name"):
        SmoothedCrops(photos, CROP, 0, smoothed=smoothed)
    twice.unlink()
    (photos / "deep/tiny.bmp").write_bytes(b"another photo")
    with pytest.raises(UserError, match=r"tiny\.bmp and .*tiny\.png: have one name"):
        SmoothedCrops(photos, CROP, 0, smoothed=smoothed, check=False)
    (photos / "deep/tiny.bmp").unlink()
    tiny.unlink()
    with pytest.raises(UserError, match=r"tiny\.png: no smoothed picture"):
        SmoothedCrops(photos, CROP, 0, smoothed=smoothed)


def test_smoothed_on_the_fly_is_rtv_of_the_crop_and_what_is_around_it(photos: Path) -> None:
    from dtpm_fast.smoothing import rtv_smooth

    around = 8
    clean, smooth = SmoothedCrops(photos, CROP, 2)[6]
    larger = PhotoCrops(photos, CROP + 2 * around, 2)[6]  # the same draws
    inside = slice(around, around + CROP)
    torch.testing.assert_close(clean, larger[:, inside, inside])
    expected = rtv_smooth(np.ascontiguousarray((larger.numpy().transpose(1, 2, 0) + 1) / 2), threads=1) * 2 - 1
    np.testing.assert_allclose(smooth.numpy().transpose(1, 2, 0), expected[inside, inside], atol=1e-4)
    assert (clean - smooth).abs().max() > 0


@pytest.mark.parametrize("task", TASKS)
def test_synthetic_pairs_of_every_task(task: str, photos: Path) -> None:
    dataset = SyntheticCrops(photos, task, CROP, 1)
    changed = 0.0
    for index in range(8):
        degraded, clean = dataset[index]
        levels = (degraded + 1) * 127.5
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)  # 8 bits, as on disk
        changed += float((degraded - clean).abs().mean())
    assert changed > 0
    unharmed, clean = SyntheticCrops(photos, task, CROP, 1, strength=0.0)[0]
    assert torch.equal(unharmed, clean)


def test_a_degraded_crop_is_rounded_to_8_bits(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not cut off, which would darken every sample by half a level."""
    monkeypatch.setattr("dtpm_fast.data.crops.degrade", lambda task, image, *_: np.minimum(image + 0.7 / 255, 1))
    degraded, clean = SyntheticCrops(photos, "dehaze", CROP)[0]
    torch.testing.assert_close(degraded, (clean + 1 / 127.5).clamp(max=1))


def test_strength_range_is_drawn_per_sample(photos: Path) -> None:
    dataset = SyntheticCrops(photos, "dehaze", CROP, 1, strength=(0.0, 3.0), augment="none")
    change = [float((degraded - clean).abs().mean()) for degraded, clean in (dataset[index] for index in range(20))]
    assert min(change) < 0.5 * max(change)
    for wrong in ((2.0, 1.0), -1.0, (float("nan"), 1.0)):
        with pytest.raises(UserError, match="strength"):
            SyntheticCrops(photos, "dehaze", CROP, strength=wrong)


class Constant(torch.utils.data.Dataset):
    def __init__(self, value: int) -> None:
        self.value = value

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(self.value), torch.tensor(index)


def test_mixed_sources_come_by_weight() -> None:
    mixed = MixedCrops([(Constant(0), 1.0), (Constant(1), 3.0), (Constant(2), 0.0)], seed=9)
    count = 2000
    drawn = torch.stack([mixed[index][0] for index in range(count)])
    share = float((drawn == 1).float().mean())
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / count)  # four standard deviations of a fair draw
    assert not (drawn == 2).any()
    assert all(int(mixed[index][1]) == index for index in range(5))


def test_mixed_choice_is_independent_of_the_sources_own_draws() -> None:
    """The first number that a source draws must not decide whether it is chosen."""
    mixed = MixedCrops([(Constant(0), 1.0), (Constant(1), 1.0)], seed=0)
    own = np.array([sample_rng(0, index).random() for index in range(1500)])
    chosen = np.array([int(mixed[index][0]) for index in range(1500)])
    assert abs(np.corrcoef(own, chosen)[0, 1]) < 4 / np.sqrt(1500)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights"):
        MixedCrops([(Constant(0), weight) for weight in weights])


def test_broken_pictures_stop_before_training(photos: Path, tmp_path: Path, picture: Callable[..., Path]) -> None:
    whole = (photos / "b.jpg").read_bytes()
    (photos / "b.jpg").write_bytes(whole[: len(whole) // 2])
    for make in (PhotoCrops, SmoothedCrops):
        with pytest.raises(UserError, match=r"b\.jpg"):
            make(photos, CROP)
    pairs = make_pairs(tmp_path / "pairs", picture)
    picture(pairs[1][1], 31, 22)
    with pytest.raises(UserError, match=r"input/1\.png: 31x21 pixels, but its target .*1\.png has 31x22"):
        PairCrops(pairs, CROP)
    unchecked = PairCrops(pairs, CROP, check=False)
    with pytest.raises(UserError, match=r"1\.png: 31x21"):
        [unchecked[index] for index in range(50)]


def test_bad_arguments(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        PhotoCrops(tmp_path / "nowhere", CROP)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        PhotoCrops(tmp_path / "empty", CROP)
    with pytest.raises(UserError, match="empty"):
        PhotoCrops([], CROP)
    with pytest.raises(UserError, match="empty"):
        PairCrops([], CROP)
    with pytest.raises(UserError, match="crop 0"):
        PhotoCrops(photos, 0)
    with pytest.raises(UserError, match="augment"):
        PhotoCrops(photos, CROP, augment="flips")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown task"):
        SyntheticCrops(photos, "denoise", CROP)


def test_cache_is_bounded_and_not_pickled(photos: Path) -> None:
    size = read_image(photos / "a.png").nbytes + read_image(photos / "b.jpg").nbytes
    small, none, large = (PictureCache(bound) for bound in (size, 0, 10**9))
    samples = [
        as_bytes(PhotoCrops(photos, CROP, 1, cache=cache)[index]) for cache in (small, none, large) for index in (2, 8)
    ]
    assert samples[:2] == samples[2:4] == samples[4:]
    assert small.used_bytes == size
    assert none.used_bytes == 0
    assert large.used_bytes > size
    assert pickle.loads(pickle.dumps(large)).used_bytes == 0


def test_to_tensor_covers_the_range_exactly() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = to_tensor(levels)
    assert tensor.min() == -1
    assert tensor.max() == 1
    np.testing.assert_array_equal(((tensor + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), levels)
