"""What is held out for validation is in no training sample; which settings reach the samples."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.training.sources import Source, stage1_source, stage2_source


def cropped(photos, folder):
    """As `dtpm-smooth --crop 32` names its crops; the smoothed ones are as good as any for a list of names."""
    for kind in ("clean", "smooth"):
        (folder / kind).mkdir(parents=True)
        for path in sorted(photos.iterdir()):
            with Image.open(path) as photo:
                for y in (0, 32):
                    for x in (0, 32, 64):
                        name = f"{path.stem}_y{y:05d}_x{x:05d}.png"
                        photo.crop((x, y, x + 32, y + 32)).save(folder / kind / name)
    return folder / "clean", folder / "smooth"


def test_photos_smoothed_ahead_are_held_out_as_others_are(photos, tmp_path):
    train = Config.of(crop=16, validation_images=1).train
    on_the_fly = stage1_source(photos, None, None, train)
    ahead = stage1_source(photos, photos, None, train)
    assert ahead.data.photos == on_the_fly.data.photos
    assert [path.name for path in ahead.data.photos] == [f"{i}.png" for i in range(1, 8)]
    assert [path.name for path in ahead.data.smoothed] == [f"{i}.png" for i in range(1, 8)]
    assert len(ahead.validation) == 1 and ahead.about == "7 photos of photos, smoothed ahead"
    everything = stage1_source(photos, photos, photos, train)
    assert len(everything.data.photos) == 8


def test_all_crops_of_a_photo_are_on_one_side(photos, tmp_path):
    clean, smooth = cropped(photos, tmp_path / "crops")
    train = Config.of(crop=16, validation_images=4).train
    source = stage1_source(clean, smooth, None, train)
    assert len(source.validation) == 1  # one of eight photos
    assert {path.name.split("_")[0] for path in source.data.photos} == {str(i) for i in range(1, 8)}
    assert len(source.data.photos) == 7 * 6


@pytest.mark.parametrize("split", ["test", "val", "train"])
def test_pairs_to_validate_on_are_pairs_in_any_split(photos, tmp_path, split):
    for half in ("input", "target"):
        shutil.copytree(photos, tmp_path / "pairs" / split / half)
    train = Config.of(crop=16, validation_images=3).train
    source = stage2_source("derain", photos, None, None, tmp_path / "pairs", train)
    assert len(source.validation) == 3
    assert all((y_d == y_g).all() for y_d, y_g in source.validation)  # nothing was degraded again


def test_every_photo_held_out_is_seen_once(photos):
    """A crop of each, not crops of photos drawn at random."""
    train = Config.of(crop=80, validation_images=8).train
    for source in (
        stage1_source(photos, photos, photos, train),
        stage2_source("derain", photos, None, None, photos, train),
    ):
        targets = [pair[0] if source.about.endswith("ahead") else pair[1] for pair in source.validation]
        assert len({target.numpy().tobytes() for target in targets}) == 8


def test_stage2_holds_out_all_crops_of_a_photo_and_all_pairs_of_a_target(photos, tmp_path):
    train = Config.of(crop=16, validation_images=4).train
    clean, _ = cropped(photos, tmp_path / "crops")
    kept = {path.name.split("_")[0] for path in stage2_source("derain", clean, None, None, None, train).data.photos}
    assert kept == {str(i) for i in range(1, 8)}
    for half in ("input", "target"):
        shutil.copytree(clean, tmp_path / "pairs" / half)
    source = stage2_source("derain", tmp_path / "pairs", None, None, None, train)
    assert {target.name.split("_")[0] for _, target in source.data.pairs} == kept
    assert len(source.validation) == 1


def test_a_split_file_without_a_test_split_holds_out_pairs_of_train(photos: Path, tmp_path: Path) -> None:
    for half in ("input", "target"):
        shutil.copytree(photos, tmp_path / "pairs" / half)
    split = tmp_path / "split.csv"
    split.write_text("name,split\n" + "".join(f"{i},{'val' if i == 7 else 'train'}\n" for i in range(8)))
    train = Config.of(crop=16, validation_images=4).train
    source = stage2_source("derain", tmp_path / "pairs", split, None, None, train)
    assert [target.stem for _, target in source.data.pairs] == ["1", "2", "3", "4", "5", "6"]
    assert len(source.validation) == 1
    split.write_text("name,split\n7,val\n")
    with pytest.raises(UserError, match="names no picture for the split 'train'"):
        stage2_source("derain", tmp_path / "pairs", split, None, None, train)


def test_targets_held_out_are_not_degraded_for_training_either(photos: Path, tmp_path: Path) -> None:
    """The clean photos beside real pairs may be those pairs' targets."""
    for half in ("input", "target"):
        shutil.copytree(photos, tmp_path / "pairs" / half)
    (tmp_path / "link").symlink_to(tmp_path / "pairs" / "target")
    split = tmp_path / "split.csv"
    split.write_text("name,split\n" + "".join(f"{i},{'test' if i < 3 else 'train'}\n" for i in range(8)))
    train = Config.of(crop=16, validation_images=1).train
    for chosen, first in ((None, 1), (split, 3)):
        for targets in (tmp_path / "pairs" / "target", tmp_path / "link"):
            source = stage2_source("derain", tmp_path / "pairs", chosen, targets, None, train)
            real, synthetic = source.data.sources
            wanted = [str(i) for i in range(first, 8)]
            assert [target.stem for _, target in real.pairs] == wanted
            assert [photo.stem for photo in synthetic.photos] == wanted
    assert len(stage2_source("derain", tmp_path / "pairs", None, photos, None, train).data.sources[1].photos) == 8
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.png").symlink_to(tmp_path / "pairs" / "target" / "0.png")
    with pytest.raises(UserError, match="one: all of its photos are held out for validation"):
        stage2_source("derain", tmp_path / "pairs", None, tmp_path / "one", None, train)


