import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from miniatures import MINIATURES, Miniature

from dtpm_fast.data.layouts import LayoutNotFound, SplitNotFound, find_pairs, read_split, scan_pairs
from dtpm_fast.errors import UserError
from dtpm_fast.tasks import TASKS


def test_every_layout_is_found_with_its_pairs(miniature: Miniature, tmp_path: Path) -> None:
    expected = miniature.write(tmp_path)
    layout, pairs = find_pairs(miniature.task, tmp_path, miniature.split)
    assert layout == miniature.layout
    assert pairs == sorted(expected)


def test_every_task_has_a_miniature_of_its_layout() -> None:
    assert {miniature.task for miniature in MINIATURES.values()} == TASKS.keys()


def test_other_files_are_no_pictures(miniature: Miniature, tmp_path: Path) -> None:
    expected = miniature.write(tmp_path)
    for folder in {path.parent for pair in expected for path in pair}:
        (folder / "Thumbs.db").write_bytes(b"x")
        (folder / "list.txt").write_text("x")
        (folder / ".hidden.png").write_bytes(b"x")
    assert find_pairs(miniature.task, tmp_path, miniature.split).pairs == sorted(expected)


BY_NAME = [name for name in MINIATURES if name != "dpdd_original"]


@pytest.mark.parametrize("name", BY_NAME)
def test_missing_target_is_named(name: str, tmp_path: Path) -> None:
    miniature = MINIATURES[name]
    degraded, target = miniature.write(tmp_path)[-1]
    target.rename(target.with_name("other" + target.suffix))
    with pytest.raises(UserError, match=f"{degraded.name}: no partner, .* has no picture named {target.stem}"):
        find_pairs(miniature.task, tmp_path, miniature.split)


@pytest.mark.parametrize("name", BY_NAME)
def test_missing_degraded_picture_is_named(name: str, tmp_path: Path) -> None:
    miniature = MINIATURES[name]
    expected = miniature.write(tmp_path)
    extra = expected[0][1].with_name("extra" + expected[0][1].suffix)
    shutil.copy(expected[0][1], extra)
    scan = scan_pairs(miniature.task, tmp_path, miniature.split)
    assert scan.problems == [f"{extra}: no partner, no picture in {expected[0][0].parent} belongs to it"]
    assert scan.pairs == sorted(expected)


def test_pairs_by_order_need_lists_of_one_length(tmp_path: Path) -> None:
    """The original DPDD numbers its shots, so that no name is shared."""
    miniature = MINIATURES["dpdd_original"]
    _, target = miniature.write(tmp_path)[0]
    target.unlink()
    scan = scan_pairs(miniature.task, tmp_path, miniature.split)
    assert not scan.pairs
    assert len(scan.problems) == 2 + 1


def test_wrong_name_lists_both_sides(tmp_path: Path, picture: Callable[..., Path]) -> None:
    picture(tmp_path / "train/data/0_rain.png")
    picture(tmp_path / "train/data/1-rain.png")
    picture(tmp_path / "train/gt/0_clean.png")
    picture(tmp_path / "train/gt/1_clean.png")
    scan = scan_pairs("raindrop", tmp_path, "train")
    assert len(scan.pairs) == 1
    assert [problem.split(": ")[0] for problem in scan.problems] == [
        str(tmp_path / "train/data/1-rain.png"),
        str(tmp_path / "train/gt/1_clean.png"),
    ]
    with pytest.raises(UserError, match=r"1-rain\.png: no partner.*1 more.*check --task raindrop"):
        find_pairs("raindrop", tmp_path, "train")


def test_suffixes_may_differ_within_a_pair_but_not_repeat(tmp_path: Path, picture: Callable[..., Path]) -> None:
    picture(tmp_path / "input/a.jpg")
    picture(tmp_path / "target/a.png")
    assert find_pairs("derain", tmp_path).pairs == [(tmp_path / "input/a.jpg", tmp_path / "target/a.png")]
    picture(tmp_path / "target/a.webp")
    with pytest.raises(UserError, match=r"a\.webp: the same name as a\.png"):
        find_pairs("derain", tmp_path)


