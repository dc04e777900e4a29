import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dtpm_fast import Restorer
from dtpm_fast.diffusion import restore
from dtpm_fast.errors import UserError
from dtpm_fast.runtime.memory import needed
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.photo import open_photo, pad_to
from dtpm_fast.runtime.shipped import shipped


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, random_weights: Callable[..., Path]) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights") / "tiny-derain.safetensors")


@pytest.fixture(scope="module")
def restorer(weights: Path) -> Restorer:
    return Restorer.from_pretrained(weights, "derain", device="cpu", backend="reference")


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (2, 3), (8, 8), (37, 50)])
def test_every_size_comes_back_as_it_went_in(restorer: Restorer, size: tuple[int, int]) -> None:
    before = photo(*size)
    kept = before.copy()
    after = restorer(before)
    assert after.shape == before.shape
    assert after.dtype == np.uint8
    np.testing.assert_array_equal(before, kept)
    assert (after != before).any()


def test_the_picture_is_the_plain_references(restorer: Restorer) -> None:
    """On a multiple of 8 nothing is padded, so the paper's sampler gives the very same picture."""
    before = photo(24, 40)
    y_d = torch.from_numpy(before).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected, _ = restore(restorer.model, y_d, noise_fields(0, 24, 40), 4, restorer.config.diffusion)
    expected = ((expected + 1) * 127.5).round().to(torch.uint8)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(restorer(before), expected.numpy())


@pytest.mark.parametrize("settings", [{}, {"eta": 0.7}], ids=str)
def test_the_noise_is_that_of_the_pictures_own_size(
    tmp_path: Path, random_weights: Callable[..., Path], settings: dict[str, Any]
) -> None:
    """Drawn before the border is added and mirrored with it, so that it is a function of the seed and the size."""
    weights = random_weights(tmp_path / "w.safetensors", **settings)
    restorer = Restorer.from_pretrained(weights, "derain", device="cpu", backend="reference", seed=5)
    before = torch.rand(1, 3, 21, 34, generator=torch.Generator().manual_seed(0))
    noise = pad_to(noise_fields(5, 21, 34, 4 if settings else 1), 24, 40)
    with torch.inference_mode():
        wanted = restorer.backend.restore(pad_to(before, 24, 40) * 2 - 1, noise)[..., :21, :34] * 0.5 + 0.5
    torch.testing.assert_close(restorer(before), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_predictors_picture_is_the_plain_predictors(weights: Path, backend: str) -> None:
    restorer = Restorer.from_pretrained(weights, "derain", device="cpu", backend=backend)
    tensor = torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))
    y_d = pad_to(tensor, 40, 56) * 2 - 1
    wanted = (restorer.model.predict(y_d)[..., :37, :50] * 0.5 + 0.5).clamp(0, 1)
    assert torch.allclose(restorer.predict(tensor), wanted, atol=1e-5)
    assert not torch.allclose(restorer(tensor), wanted, atol=1e-2)
    array = photo(37, 50)  # bright and dark pixels: the predictor goes beyond either end, and must not wrap around
    as_tensor = restorer.predict(torch.from_numpy(array).permute(2, 0, 1)[None] / 255)
    assert np.abs(restorer.predict(array) - as_tensor[0].permute(1, 2, 0).numpy() * 255).max() <= 0.51