def test_half_a_set_of_pairs_is_not_taken_for_clean_photos(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "pairs" / "somewhere" / "input")
    train = Config.of(crop=16).train
    with pytest.raises(UserError, match="input in it looks like one half of pairs"):
        stage2_source("derain", tmp_path / "pairs", None, None, None, train)
    assert stage2_source("derain", tmp_path / "pairs" / "somewhere" / "input", None, None, None, train).validation


def changed(source: Source, count: int = 40) -> float:
    """The share of training samples whose degraded picture is not the clean one."""
    return sum(not (y_d == y_g).all() for y_d, y_g in (source.data[index] for index in range(count))) / count


def test_strength_and_shares_are_those_of_the_settings(photos: Path, tmp_path: Path) -> None:
    for half in ("input", "target"):
        shutil.copytree(photos, tmp_path / "pairs" / half)  # pairs in which nothing is degraded

    def source(data: Path, synthetic: Path | None = None, **settings: float) -> Source:
        train = Config.of(crop=16, validation_images=2, **settings).train
        return stage2_source("dehaze", data, None, synthetic, None, train)

    hazy, clear = source(photos), source(photos, strength=0.0)
    assert changed(hazy) == 1 and all((y_d != y_g).any() for y_d, y_g in hazy.validation)
    assert changed(clear) == 0 and all((y_d == y_g).all() for y_d, y_g in clear.validation)
    for share in (0.0, 0.2, 1.0):
        assert changed(source(tmp_path / "pairs", photos, synthetic_share=share)) == pytest.approx(share, abs=0.15)
        assert changed(source(photos, clean_share=share)) == pytest.approx(1 - share, abs=0.15)
        assert changed(source(photos, strength=0.0, noise_share=share)) == pytest.approx(share, abs=0.15)
        assert changed(source(photos, strength=0.0, jpeg_share=share)) == pytest.approx(share, abs=0.15)
    # A clean photo can be noisy, and come out of a JPEG file, as well.
    all_three = source(photos, clean_share=1.0, noise_share=1.0, jpeg_share=1.0)
    assert changed(all_three) == 1
    assert all_three.about.endswith("1 of all samples clean, 1 with noise, 1 out of JPEG files")


@pytest.fixture
def skies(tmp_path: Path) -> Path:
    """Pairs, and clean photos in `target`, of pictures that brighten downwards."""
    rows = np.repeat(np.linspace(40, 200, 96).astype(np.uint8), 96 * 3).reshape(96, 96, 3)
    for half in ("input", "target"):
        (tmp_path / "skies" / half).mkdir(parents=True)
        for name in ("a", "b"):
            Image.fromarray(rows).save(tmp_path / "skies" / half / f"{name}.png")
    return tmp_path / "skies"


def test_what_falls_keeps_its_direction_and_half_turns_are_a_setting(skies: Path) -> None:
    def targets(source: Source) -> Iterator[Tensor]:
        return (source.data[index][1][0] for index in range(24))

    def tilted(target: Tensor) -> bool:
        return all(float(target.diff(dim=axis).abs().mean()) > 1e-3 for axis in (0, 1))

    plain, turned = (Config.of(crop=32, rotate45=on).train for on in (False, True))
    clean = skies / "target"
    for task in ("derain", "rainhaze", "desnow", "raindrop", "deblur", "defocus", "dehaze"):
        upright = all((t[-1] > t[0]).all() for t in targets(stage2_source(task, skies, None, None, None, plain)))
        assert upright == (task in ("derain", "rainhaze", "desnow", "raindrop")), task
    for train in (plain, turned):
        for source in (
            stage1_source(clean, clean, None, train),
            stage2_source("dehaze", skies, None, None, None, train),
            stage2_source("dehaze", clean, None, None, None, train),
        ):
            assert any(tilted(target) for target in targets(source)) == train.rotate45, source.about
