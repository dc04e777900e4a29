import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtpm_fast import Restorer
from dtpm_fast.commands.restore import main, plan_outputs
from dtpm_fast.errors import UserError
from dtpm_fast.images import read_image, write_image
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.report import Case
from dtpm_fast.runtime.shipped import locate
from dtpm_fast.tasks import TASKS


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, random_weights: Callable[..., Path]) -> str:
    return str(random_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Every mode of picture, and two broken files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (21, 34, 3), dtype=np.uint8))
    rgb.save(folder / "colour.jpg")
    rgb.convert("L").save(folder / "grey.png")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "alpha.webp")
    Image.fromarray(rng.integers(0, 65536, (9, 12), dtype=np.uint16)).save(folder / "deep.tif")
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    (folder / "text.png").write_text("not a picture")
    whole = (folder / "colour.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not looked at")
    return folder


def test_a_folder_gives_a_folder_and_broken_pictures_are_named(
    photos: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = main([str(photos), "-o", str(out), "--task", "derain", "--weights", weights, "--device", "cpu"])
    assert code == 1
    written = sorted(path.name for path in out.iterdir())
    assert written == ["alpha.png", "colour.png", "deep.png", "dot.png", "grey.png", "palette.png"]
    with Image.open(out / "colour.png") as image:
        assert (image.size, image.mode) == ((34, 21), "RGB")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "text.png: not a readable picture" in errors[0]
    assert "truncated.jpg: not a readable picture" in errors[1]


def test_too_large_for_memory_or_disk_is_one_line_and_the_others_are_done(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, size in (("a.png", (8, 9)), ("huge.png", (80, 90)), ("unwritable.png", (10, 9)), ("z.png", (7, 9))):
        Image.new("RGB", size, "red").save(folder / name)
    monkeypatch.setattr("dtpm_fast.runtime.memory.free_memory", lambda _: 60 * 80 * 90 - 1)
    save = Image.Image.save

    def full(self: Image.Image, *given: object, **named: object) -> None:
        if self.size == (10, 9):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "save", full)
    given = [str(folder), "-o", str(out), "--task", "derain", "--weights", weights, "--device", "cpu", "--steps", "1"]
    assert main(given) == 1
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "z.png"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "huge.png: a picture of 80x90 pixels: not enough memory" in errors[0]
    assert "unwritable.png: could not be written (No space left on device)" in errors[1]


def test_a_photo_on_which_the_backend_fails_keeps_no_other_from_its_result(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, size in (("a.png", (8, 9)), ("b.png", (10, 9)), ("c.png", (8, 9))):
        Image.new("RGB", size, "red").save(folder / name)
    predict = DTPM.predict

    def failing(self: DTPM, y_d: torch.Tensor) -> torch.Tensor:
        if y_d.shape[3] > 8:
            raise RuntimeError("Too much shared memory required")
        return predict(self, y_d)

    monkeypatch.setattr(DTPM, "predict", failing)
    given = [str(folder), "-o", str(out), "--task", "derain", "--weights", weights, "--device", "cpu", "--steps", "1"]
    assert main([*given, "--backend", "reference"]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "c.png"]
    assert f"error: {folder / 'b.png'}: Too much shared memory required" in capsys.readouterr().err


def test_one_photo_goes_to_a_file_and_the_same_seed_gives_the_same_bytes(
    photos: Path, weights: str, tmp_path: Path
) -> None:
    common = ["--task", "derain", "--weights", weights, "--device", "cpu", "--steps", "2"]
    for name, seed in (("a.png", "3"), ("b.png", "3"), ("c.png", "4"), ("d.jpg", "3")):
        assert main([str(photos / "grey.png"), "-o", str(tmp_path / name), "--seed", seed, *common]) == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b
    assert a != c
    with Image.open(tmp_path / "d.jpg") as image:
        assert image.format == "JPEG"


def test_a_report_of_folders_shows_some_of_the_photos(
    photos: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(photos), "-o", str(tmp_path / "out"), "--task", "derain", "--weights", weights, "--device", "cpu"]
    page = tmp_path / "deep" / "page.html"
    assert main([*common, "--report", str(page), "--report-images", "3"]) == 1  # two broken ones
    assert len(list((tmp_path / "out").iterdir())) == 6
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r'<h2 id="case\d+">(\S+)', text)  # of alpha, colour, deep, dot, grey, palette, text, truncated
    assert shown == ["alpha.webp", "grey.png"]  # and the last, which is broken
    assert "evenly spaced by name" in text and "--report-images 3" in text
    capsys.readouterr()
    broken = [
        str(photos / "text.png"),
        "-o",
        str(tmp_path / "x.png"),
        *common[3:],
        "--report",
        str(tmp_path / "x.html"),
    ]
    assert main(broken) == 1
    assert "not a readable picture" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
    for wrong in (["--report-images", "0"], ["--report", str(tmp_path)]):
        with pytest.raises(SystemExit) as usage:
            main([*common, *wrong])
        assert usage.value.code == 2


def test_a_report_says_what_ran_and_shows_each_version_under_its_name(
    photos: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[Case] = []
    facts: dict[str, str] = {}

    def write_report(given: Iterable[Case], path: Path, title: str, about: dict[str, str]) -> None:
        cases.extend(given)
        facts.update(about, title=title)

    monkeypatch.setattr("dtpm_fast.report.write_report", write_report)
    out = tmp_path / "the output.png"
    common = ["--task", "derain", "--weights", weights, "--device", "cpu"]
    assert main([str(photos / "grey.png"), "-o", str(out), *common, "--report", str(tmp_path / "page.html")]) == 0
    predicted = Restorer.from_pretrained(weights, "derain", device="cpu").predict(photos / "grey.png")
    (case,) = cases
    shown = {picture.label: picture.image for picture in case.versions}
    assert list(shown) == ["input", "initial predictor", "result"]  # from the slider's left to its right
    wanted = read_image(photos / "grey.png"), predicted, read_image(out)
    for image, expected in zip(shown.values(), wanted, strict=True):
        np.testing.assert_array_equal(image, expected)
    assert facts["Photos"] == "1 photo"
    assert facts["Restorer"].startswith("weights tiny.safetensors (derain, tiny")
    assert f"-o '{out}' --task derain" in facts["Command"]
    assert facts["title"] == f"dtpm-restore: {TASKS['derain']}"


def test_a_report_tells_photos_of_one_name_apart(photos: Path, weights: str, tmp_path: Path) -> None:
    for folder in ("monday", "tuesday"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        shutil.copy(photos / "grey.png", tmp_path / "in" / folder)
    page = tmp_path / "page.html"
    command = [str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--task", "derain", "--weights", weights]
    assert main([*command, "--device", "cpu", "--report", str(page)]) == 0
    shown = re.findall(r'<h2 id="case\d+">(\S+)', page.read_text(encoding="utf-8"))
    assert shown == ["monday/grey.png", "tuesday/grey.png"]


def test_outputs_keep_the_stem(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("x.jpg", "y.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    alone = tmp_path / "z.jpg"
    Image.new("RGB", (2, 2)).save(alone)
    out = tmp_path / "out"
    assert plan_outputs([folder], out) == [(folder / "x.jpg", out / "x.png"), (folder / "y.png", out / "y.png")]
    assert plan_outputs([folder, alone], out)[-1] == (alone, out / "z.png")
    assert plan_outputs([folder, alone], out)[0] == (folder / "x.jpg", out / "in" / "x.png")
    assert plan_outputs([alone], out) == [(alone, out / "z.png")]
    for name in ("new.webp", "NEW.JPG"):
        assert plan_outputs([alone], tmp_path / name) == [(alone, tmp_path / name)]
    (tmp_path / "folder.d").mkdir()
    assert plan_outputs([alone], tmp_path / "folder.d") == [(alone, tmp_path / "folder.d" / "z.png")]


def test_a_folder_keeps_its_shape_and_photos_of_one_stem_their_names(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "in" / "restored"
    (folder / "day two").mkdir(parents=True)
    out.mkdir()
    for name in ("x.jpg", "x.png", "day two/x.jpg", "restored/old.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    assert plan_outputs([folder], out) == [
        (folder / "day two" / "x.jpg", out / "day two" / "x.png"),
        (folder / "x.jpg", out / "x.jpg.png"),
        (folder / "x.png", out / "x.png.png"),
    ]


def test_a_trailing_slash_makes_a_folder(tmp_path: Path, weights: str) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "x.jpg")
    given = [str(tmp_path / "x.jpg"), "-o", f"{tmp_path / 'results.v2'}{os.sep}"]
    assert main([*given, "--task", "derain", "--weights", weights, "--device", "cpu"]) == 0
    assert (tmp_path / "results.v2" / "x.png").is_file()


def test_an_empty_path_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["", "-o", "out"], ["photo.jpg", "-o", ""]):
        with pytest.raises(SystemExit, match="2"):
            main([*given, "--task", "derain"])
        assert "is empty; an unset variable?" in capsys.readouterr().err


def test_a_second_run_goes_on_where_the_first_stopped(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    given = [str(folder), "-o", str(out), "--task", "derain", "--weights", weights, "--device", "cpu"]

    def full(path: Path, rgb: np.ndarray) -> None:
        if path.name != "a.png":
            raise UserError(f"{path}: no space left")
        write_image(path, rgb)

    with monkeypatch.context() as patched:
        patched.setattr("dtpm_fast.commands.restore.write_image", full)
        assert main(given) == 1
    assert "c.png: no space left" in capsys.readouterr().err
    before = (out / "a.png").stat().st_mtime_ns
    assert main([*given, "--skip-existing"]) == 0
    assert "1 of 3 have a result already" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "c.png"]
    assert (out / "a.png").stat().st_mtime_ns == before


def test_what_failed_before_ctrl_c_is_named(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_text("not a picture")
    Image.new("RGB", (2, 2)).save(folder / "b.png")

    def stopped(path: Path, rgb: np.ndarray) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dtpm_fast.commands.restore.write_image", stopped)
    given = [str(folder), "-o", str(tmp_path / "out"), "--task", "derain", "--weights", weights, "--device", "cpu"]
    assert main(given) == 130
    said = capsys.readouterr().err
    assert f"error: {folder / 'a.png'}: not a readable picture" in said
    assert said.endswith("stopped\n")


def test_unusable_arguments_end_before_any_work(tmp_path: Path, weights: str) -> None:
    picture = tmp_path / "z.jpg"
    Image.new("RGB", (2, 2)).save(picture)
    Image.new("RGB", (2, 2)).save(tmp_path / "z.png")
    (tmp_path / "empty").mkdir()
    for inputs, output, message in (
        ([tmp_path / "absent.png"], tmp_path / "out", "absent.png: no such file or folder"),
        ([tmp_path / "empty"], tmp_path / "out", "empty: no pictures in it"),
        ([picture], tmp_path / "out.txt", "out.txt: unknown picture format"),
        ([picture], picture, "the result would replace it"),
        ([tmp_path / "z.png"], tmp_path, "the result would replace it"),
        ([picture, tmp_path / "z.png"], tmp_path / "out", "both would be written to"),
        ([picture, tmp_path / "z.png"], picture, "is a file; -o needs a folder"),
        ([picture, tmp_path], tmp_path, "is the input itself"),
        ([picture, tmp_path / "z.png"], tmp_path, r"z\.png: the result of .*z\.jpg would replace it"),
    ):
        with pytest.raises(UserError, match=message):
            plan_outputs(inputs, output)
        given = [*map(str, inputs), "-o", str(output), "--task", "derain", "--weights", weights]
        assert main(given) == 1
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "z.jpg", "z.png"]


def test_a_folder_of_somebody_else_ends_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(UserError, match="is not yours to write in"):
        plan_outputs([tmp_path / "x.png"], tmp_path / "new" / "folder")


def test_what_is_broken_in_a_folder_is_named_at_the_end(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    (folder / "no picture.png").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(folder / "a.png")
    (folder / "link.png").symlink_to("gone.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    given = [str(folder), "-o", str(tmp_path / "out"), "--task", "derain", "--weights", weights, "--device", "cpu"]
    assert main(given) == 1
    said = capsys.readouterr().err
    assert "link.png: no such file" in said and "loop.png: not a readable picture" in said and "pipe.png" not in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_a_name_that_is_no_utf8_and_one_of_255_bytes(tmp_path: Path, weights: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (30, 30)).save(folder / os.fsdecode(b"caf\xe9.png"))
    Image.new("RGB", (2, 2)).save(folder / ("\u3042" * 83 + "x.png"))
    page = tmp_path / "page.html"
    given = [str(folder), "-o", str(tmp_path / "out"), "--task", "derain", "--weights", weights, "--device", "cpu"]
    assert main([*given, "--report", str(page)]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert "caf" in page.read_text(encoding="utf-8")


def test_shipped_weights_are_found_beside_a_folder_of_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("light").mkdir()
    assert locate("light", "derain").name == "light-derain.safetensors"
    with pytest.raises(UserError, match="is a folder"):
        locate("./light/", "derain")
    with pytest.raises(SystemExit):
        main(["a.png", "-o", "b.png"])


def test_a_wrong_checkpoint_ends_before_any_work(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], random_weights: Callable[..., Path]
) -> None:
    prior = random_weights(tmp_path / "prior.safetensors", stage=1)
    out = tmp_path / "out"
    assert main([str(photos), "-o", str(out), "--task", "derain", "--weights", str(prior)]) == 1
    assert "prior.safetensors: holds stage 1 weights" in capsys.readouterr().err
    assert not out.exists()


def test_a_weights_file_knows_its_task(
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    random_weights: Callable[..., Path],
) -> None:
    weights = random_weights(tmp_path / "mine.safetensors", task="defocus")
    given = [str(photos / "colour.jpg"), "-o", str(tmp_path / "sharp.png"), "--device", "cpu", "--steps", "1"]
    assert main([*given, "--weights", str(weights)]) == 0
    assert "mine.safetensors (defocus, " in caplog.text
    with pytest.raises(SystemExit) as stop:
        main(given)  # a name stands for every task's weights
    assert stop.value.code == 2 and "--task is needed: --weights light" in capsys.readouterr().err


def test_settings_that_cannot_be_had_are_one_line(
    photos: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(photos), "-o", str(tmp_path / "out"), "--task", "derain", "--weights", weights, "--device", "cpu"]
    for more, message in (
        (["--backend", "graph"], "error: backend graph: CUDA graphs need a CUDA device, and this is a CPU"),
        (["--backend", "magic"], "error: unknown backend 'magic'; choose one of auto, reference"),
        (["--precision", "int4"], "error: unknown precision 'int4'"),
        (["--sampler", "euler"], "error: unknown sampler 'euler'"),
        (["--steps", "0"], "error: steps = 0"),
        (["--seed", str(2**64)], "error: seed 18446744073709551616: must be a whole number"),
        (["--tile", "3"], "error: tile 3: use auto, none, or a number of pixels from 128 on"),
    ):
        assert main([*given, *more]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(message)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stop:
        main([*given, "--tile", "big"])
    assert stop.value.code == 2


def test_every_setting_works_together(photos: Path, weights: str, tmp_path: Path) -> None:
    given = [str(photos / "colour.jpg"), "-o", str(tmp_path / "a.png"), "--task", "derain", "--weights", weights]
    settings = ["--device", "cpu", "--backend", "fused", "--precision", "float32", "--sampler", "dpm++2m"]
    assert main([*given, *settings, "--tile", "128", "--steps", "3"]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (34, 21)


def test_bad_usage_is_exit_code_2_and_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["a.png", "-o", "b.png", "--task", "derain"]
    for arguments in ([], ["a.png"], ["a.png", "-o", "b.png", "--task", "swim"], [*usual, "--report", "photo.png"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "dtpm-restore rainy.jpg -o dry.png --task derain" in capsys.readouterr().out


def test_the_command_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dtpm_fast.commands.restore", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "examples:" in done.stdout
