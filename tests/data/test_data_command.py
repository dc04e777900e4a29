"""`python -m dtpm_fast.data check` and `sheet`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from miniatures import MINIATURES, Miniature, write_picture
from PIL import Image

from dtpm_fast.data.check import check_folder
from dtpm_fast.data.command import main
from dtpm_fast.data.layouts import find_pairs
from dtpm_fast.data.make import make_pairs
from dtpm_fast.errors import UserError
from dtpm_fast.images import read_image


def check(task: str, folder: Path, *options: str) -> int:
    return main(["check", "--task", task, str(folder), *options])


def test_good_sets_of_every_layout(miniature: Miniature, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = miniature.write(tmp_path)
    assert check(miniature.task, tmp_path, "--split", miniature.split) == 0
    printed = capsys.readouterr().out
    assert f"{miniature.split}: {len(expected)} pairs, layout {miniature.layout}" in printed
    assert f"({len(expected)} of 24x16)" in printed
    assert "no problems" in printed


def test_sizes_that_differ(miniature: Miniature, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    degraded, target = miniature.write(tmp_path)[-1]
    write_picture(degraded, 25, 16)
    assert check(miniature.task, tmp_path) == 1
    printed = capsys.readouterr().out
    assert "1 problem:" in printed
    assert f"{degraded}: 25x16 pixels, but its target {target} has 24x16" in printed


def test_a_split_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("in/im_0001_s80_a04.png", "gt/im_0001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_picture(tmp_path / name, 24, 16)
    assert check("derain", tmp_path, "--split", "test") == 1
    assert "no pair of derain in it for the split test" in capsys.readouterr().err


def test_make_leaves_nothing_of_a_set_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(tmp_path / "photo.png", 24, 16)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dtpm_fast.data.make.degrade", stop)
    with pytest.raises(KeyboardInterrupt):
        make_pairs("derain", tmp_path / "set", [tmp_path / "photo.png"])
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.parametrize(
    "options", [["--seed", "-1"], ["--strength", "inf"], ["--strength", "nan"], ["--strength", "1", "1"]]
)
def test_make_refuses_what_makes_no_set(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["make", "--task", "derain", "-o", str(tmp_path / "set"), *options])
    except SystemExit as usage:  # argparse's
        code = usage.code
    assert code in (1, 2)
    said = capsys.readouterr().err
    assert "must be 0 or more" in said or "is given twice" in said
    assert not (tmp_path / "set").exists()


def test_corrupt_files(miniature: Miniature, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = miniature.write(tmp_path)
    truncated, text = pairs[0][0], pairs[-1][1]
    truncated.write_bytes(truncated.read_bytes()[:-60])
    text.write_text("no picture")
    assert check(miniature.task, tmp_path) == 1
    printed = capsys.readouterr().out
    assert f"  {truncated}: not a readable picture" in printed
    assert f"  {text}: not a readable picture" in printed
    assert "2 problems:" in printed


def test_missing_partner(miniature: Miniature, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    degraded, target = miniature.write(tmp_path)[0]
    (target.parent / f"{degraded.stem}.png").write_bytes(target.read_bytes())  # names shared in part: no more by order
    target.with_name("stray.png").write_bytes(target.read_bytes())
    if degraded.stem != target.stem:
        target.unlink()
    assert check(miniature.task, tmp_path) == 1
    assert "stray.png: no partner" in capsys.readouterr().out


def test_a_set_without_split_folders_is_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MINIATURES["generic_flat"].write(tmp_path)
    assert check("derain", tmp_path) == 0
    assert capsys.readouterr().out.startswith("not split: 2 pairs, layout input+target")


def test_every_split_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for index in range(count):
            for side in ("input", "target"):
                write_picture(tmp_path / split / side / f"{index}.png", 20 + index, 16)
    assert check("deblur", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "train: 3 pairs" in printed
    assert "test: 2 pairs" in printed


def test_many_problems_are_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_picture(tmp_path / "target/ok.png")
    write_picture(tmp_path / "input/ok.png")
    for index in range(12):
        write_picture(tmp_path / f"input/{index:02d}.png")
    assert check("derain", tmp_path, "--show", "3") == 1
    printed = capsys.readouterr().out
    assert "12 problems:" in printed
    assert "and 9 more" in printed
    assert printed.count("no partner") == 3


def test_clean_photos_alone(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("dehaze", photos) == 0
    assert "5 clean photos, no pairs" in capsys.readouterr().out
    (photos / "a.png").write_bytes(b"")
    assert check("dehaze", photos) == 1
    assert "a.png: not a readable picture" in capsys.readouterr().out


def test_half_a_set_is_not_taken_for_clean_photos(tmp_path: Path, picture: Callable[..., Path]) -> None:
    picture(tmp_path / "train/input/a.png")
    with pytest.raises(UserError, match="no pairs for derain"):
        check_folder("derain", tmp_path)


def test_failures_are_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("deblur", tmp_path / "nowhere") == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/nowhere: no such folder\n"
    assert check("deblur", tmp_path) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_bad_usage_is_exit_code_2(tmp_path: Path) -> None:
    for arguments in (["check", str(tmp_path)], ["check", "--task", "denoise", str(tmp_path)], [], ["sheet"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_split_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    miniature = MINIATURES["generic"]
    miniature.write(tmp_path)
    (tmp_path / "split.csv").write_text("name,split\n1.webp,train\n2.webp,test\n")
    assert check("derain", tmp_path, "--split-file", str(tmp_path / "split.csv")) == 0
    printed = capsys.readouterr().out
    assert "train: 1 pairs" in printed
    assert "test: 1 pairs" in printed


def test_a_split_file_chooses_among_pairs(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("derain", photos, "--split-file", str(tmp_path / "absent.csv")) == 1
    assert "no pairs for derain" in capsys.readouterr().err


def test_sheet_of_own_photos(photos: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a.png", "c.webp"):
        (folder / name).write_bytes((photos / name).read_bytes())
    assert main(["sheet", str(photos / "a.png"), str(photos / "c.webp"), "-o", str(first)]) == 0
    assert main(["sheet", str(folder), "-o", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as sheet:
        assert sheet.width > 1000


def test_sheet_refuses_what_it_cannot_write(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sheet", str(photos / "a.png"), "-o", str(tmp_path / "sheet.gif")]) == 1
    assert "unknown picture format" in capsys.readouterr().err
    assert main(["sheet", str(tmp_path / "none.png"), "-o", str(tmp_path / "sheet.jpg")]) == 1
    assert "none.png: no such file" in capsys.readouterr().err
    assert not (tmp_path / "sheet.jpg").exists()


def test_module_runs() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "dtpm_fast.data", "check", "--help"], capture_output=True, text=True, check=True
    )
    assert "python -m dtpm_fast.data check --task deblur GoPro" in shown.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_nothing_is_exit_code_1(photos: Path, unbuffered: str) -> None:
    """A reader that has gone is no word, a full disk one line, whenever Python writes what it holds."""
    command = [sys.executable, "-m", "dtpm_fast.data", "check", "--task", "derain", str(photos)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as gone, Path("/dev/full").open("wb") as full:
        for output, said in (
            (gone, ""),
            (full, "error: standard output, or a file of this command: No space left on device\n"),
        ):
            run = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, env=environment)
            assert (run.returncode, run.stderr) == (1, said)


def test_a_synthetic_test_set(tmp_path: Path, picture: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "photos/a.png", 40, 33, 1)
    picture(tmp_path / "photos/b.png", 24, 48, 2)
    make = ["make", str(tmp_path / "photos"), "--task", "desnow", "--seed", "3"]
    assert main([*make, "--strength", "0", "1.5", "-o", str(tmp_path / "set")]) == 0
    assert "4 pairs, synthetic desnow, seed 3" in capsys.readouterr().out
    pairs = find_pairs("desnow", tmp_path / "set", "test").pairs
    assert [degraded.name for degraded, _ in pairs] == ["a-0.png", "a-1.5.png", "b-0.png", "b-1.5.png"]
    same = [(read_image(degraded) == read_image(target)).all() for degraded, target in pairs]
    assert same == [True, False, True, False]
    assert (read_image(pairs[0][1]) == read_image(tmp_path / "photos/a.png")).all()
    (tmp_path / "photos/b.png").unlink()  # fewer photos change no other's degradation
    assert main([*make, "--strength", "1.5", "-o", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/input/a.png").read_bytes() == pairs[1][0].read_bytes()
    assert main([*make, "-o", str(tmp_path / "set")]) == 1
    assert "set: exists already" in capsys.readouterr().err
    assert main([*make, "--strength", "-1", "-o", str(tmp_path / "new")]) == 1
    assert "must be 0 or more" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_synthetic_test_set_of_a_name_that_is_no_utf8(tmp_path: Path, picture: Callable[..., Path]) -> None:
    name = os.fsdecode(b"\xff.png")
    picture(tmp_path / "photos" / name, 12, 12, 1)
    assert main(["make", str(tmp_path / "photos"), "--task", "derain", "-o", str(tmp_path / "set")]) == 0
    assert (tmp_path / "set/input" / name).is_file()


def test_a_synthetic_test_set_out_of_jpeg_files(
    tmp_path: Path, picture: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make = ["make", str(picture(tmp_path / "a.png", 40, 33, 1)), "--task", "desnow", "--seed", "3"]
    assert main([*make, "-o", str(tmp_path / "before")]) == 0
    assert main([*make, "--jpeg", "70", "-o", str(tmp_path / "after")]) == 0
    assert "seed 3, JPEG of quality 70" in capsys.readouterr().out
    before, after = (read_image(tmp_path / name / "input/a.png") for name in ("before", "after"))
    Image.fromarray(before).save(tmp_path / "own.jpg", quality=70)  # the same degradation, through a file
    assert (after == read_image(tmp_path / "own.jpg")).all() and (after != before).any()
    assert (read_image(tmp_path / "after/target/a.png") == read_image(tmp_path / "a.png")).all()
    assert main([*make, "--jpeg", "101", "-o", str(tmp_path / "new")]) == 1
    assert "between 1 and 100" in capsys.readouterr().err
    write_picture(tmp_path / "long.png", 65501, 1)
    assert (
        main(["make", str(tmp_path / "long.png"), "--task", "desnow", "--jpeg", "70", "-o", str(tmp_path / "new")]) == 1
    )
    assert "long: is too long for a JPEG file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_synthetic_test_set_with_noise(
    tmp_path: Path, picture: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make = ["make", str(picture(tmp_path / "a.png", 40, 33, 1)), "--task", "dehaze", "--strength", "2", "--seed", "3"]
    for name, also in (("before", []), ("after", ["--noise", "5"]), ("file", ["--noise", "5", "--jpeg", "70"])):
        assert main([*make, *also, "-o", str(tmp_path / name)]) == 0
    assert "seed 3, noise 5, JPEG of quality 70" in capsys.readouterr().out
    before, after, file = (read_image(tmp_path / name / "input/a.png") for name in ("before", "after", "file"))
    assert abs((after.astype(float) - before).std() - 5) < 0.5
    Image.fromarray(after).save(tmp_path / "own.jpg", quality=70)  # the noise is in the picture that is compressed
    assert (file == read_image(tmp_path / "own.jpg")).all()
    assert (read_image(tmp_path / "after/target/a.png") == read_image(tmp_path / "a.png")).all()
    for wrong in ("-1", "nan"):
        assert main([*make, "--noise", wrong, "-o", str(tmp_path / "new")]) == 1
        assert "must lie between 0 and 255" in capsys.readouterr().err


def test_a_synthetic_test_set_of_scikit_images_photos(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image, whose photos these are, is not installed")
    assert main(["make", "--task", "dehaze", "-o", str(tmp_path / "set")]) == 0
    names = sorted(path.name for path in (tmp_path / "set/target").iterdir())
    assert names == ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.png"]
