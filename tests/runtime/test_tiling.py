import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtpm_fast import Restorer
from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.runtime import memory
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.plan import Plan, native_form
from dtpm_fast.runtime.restorer import _out_of_memory
from dtpm_fast.runtime.sampler import make_steps
from dtpm_fast.runtime.tiling import OVERLAP, Tiled, blend_weight, windows

LAYOUTS = [
    (64, 64, 32, 16, 16),
    (128, 200, 48, 8, 16),
    (80, 336, 64, 16, 32),
    (512, 48, 128, 16, 64),
    (96, 96, 8, 8, 8),
]


@pytest.mark.parametrize(("height", "width", "core", "multiple", "overlap"), LAYOUTS)
def test_windows_cover_the_picture_once(height: int, width: int, core: int, multiple: int, overlap: int) -> None:
    covered, weight = torch.zeros(height, width), torch.zeros(height, width)
    found = windows(height, width, core, multiple, overlap)
    sizes = set()
    for window in found:
        rows, columns = window.rows, window.columns
        sizes.add((rows.stop - rows.start, columns.stop - columns.start))
        for span in (rows, columns):
            assert span.start <= span.core_start < span.core_stop <= span.stop
            assert all(v % multiple == 0 for v in (span.start, span.stop, span.core_start, span.core_stop))
        covered[rows.core_start : rows.core_stop, columns.core_start : columns.core_stop] += 1
        part = blend_weight(window, height, width, overlap)
        assert part.shape == window.of(weight[None, None]).shape[-2:]
        window.of(weight[None, None]).add_(part)
    assert len(sizes) == 1  # one compiled size, one captured size
    assert torch.equal(covered, torch.ones(height, width))
    torch.testing.assert_close(weight, torch.ones(height, width), rtol=0, atol=1e-6)


def test_a_picture_that_fits_is_one_window() -> None:
    assert len(windows(64, 96, 96, 16, 16)) == 1
    assert len(windows(64, 160, 96, 16, 16)) == 2


def psnr(difference: Tensor) -> float:
    return float(10 * torch.log10(4 / difference.square().mean()))


def smooth_picture(height: int, width: int) -> Tensor:
    """Bright on one side and dark on the other, with texture: the means of its parts differ."""
    generator = torch.Generator().manual_seed(0)
    texture = torch.rand(1, 3, height, width, generator=generator) - 0.5
    slope = torch.linspace(-1, 1, width)[None, None, None] * torch.linspace(0.2, 1, height)[None, None, :, None]
    return (slope + 0.5 * texture * (slope > 0)).clamp(-1, 1)


@pytest.mark.parametrize("settings", [{}, {"semantic_code": "compact"}, {"predictor": "none"}], ids=str)
def test_tiles_give_the_untiled_picture_also_at_their_seams(random_model: Callable[..., tuple], settings: dict) -> None:
    model, config = random_model(**settings)
    steps = make_steps(config, 3)
    plan = Plan(model, steps)
    y_d, noise = smooth_picture(256, 384), noise_fields(0, 256, 384)
    with torch.inference_mode():
        whole = plan.restore(y_d, noise)
        told: list[tuple[int, int]] = []
        tiled = Tiled(plan, 128, model.multiple, overlap=32, progress=lambda *how_far: told.append(how_far))
        difference = (tiled.restore(y_d, noise) - whole).double()
    assert psnr(difference) >= 92  # windows with means of their own: 63 to 91 dB; a window's borders counted twice: 80
    tiles = windows(256, 384, 128, model.multiple, 32)
    assert len(tiles) > 4
    networks = 3 + (config.model.predictor != "none")
    assert told == [(number, 2 * len(tiles) * networks) for number in range(1, 2 * len(tiles) * networks + 1)]
    for window in tiles:
        if window.rows.core_start:
            assert psnr(difference[:, :, window.rows.core_start - 8 : window.rows.core_start + 8]) >= 50
        if window.columns.core_start:
            assert psnr(difference[..., window.columns.core_start - 8 : window.columns.core_start + 8]) >= 50


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"semantic_code": "compact"},
        {"semantic_code": "compact", "code_source": "degraded", "condition": "predicted"},
        {"eta": 0.7},
    ],
    ids=str,
)
def test_one_window_is_the_plan_itself(random_model: Callable[..., tuple], settings: dict) -> None:
    model, config = random_model(**settings)
    plan = Plan(model, make_steps(config, 2))
    y_d, noise = smooth_picture(32, 48), noise_fields(0, 32, 48, plan.steps.noise_fields)
    told: list[tuple[int, int]] = []
    tiled = Tiled(plan, 128, model.multiple, progress=lambda *how_far: told.append(how_far))
    with torch.inference_mode():
        assert torch.equal(tiled.restore(y_d, noise), plan.restore(y_d, noise))
    assert told == [(1, 3), (2, 3), (3, 3)]
    told.clear()
    Tiled(plan, 128, model.multiple, progress=lambda *how_far: told.append(how_far)).prepare(y_d)
    assert told == [(1, 1)]


