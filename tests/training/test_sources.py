"""What is held out for validation is in no training sample."""

import shutil

import pytest
from PIL import Image

from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.training.sources import stage1_source, stage2_source


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


def test_half_a_set_of_pairs_is_not_taken_for_clean_photos(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "pairs" / "somewhere" / "input")
    train = Config.of(crop=16).train
    with pytest.raises(UserError, match="input in it looks like one half of pairs"):
        stage2_source("derain", tmp_path / "pairs", None, None, None, train)
    assert stage2_source("derain", tmp_path / "pairs" / "somewhere" / "input", None, None, None, train).validation
