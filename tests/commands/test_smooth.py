"""`dtpm-smooth`: its results, what it skips, what it survives."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dtpm_fast import rtv_smooth
from dtpm_fast.atomic import atomic_path
from dtpm_fast.commands.smooth import main

# A folder named ray somewhere on the path (Ray's own temporary one, say) is no Ray: it has no origin.
RAY = getattr(importlib.util.find_spec("ray"), "origin", None) is not None


def write_photo(path: Path, height: int, width: int, seed: int) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(rgb).save(path)
    return rgb


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_photo(folder / "one.png", 40, 51, 1)
    write_photo(folder / "deep" / "two.bmp", 33, 70, 2)
    return folder


def test_photos_keep_their_place_and_are_smoothed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"lam": 0.02, "sigma": 2.0, "sharpness": 0.1, "iterations": 2, "mode": "matlab_pcg"}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert main([str(photos), "-o", str(out), *options]) == 0
    assert sorted(contents(out)) == ["deep/two.png", "dtpm-smooth.json", "one.png"]
    for source, target in (("one.png", "one.png"), ("deep/two.bmp", "deep/two.png")):
        expected = rtv_smooth(np.array(Image.open(photos / source)), **settings)
        np.testing.assert_array_equal(np.array(Image.open(out / target)), expected)
    assert main([str(photos / "one.png"), "-o", str(tmp_path / "plain")]) == 0
    plain = np.array(Image.open(tmp_path / "plain" / "one.png"))
    np.testing.assert_array_equal(plain, rtv_smooth(np.array(Image.open(photos / "one.png"))))


def test_folders_beside_each_other_become_folders_of_the_output(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "more"
    write_photo(other / "one.png", 20, 24, 3)
    write_photo(tmp_path / "alone.png", 20, 24, 4)
    out = tmp_path / "out"
    assert main([str(photos), str(other), str(tmp_path / "alone.png"), "-o", str(out)]) == 0
    found = sorted(contents(out))
    assert found == ["alone.png", "dtpm-smooth.json", "more/one.png", "photos/deep/two.png", "photos/one.png"]


def test_a_write_that_fails_leaves_no_part_of_a_result(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Image.Image.save

    def full(self: Image.Image, path: Path, **named: Any) -> None:
        save(self, path, **named)
        if self.size == (51, 40):
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    out = tmp_path / "out"
    assert main([str(photos), "-o", str(out)]) == 1
    assert sorted(contents(out)) == ["deep/two.png", "dtpm-smooth.json"]
    assert "one.png: could not be written (No space left on device)" in capsys.readouterr().err


def test_crops_are_smoothed_by_themselves(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--crop", "24", "--stride", "16", "--workers", "2", "--device", "cpu"]
    assert main([str(photos), "-o", str(out), *arguments]) == 0
    whole = np.array(Image.open(photos / "one.png"))
    places = [(y, x) for y in (0, 16) for x in (0, 16)]
    names = [f"one_y{y:05d}_x{x:05d}.png" for y, x in places]
    assert sorted(p.name for p in (out / "clean").glob("*.png")) == names
    assert len(list((out / "smooth" / "deep").iterdir())) == 3
    for (y, x), name in zip(places, names, strict=True):
        crop = whole[y : y + 24, x : x + 24]
        np.testing.assert_array_equal(np.array(Image.open(out / "clean" / name)), crop)
        np.testing.assert_array_equal(np.array(Image.open(out / "smooth" / name)), rtv_smooth(crop))


def test_a_rerun_does_only_what_is_missing(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(photos), "-o", str(out), "--crop", "16"]
    assert main(arguments) == 0
    before = contents(out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    lost = next((out / "smooth" / "deep").iterdir())
    lost.unlink()
    for kind in ("smooth", "clean"):
        (out / kind / "deep" / f".{lost.name}.k2j3h4.png").write_bytes(b"half a picture")
    assert main(arguments) == 0
    assert contents(out) == before  # without what killed runs left
    changed = {p for p, at in times.items() if p.stat().st_mtime_ns != at}
    assert changed == {lost, Path(str(lost).replace("smooth/deep", "clean/deep"))}


def test_what_a_killed_run_left_of_a_long_name_goes(tmp_path: Path) -> None:
    photo = f"{'n' * 240}.png"
    write_photo(tmp_path / "photos" / photo, 20, 24, 0)
    out = tmp_path / "out"
    with atomic_path(out / photo) as temporary:
        pass
    (out / photo).rename(temporary)  # as if it had been killed before the end
    assert main([str(tmp_path / "photos"), "-o", str(out)]) == 0
    assert sorted(contents(out)) == ["dtpm-smooth.json", photo]


def test_broken_photos_are_named_at_the_end(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "broken.jpg").write_bytes(b"not a picture")
    truncated = (photos / "one.png").read_bytes()[:2000]
    (photos / "deep" / "cut.png").write_bytes(truncated)
    out = tmp_path / "out"
    assert main([str(photos), "-o", str(out)]) == 1
    assert sorted(contents(out)) == ["deep/two.png", "dtpm-smooth.json", "one.png"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2
    assert "cut.png: not a readable picture" in "".join(errors)
    assert "broken.jpg: not a readable picture" in "".join(errors)
    write_photo(photos / "narrow.png", 70, 33, 3)
    assert main([str(photos), "-o", str(tmp_path / "crops"), "--crop", "36"]) == 1
    said = capsys.readouterr().err
    assert "two.bmp: 70x33 is smaller than a crop of 36" in said
    assert "narrow.png: 33x70 is smaller than a crop of 36" in said


def test_a_photo_that_cannot_be_smoothed_keeps_no_other_from_its_result(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photo(photos / "three.png", 20, 24, 3)
    failures = {51: MemoryError(), 70: RuntimeError("a solve did not converge")}  # by width

    def smooth(photo: np.ndarray, **settings: Any) -> np.ndarray:
        if photo.shape[1] in failures:
            raise failures[photo.shape[1]]
        return photo

    monkeypatch.setattr("dtpm_fast.commands.smooth.rtv_smooth", smooth)
    out = tmp_path / "out"
    assert main([str(photos), "-o", str(out)]) == 1
    assert sorted(contents(out)) == ["dtpm-smooth.json", "three.png"]
    said = capsys.readouterr().err
    assert f"error: {photos / 'one.png'}: out of memory" in said
    assert f"error: {photos / 'deep' / 'two.bmp'}: a solve did not converge" in said


def test_settings_do_not_mix(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(photos), "-o", str(out)]) == 0
    for other in (["--lam", "0.5"], ["--crop", "16"]):
        assert main([str(photos), "-o", str(out), *other]) == 1
        assert "other settings" in capsys.readouterr().err
    assert json.loads((out / "dtpm-smooth.json").read_text())["lam"] == 0.01
    (out / "dtpm-smooth.json").write_text("{")
    assert main([str(photos), "-o", str(out)]) == 1
    assert "dtpm-smooth.json: not readable" in capsys.readouterr().err
    crops = [str(photos), "-o", str(tmp_path / "crops"), "--crop", "16", "--device", "cpu"]
    assert main(crops) == 0
    assert main([*crops, "--stride", "8"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_an_output_inside_the_input_is_not_smoothed_again(photos: Path) -> None:
    out = photos / "smooth"
    for _ in range(2):
        assert main([str(photos), "-o", str(out)]) == 0
        assert sorted(contents(out)) == ["deep/two.png", "dtpm-smooth.json", "one.png"]


def test_a_lost_clean_crop_is_made_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(photos), "-o", str(out), "--crop", "16"]) == 0
    before = contents(out)
    next((out / "clean").glob("*.png")).unlink()
    assert main([str(photos), "-o", str(out), "--crop", "16", "--stride", "16"]) == 0  # the default, said
    assert contents(out) == before


def test_pictures_that_are_no_results_are_not_taken_for_some(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photo(tmp_path / "out" / "one.png", 3, 3, 0)
    assert main([str(photos), "-o", str(tmp_path / "out")]) == 1
    assert "holds 1 pictures under the names of results" in capsys.readouterr().err
    assert sorted(contents(tmp_path / "out")) == ["one.png"]


def test_a_start_that_failed_claims_no_folder(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(tmp_path / "typo"), "-o", str(out), "--sigma", "5"]) == 1
    assert main([str(photos), "-o", str(out)]) == 0


@pytest.mark.parametrize("options", [["--crop", "16", "--mode", "matlab_pcg"], ["--crop", "16", "--sigma", "26"]])
def test_auto_takes_the_cpu_for_what_a_gpu_cannot(
    options: list[str],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("dtpm_fast.smoothing.cuda_unavailable", lambda device="cuda": None)
    assert main([str(photos), "-o", str(tmp_path / "out"), *options]) == 0
    assert "smoothing on cpu" in capsys.readouterr().err
    assert main([str(photos), "-o", str(tmp_path / "other"), "--device", "cuda", *options]) == 1
    assert "is for the CPU; use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing", "-o", "out"], 1, "missing: no such file or folder"),
        (["empty", "-o", "out"], 1, "empty: no pictures in it"),
        (["photos", "photos", "-o", "out"], 1, "would have one name"),
        (["photos", "-o", "photos"], 1, "photos: is the input itself; choose another folder"),
        (["photos/one.png", "-o", "photos"], 1, "one.png: the result would replace it; choose another folder"),
        (["photos", "-o", "photos/one.png/out"], 1, "cannot be written"),
        (["photos", "-o", "out", "--device", "tpu"], 1, "use auto, cpu, cuda or cuda:N"),
        (["photos", "-o", "out", "--device", "cudax:9"], 1, "use auto, cpu, cuda or cuda:N"),
        (["photos", "-o", "out", "--lam", "-1"], 2, "-1: must be zero or positive"),
        (["photos", "-o", "out", "--sigma", "0"], 2, "0: must be positive"),
        (["photos", "-o", "out", "--lam", "nan"], 2, "nan: must be zero or positive"),
        (["photos", "-o", "out", "--lam", "inf"], 2, "inf: must be zero or positive"),
        (["photos", "-o", "out", "--sigma", "5000"], 2, "5000: must be at most 1000"),
        (["photos", "-o", "out", "--crop", "x"], 2, "invalid int value"),
        (["photos", "-o", "out", "--stride", "4"], 2, "--stride needs --crop"),
        (["photos"], 2, "required"),
    ],
)
def test_bad_usage(
    arguments: list[str],
    code: int,
    message: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    if code == 2:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    else:
        assert main(arguments) == code
    assert message in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "dtpm-smooth photos/ -o smooth/" in capsys.readouterr().out


def test_a_closed_standard_error_keeps_no_photo_from_its_result(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dtpm_fast.commands.smooth", str(photos), "-o", str(tmp_path / "smooth")]
    run = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], cwd=tmp_path, stdout=subprocess.PIPE)
    assert run.returncode == 0 and run.stdout == b"" and any((tmp_path / "smooth").rglob("*.png"))


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for i in range(8):
        write_photo(photos / f"{i}.png", 5 * 48, 5 * 48, i)
    arguments = [str(photos), "--crop", "48"]
    assert main([*arguments, "-o", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "dtpm_fast.commands.smooth", *arguments, "-o", str(out)]
    for kills in range(1, 4):
        run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while len(list(out.rglob("smooth/*.png"))) < 45 * kills and run.poll() is None:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert 45 * kills <= len(list(out.rglob("smooth/*.png"))) < 200
    assert main([*arguments, "-o", str(out)]) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert len(list((out / "smooth").iterdir())) == 200


@pytest.mark.skipif(RAY, reason="Ray is installed, so nothing asks to install it")
def test_a_cluster_without_ray_says_what_to_install(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(photos), "-o", str(tmp_path / "out"), "--cluster", "local"]) == 1
    assert "pip install 'dtpm-fast[cluster]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not RAY, reason="needs Ray: pip install 'dtpm-fast[cluster]'")
def test_a_local_cluster_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"not a picture")
    assert main([str(photos), "-o", str(tmp_path / "here"), "--crop", "16", "--device", "cpu"]) == 1
    command = [sys.executable, "-m", "dtpm_fast.commands.smooth", str(photos), "--crop", "16"]
    command += ["-o", str(tmp_path / "there"), "--cluster", "local"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "broken.jpg: not a readable picture" in done.stderr
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