def test_fused_kernels_are_refused(random_model: Callable[..., tuple]) -> None:
    model, config = random_model()
    with pytest.raises(UserError, match="folded blocks"):
        Tiled(Plan(model, make_steps(config, 2), form="kernels"), 128, model.multiple)


def test_auto_takes_the_largest_tile_that_fits() -> None:
    config, dtype = Config.of(preset="light").model, torch.float32

    def chosen(height: int, width: int, free: int) -> int | None:
        return memory.choose_tile(config, 1, height, width, dtype, free)

    assert chosen(256, 256, 1 << 30) is None
    tiles = [chosen(4320, 7680, gigabytes << 30) for gigabytes in (64, 16, 8, 4, 3)]
    assert tiles[0] is not None or memory.needed(config, 4320 * 7680, dtype) <= 64 << 30
    numbers = [tile for tile in tiles[1:] if tile is not None]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 1
    assert chosen(4320, 7680, 0) == memory.TILES[-1]
    for batch in (1, 3):  # a window of this tile and what stays whole fit exactly, and nothing larger
        window = windows(4320, 7680, 512, 16)[0]
        pixels = batch * (window.rows.stop - window.rows.start) * (window.columns.stop - window.columns.start)
        takes = memory.needed(config, pixels, dtype) + memory.whole(batch, 4320, 7680)
        assert memory.choose_tile(config, batch, 4320, 7680, dtype, takes) == 512
        assert memory.choose_tile(config, batch, 4320, 7680, dtype, takes - 1) == 384
    for pictures, tiled in ((1, False), (2, True)):
        tile = memory.choose_tile(config, pictures, 512, 512, dtype, memory.needed(config, 512 * 512, dtype))
        assert (tile is not None) == tiled


def test_a_picture_may_take_half_of_what_is_free_and_two_gib_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, on_cpu, on_gpu in ((3 << 30, 3 << 29, 3 << 29), (16 << 30, 2 << 30, 8 << 30)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free)
        assert memory.budget(torch.device("cpu")) == on_cpu
        assert memory.budget(torch.device("cuda")) == on_gpu


def test_of_cpp_blocks_only_products_inputs_take_less_in_bfloat16() -> None:
    config = Config.of(preset="light").model
    for form, least in (("native", 0.7), ("folded", 0.5)):
        takes = [memory.needed(config, 1000, dtype, form) for dtype in (torch.float32, torch.bfloat16)]
        assert least * takes[0] < takes[1] < 0.9 * takes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"preset": "light"}, {"adapter_ratio": 0.6, "encoder_blocks": (2, 1, 1)}, {"adapter_positions": "none"}],
    ids=str,
)
def test_the_conditions_of_cpp_blocks_are_counted(
    random_model: Callable[..., tuple], settings: dict, dtype: torch.dtype
) -> None:
    """The adapters' share of what a picture takes is at least what the plan holds, and no more where vectors have 16
    numbers."""
    model, config = random_model(**settings)
    isa = native_form(model, dtype)
    if isa is None:
        pytest.skip(f"no C++ blocks here for {dtype}")
    plan, none = Plan(model, make_steps(config, 2), dtype, "native"), replace(config.model, adapter_positions="none")
    with torch.inference_mode():
        found = plan.prepare(smooth_picture(32, 48))
    held = sum(value.nbytes for name, value in found.items() if name.startswith("adapter."))
    counted = [memory.needed(c, 32 * 48, dtype, "native") for c in (config.model, none)]
    assert held <= counted[0] - counted[1]
    if isa not in ("avx2", "portable"):
        assert held == counted[0] - counted[1]