def test_the_predictors_picture_in_tiles(weights: Path) -> None:
    """No edge of a window shows: what differs from the whole picture is channel attention's mean alone."""
    whole, tiled = (Restorer.from_pretrained(weights, "derain", device="cpu", tile=tile) for tile in (None, 128))
    array = photo(300, 420)
    difference = np.abs(whole.predict(array).astype(int) - tiled.predict(array).astype(int))
    assert difference.mean() < 1


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(weights: Path) -> None:
    before = photo(33, 21)
    for backend in ("reference", "fused"):
        once, again, other = (
            Restorer.from_pretrained(weights, "derain", device="cpu", backend=backend, seed=seed)(before)
            for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(once, again)
        assert (once != other).any()


def test_settings_may_be_numpys_and_a_programs_autocast_changes_no_byte(weights: Path) -> None:
    whole = np.int64
    for backend, tile in (("reference", None), ("fused", 128)):
        settings = {"device": "cpu", "backend": backend, "precision": "float32"}
        of_numpy = Restorer.from_pretrained(
            weights, "derain", steps=whole(2), seed=whole(5), tile=tile and whole(tile), **settings
        )
        own = Restorer.from_pretrained(weights, "derain", steps=2, seed=5, tile=tile, **settings)
        before = photo(150, 21)
        with torch.autocast("cpu", torch.bfloat16):
            found = of_numpy(before)
        np.testing.assert_array_equal(found, own(before))


def test_all_kinds_of_photo_agree(restorer: Restorer, tmp_path: Path) -> None:
    before = photo(18, 27)
    Image.fromarray(before).save(tmp_path / "photo.png")
    after = restorer(before)
    from_path = restorer(tmp_path / "photo.png")
    from_pillow = restorer(Image.fromarray(before))
    tensor = torch.from_numpy(before).permute(2, 0, 1)[None].double() / 255
    from_tensor = restorer(tensor)
    assert isinstance(from_path, Image.Image)
    assert isinstance(from_pillow, Image.Image)
    np.testing.assert_array_equal(np.asarray(from_path), after)
    np.testing.assert_array_equal(np.asarray(from_pillow), after)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show: Pillow's picture lies on its side
    Image.fromarray(np.ascontiguousarray(np.rot90(before))).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        np.testing.assert_array_equal(np.asarray(restorer(turned)), after)
    assert from_tensor.dtype == torch.float64
    assert from_tensor.shape == tensor.shape
    as_bytes = (from_tensor[0].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(as_bytes - after).max() <= 1  # one, where a value lies between two bytes


def test_a_batch_gives_what_its_pictures_give(restorer: Restorer) -> None:
    batch = torch.rand(3, 3, 16, 20)
    together = restorer(batch)
    apart = torch.cat([restorer(picture[None]) for picture in batch])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)


def test_a_batch_that_is_too_large_goes_in_parts(
    weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    restorer = Restorer.from_pretrained(weights, "derain", device="cpu")
    caplog.set_level(logging.INFO, "dtpm_fast")
    batch = torch.rand(5, 3, 16, 20)
    together = restorer(batch)
    plan = restorer._plan()
    assert plan is not None
    two = 2 * needed(restorer.config.model, 16 * 24, plan.dtype, plan.form)
    monkeypatch.setattr("dtpm_fast.runtime.restorer.budget", lambda device: two)
    torch.testing.assert_close(restorer(batch), together, rtol=0, atol=2e-5)
    assert "5 pictures of 24x16: 2 at a time, because the memory asks for it" in caplog.messages


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (photo(4, 4).astype(np.float32), ValueError, "uint8"),
        (photo(4, 4)[..., 0], ValueError, "HxWx3"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "not empty"),
        (torch.rand(3, 4, 4), ValueError, r"\(B, 3, H, W\)"),
        (torch.rand(1, 3, 4, 4) - 1, ValueError, r"\[0, 1\]"),
        (torch.full((1, 3, 4, 4), torch.nan), ValueError, r"\[0, 1\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ValueError, "floating point"),
        (42, TypeError, "int"),
        ("absent.png", UserError, "absent.png: no such file"),
    ],
)
def test_a_wrong_photo_is_refused(restorer: Restorer, wrong: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        restorer(wrong)


def test_about_says_what_runs_and_why(restorer: Restorer) -> None:
    for part in ("tiny-derain.safetensors", "derain", "tiny", "none, random", "4 steps", "cpu: as asked", "reference"):
        assert part in restorer.about
    assert "\n" not in restorer.about


def test_unusable_weights_are_named(weights: Path, tmp_path: Path, random_weights: Callable[..., Path]) -> None:
    prior = random_weights(tmp_path / "prior.safetensors", stage=1)
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, task, message in (
        (prior, "derain", "prior.safetensors: holds stage 1 weights"),
        (prior, None, "prior.safetensors: holds stage 1 weights.* --stage 2 --task TASK"),
        (weights, "deblur", "trained for the task 'derain', not for 'deblur'"),
        (tmp_path / "absent.safetensors", "derain", "absent.safetensors: no such weights file"),
        (tmp_path / "text.safetensors", "derain", "text.safetensors: not a readable safetensors file"),
        ("enormous", "derain", "no weights 'enormous' for the task 'derain' ship"),
        ("light", "swim", "unknown task 'swim'"),
    ):
        with pytest.raises(UserError, match=message):
            Restorer.from_pretrained(name, task)


def test_weights_for_the_whole_task_serve_its_halves_only(
    weights: Path, tmp_path: Path, random_weights: Callable[..., Path]
) -> None:
    both = random_weights(tmp_path / "both.safetensors", task="rainhaze")
    assert Restorer.from_pretrained(both, "dehaze", device="cpu")(photo(8, 8)).shape == (8, 8, 3)
    with pytest.raises(UserError, match="not for 'rainhaze'"):
        Restorer.from_pretrained(weights, "rainhaze")
    assert Restorer.from_pretrained(both, device="cpu").task == "rainhaze"  # a file's own task, where none is asked for


@pytest.mark.parametrize("task", ["dehaze", "derain", "rainhaze", "desnow", "raindrop", "deblur", "defocus"])
def test_what_ships_restores_by_name(task: str) -> None:
    assert f"light-{task}" in shipped()
    after = Restorer.from_pretrained("light", task, device="cpu")(photo(40, 56))
    assert after.shape == (40, 56, 3)


def test_the_other_tasks_of_what_ships_are_found_by_its_name() -> None:
    restorer = Restorer.from_pretrained("light", "derain", device="cpu")
    for task in ("desnow", "deblur"):
        restorer.set_task(task)
        assert restorer.task == task
        assert restorer.about.startswith(f"weights light-{task}.safetensors ({task}, light; ")
    fresh = Restorer.from_pretrained("light", "deblur", device="cpu")
    np.testing.assert_array_equal(restorer(photo(16, 24)), fresh(photo(16, 24)))


def test_unusable_settings_are_named(weights: Path) -> None:
    for settings, message in (
        ({"steps": 0}, "steps = 0: must be a whole number from 1 to 1000"),
        ({"steps": "4"}, "steps = '4': must be a whole number from 1 to 1000"),
        ({"steps": 1001}, "steps = 1001"),
        ({"steps": True}, "steps = True: must be a whole number"),
        ({"backend": "magic"}, "unknown backend 'magic'"),
        ({"device": "magic"}, "unknown device 'magic'"),
        ({"device": None}, "unknown device None"),
        ({"seed": 1.5}, "seed 1.5: must be a whole number"),
        ({"seed": True}, "seed True: must be a whole number"),
        ({"tile": True}, "tile True: use auto, none, or a number"),
    ):
        with pytest.raises(UserError, match=message):
            Restorer.from_pretrained(weights, "derain", **settings)


@pytest.mark.parametrize(("side", "size"), [(1, 8), (3, 16), (7, 8), (8, 8), (5, 24)])
def test_padding_mirrors_as_often_as_it_takes(side: int, size: int) -> None:
    image = torch.rand(2, 3, side, side + 1)
    expected = np.pad(image.numpy(), ((0, 0), (0, 0), (0, size - side), (0, 0)), mode="reflect")
    expected = np.pad(expected, ((0, 0), (0, 0), (0, 0), (0, size + 1 - side - 1)), mode="reflect")
    np.testing.assert_array_equal(pad_to(image, size, size + 1).numpy(), expected)


@pytest.mark.parametrize("turned", [np.s_[::-1], np.s_[:, ::-1], np.s_[..., ::-1], np.s_[::2, 1:]])
def test_a_view_of_an_array_is_a_photo_too(turned: Any) -> None:
    """BGR to RGB by [..., ::-1], flips and crops: views whose strides PyTorch does not take."""
    view = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)[turned]
    batch, back = open_photo(view)
    assert batch.is_contiguous()
    assert np.array_equal(back(batch), view)