def test_outdoor_rain_without_split_folders_is_split_by_scene(tmp_path: Path, picture: Callable[..., Path]) -> None:
    for scene in (1, 300, 301, 350, 351):
        picture(tmp_path / f"in/im_{scene:04d}_s80_a04.png")
        picture(tmp_path / f"gt/im_{scene:04d}.png")

    def scenes(split: str) -> list[str]:
        return [target.stem for _, target in find_pairs("rainhaze", tmp_path, split).pairs]

    assert scenes("train") == ["im_0001", "im_0300", "im_0351"]
    assert scenes("test") == ["im_0301", "im_0350"]
    with pytest.raises(SplitNotFound):
        find_pairs("rainhaze", tmp_path, "val")


def test_test_pictures_are_never_given_for_training(tmp_path: Path, picture: Callable[..., Path]) -> None:
    picture(tmp_path / "test/input/a.png")
    picture(tmp_path / "test/target/a.png")
    with pytest.raises(SplitNotFound, match="only in test, none to train on"):
        find_pairs("derain", tmp_path, "train")


def test_no_layout_says_what_was_looked_for(photos: Path) -> None:
    with pytest.raises(LayoutNotFound, match=r"looked for train/\*/blur \+ sharp.*train/input \+ target"):
        find_pairs("deblur", photos)
    with pytest.raises(UserError, match="no such folder"):
        find_pairs("deblur", photos / "nowhere")
    with pytest.raises(UserError, match="unknown task"):
        find_pairs("denoise", photos)


def test_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "train/input").mkdir(parents=True)
    (tmp_path / "train/target").mkdir()
    with pytest.raises(UserError, match=r"train/input: no pictures in it"):
        find_pairs("derain", tmp_path)


def test_split_file_selects_by_name(tmp_path: Path, picture: Callable[..., Path]) -> None:
    for name in ("1", "2", "3"):
        picture(tmp_path / f"test/input/{name}.webp")
        picture(tmp_path / f"test/target/{name}.webp")
    split = tmp_path / "split.csv"
    split.write_text("name,scene,official,project\n1.webp,1,test,train\n2.webp,2,test,test\n3.webp,3,test,train\n")
    assert [pair[0].stem for pair in find_pairs("derain", tmp_path, "train", split).pairs] == ["1", "3"]
    assert [pair[0].stem for pair in find_pairs("derain", tmp_path, "test", split).pairs] == ["2"]
    with pytest.raises(UserError, match=r"split\.csv: names no picture for the split 'val'"):
        find_pairs("derain", tmp_path, "val", split)
    split.write_text("name,split\n1.webp,train\n9.webp,train\n")
    with pytest.raises(UserError, match=r"split\.csv: names 9, which is no pair"):
        find_pairs("derain", tmp_path, "train", split)


def test_list_file_selects_by_name_or_path(tmp_path: Path, picture: Callable[..., Path]) -> None:
    for name in ("city_1", "city_2"):
        picture(tmp_path / f"input/{name}.jpg")
        picture(tmp_path / f"gt/{name}.jpg")
    names = tmp_path / "snowtest100k_L.txt"
    names.write_text("/snow100k/input/city_2.jpg\n\n")
    assert [pair[0].stem for pair in find_pairs("desnow", tmp_path, "test", names).pairs] == ["city_2"]


def test_a_list_of_paths_tells_scenes_apart(tmp_path: Path, picture: Callable[..., Path]) -> None:
    for scene in ("train/A", "test/B"):
        picture(tmp_path / scene / "blur/000001.png")
        picture(tmp_path / scene / "sharp/000001.png")
    names = tmp_path / "names.txt"
    names.write_text("\ufefftrain/A/blur/000001.png\n", encoding="utf-8")
    found = find_pairs("deblur", tmp_path, "train", names).pairs
    assert [pair[0].relative_to(tmp_path).as_posix() for pair in found] == ["train/A/blur/000001.png"]
    names.write_text("000001.png\n")
    with pytest.raises(UserError, match=r"names 000001, and 2 pairs have that name.*as in B?A?/blur/000001\.png"):
        find_pairs("deblur", tmp_path, "train", names)


def test_a_dot_in_a_name_is_no_suffix(tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text("name,split\na-0.7,train\nb-0.7.png,train\n,train\nc\n")
    assert read_split(tmp_path / "split.csv", "train") == {"a-0.7", "b-0.7"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,official\n1,train\n", "needs the columns"),
        ("", "needs the columns"),
        ("name,split\n1,test\n", "no picture"),
    ],
)
def test_bad_split_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "split.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_split(path, "train")


def test_unreadable_split_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a readable split file"):
        read_split(tmp_path / "nowhere.csv", "train")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match="not a readable split file"):
        read_split(tmp_path / "bytes.csv", "train")