def test_a_photo_of_1080p_takes_no_tiles_in_two_gib() -> None:
    config = Config.of(preset="light").model
    assert memory.choose_tile(config, 1, 1088, 1920, torch.float32, memory.CPU_BUDGET, "native") is None


def test_pictures_that_fill_the_memory_leave_an_eighth_for_tiles() -> None:
    config, free = Config.of(preset="light").model, memory.CPU_BUDGET
    assert memory.whole(1, 4000, 7000) > free
    core = memory.choose_tile(config, 1, 4000, 7000, torch.float32, free, "native")
    assert core == 384  # of 128 the network sees every pixel four times, of 384 not twice
    assert memory.needed(config, (core + 2 * OVERLAP) ** 2, torch.float32, "native") <= free // 8


@pytest.mark.parametrize("tile", [None, 128])
def test_cpp_blocks_are_given_pictures_that_they_need_not_copy(
    tmp_path: Path, random_weights: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tile: int | None
) -> None:
    weights = random_weights(tmp_path / "w.safetensors")
    restorer = Restorer.from_pretrained(weights, "derain", 1, device="cpu", precision="float32", tile=tile)
    plan = restorer._plan()
    assert plan is not None
    if plan.form != "native":
        pytest.skip("no C++ blocks here")
    update, given = plan.step_module.update, []
    monkeypatch.setattr(plan.step_module, "update", lambda *tensors: given.extend(tensors) or update(*tensors))
    for tensor in (torch.rand(1, 3, 270, 40), torch.rand(1, 272, 40, 3).permute(0, 3, 1, 2)):
        given.clear()
        restorer(tensor)
        assert len(given) == 5 and all(found.is_contiguous() for found in given)


@pytest.fixture
def restorer(tmp_path: Path, random_weights: Callable[..., Path]) -> Restorer:
    weights = random_weights(tmp_path / "w.safetensors")
    return Restorer.from_pretrained(weights, "derain", 2, device="cpu", precision="float32")


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_out_of_memory_goes_on_in_tiles_and_halves_them(
    restorer: Restorer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = photo(520, 400)
    whole = restorer(before)
    limit = 300 * 300
    network = restorer.backend.step_module.network  # type: ignore[attr-defined]

    def limited(x: Tensor, *rest: object, **named: object) -> object:
        if x.shape[-2] * x.shape[-1] > limit:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return network(x, *rest, **named)

    monkeypatch.setattr(restorer.backend.step_module, "network", limited)  # type: ignore[attr-defined]
    caplog.set_level(logging.WARNING, "dtpm_fast")
    tiled = restorer(before)
    assert [m for m in caplog.messages if "out of memory" in m][-1].endswith("tiles of 130 pixels")
    assert np.abs(tiled.astype(int) - whole).max() <= 2
    restorer.tile = 256  # one of your own is kept
    with pytest.raises(UserError, match="400x520 pixels: not enough memory; use --tile auto"):
        restorer(before)
    restorer.tile, limit = "auto", 0
    with pytest.raises(UserError, match="400x520 pixels: not enough memory; make it smaller or cut it"):
        restorer(before)


def test_only_auto_asks_the_memory(
    tmp_path: Path,
    random_weights: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights, batch = random_weights(tmp_path / "w.safetensors"), torch.rand(2, 3, 16, 24)
    monkeypatch.setattr("dtpm_fast.runtime.restorer.budget", lambda device: 0)
    caplog.set_level(logging.INFO, "dtpm_fast")
    said = [
        "2 pictures of 24x16: 1 at a time, because the memory asks for it",
        *2 * ["24x16: in tiles of 128 pixels, because the memory asks for it"],
    ]
    for tile, messages in (("auto", said), ("none", []), (None, []), (256, [])):
        restorer = Restorer.from_pretrained(weights, "derain", 1, device="cpu", tile=tile)
        caplog.clear()
        restorer(batch)
        assert caplog.messages == messages


def test_a_picture_that_no_tile_makes_fit_is_one_line(restorer: Restorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 8 * 12 * 100 * 80 - 1)
    with pytest.raises(
        UserError, match=r"80x100 pixels: not enough memory; it takes 0.0 GiB .* make it smaller"
    ) as one:
        restorer(photo(100, 80))
    assert "\n" not in str(one.value)
    assert restorer(photo(50, 40)).shape == (50, 40, 3)
    with pytest.raises(UserError, match="40x50 pixels: not enough memory"):
        restorer(torch.zeros(5, 3, 50, 40))


def test_the_noise_of_many_steps_counts(
    tmp_path: Path, random_weights: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field for every step of weights with eta > 0; 2 pixels of border copy them."""
    weights = random_weights(tmp_path / "w.safetensors", eta=1.0)
    restorer = Restorer.from_pretrained(weights, "derain", 10, device="cpu")
    monkeypatch.setattr("dtpm_fast.runtime.restorer.noise_fields", lambda *_: pytest.fail("drawn already"))
    monkeypatch.setattr(memory, "free_memory", lambda _: 2 * 10 * 12 * 30 * 22 - 1)
    with pytest.raises(UserError, match="22x30 pixels: not enough memory"):
        restorer(photo(30, 22))


def test_a_capture_that_failed_for_memory_is_out_of_memory() -> None:
    def out_of_memory(first: Exception) -> bool:
        try:
            try:
                raise first
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        except RuntimeError as error:
            return _out_of_memory(error)

    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not out_of_memory(RuntimeError("illegal instruction"))


def test_a_containers_limit_counts_and_what_it_keeps_of_files_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory.free_in_group(tmp_path) is None
    for name, text in (
        ("memory.max", "8000\n"), ("memory.current", "7900\n"),
        ("memory.stat", "anon 1000\nfile 6900\ninactive_file 6000\nactive_file 900\n"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    assert memory.free_in_group(tmp_path) == 6100
    monkeypatch.setattr(memory, "free_in_group", lambda _, own=memory.free_in_group: own(tmp_path))
    assert memory.free_memory(torch.device("cpu")) == 6100
    (tmp_path / "memory.current").write_text("20000\n")
    assert memory.free_in_group(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_in_group(tmp_path) is None
    assert memory.free_memory(torch.device("cpu")) > 8000


def test_other_failures_are_not_taken_for_memory(restorer: Restorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(restorer.backend, "restore", broken)
    with pytest.raises(RuntimeError, match="something else"):
        restorer(photo(8, 8))


def test_a_tile_that_was_asked_for_is_used_and_an_unusable_one_is_refused(
    tmp_path: Path, random_weights: Callable[..., Path]
) -> None:
    weights = random_weights(tmp_path / "w.safetensors")
    before = photo(300, 420)
    common: dict[str, Any] = {"steps": 2, "device": "cpu", "precision": "float32"}
    whole = Restorer.from_pretrained(weights, "derain", **common, tile=None)(before)
    tiled = Restorer.from_pretrained(weights, "derain", **common, tile=128)(before)
    assert np.abs(tiled.astype(int) - whole).max() <= 2
    for settings, message in (
        ({"tile": 127}, "tile 127: use auto, none, or a number of pixels from 128 on"),
        ({"tile": "big"}, "tile big"),
        ({"tile": 256, "backend": "reference"}, "reference backend does not tile"),
    ):
        with pytest.raises(UserError, match=message):
            Restorer.from_pretrained(weights, "derain", **settings)
