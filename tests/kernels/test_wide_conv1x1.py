"""The products of many channels, by the rule: every prologue and epilogue that the block has of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dtpm_fast.kernels import Adapter
from dtpm_fast.kernels.adapter import adapter_ref
from dtpm_fast.kernels.block_compute import conv5_adapter, wide
from dtpm_fast.kernels.dispatch import WIDE, Table, options_of, table, using_table
from dtpm_fast.kernels.wide_conv1x1_triton import launch

# Of the block's products, what stands before and behind each.
USES = {
    "conv1": {"adaln", "doubled"},
    "conv3": {"attention", "residual", "factor"},
    "conv4": {"adaln", "gate", "doubled"},
    "conv5": {"residual", "factor"},
}


def random_inputs(use: str, samples: int, channels: int, height: int, width: int, offset: float) -> dict[str, Any]:
    has = USES[use]
    outputs = 2 * channels if "doubled" in has else channels

    def some_map(count: int) -> Tensor:
        return torch.randn(samples, count, height, width).to(memory_format=torch.channels_last)

    shift, scale = torch.randn(samples, 2 * channels).chunk(2, dim=1)  # views, as the runtime's rows are
    return {
        "x": some_map(channels) + offset,
        "weight": torch.randn(outputs, channels, 1, 1) / channels**0.5,
        "bias": torch.randn(outputs),
        "shift": shift if "adaln" in has else None,
        "scale": scale if "adaln" in has else None,
        "attention": torch.randn(samples, channels) if "attention" in has else None,
        "residual": some_map(channels) if "residual" in has else None,
        "factor": torch.randn(1, channels, 1, 1) if "factor" in has else None,
    }


def call(use: str, inputs: dict[str, Any], kernel: str = "none") -> Tensor:
    given = dict(inputs)
    shift, scale = given.pop("shift"), given.pop("scale")
    return wide(
        kernel,
        given.pop("x"),
        given.pop("weight"),
        given.pop("bias"),
        adaln=None if shift is None else (shift, scale, 1e-6),
        gate="gate" in USES[use],
        **given,
    )


def cast(inputs: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """All but the attention, which is float32 beside maps of 16 bits."""
    wide = torch.promote_types(dtype, torch.float32)
    kinds = {name: wide if name == "attention" else dtype for name in inputs}
    return {name: None if value is None else value.to(device, kinds[name]) for name, value in inputs.items()}


def eager(use: str, inputs: dict[str, Any]) -> Tensor:
    """The definition, in the inputs' dtype."""
    x, dtype = inputs["x"], inputs["x"].dtype
    if inputs["shift"] is not None:
        shift, scale = (inputs[name][:, None, None, :] for name in ("shift", "scale"))
        normal = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6)
        x = (normal * (1 + scale) + shift).permute(0, 3, 1, 2)
    if inputs["attention"] is not None:
        x = x * inputs["attention"].to(dtype)[:, :, None, None]
    x = torch.nn.functional.conv2d(x, inputs["weight"], inputs["bias"])
    if "gate" in USES[use]:
        a, b = x.chunk(2, dim=1)
        x = a * b
    if inputs["factor"] is not None:
        x = x * inputs["factor"]
    return x if inputs["residual"] is None else inputs["residual"] + x


TILES = {"BLOCK_P": 16, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}


def entries(options: dict[str, int]) -> Table:
    return table() | {"wide_adaln_conv1x1": [{"channels": 4096, "bits": b, "options": options} for b in (16, 32)]}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("shape", "offset", "options"),
    [
        ((2, 144, 3, 7), 0.0, TILES),  # channels that no tile divides, pixels neither
        ((3, 64, 5, 5), 100.0, TILES | {"BLOCK_P": 32, "BLOCK_N": 64}),
        ((1, 17, 1, 1), 1.0, TILES),
    ],
)
def test_triton_by_the_rule(
    device: str,
    dtype: torch.dtype,
    use: str,
    shape: tuple[int, int, int, int],
    offset: float,
    options: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    assert_as_exact_as_eager: Callable[..., None],
) -> None:
    monkeypatch.setattr("dtpm_fast.kernels.wide_conv1x1_triton.FEWEST_PROGRAMS", 1)

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = cast(random_inputs(use, *shape, offset), device, dtype)
        with using_table(entries(options)):
            ours = call(use, inputs, "wide_adaln_conv1x1")
        assert ours.is_contiguous(memory_format=torch.channels_last)
        return [ours], [eager(use, inputs)], [eager(use, cast(inputs, device, torch.float64))]

    assert_as_exact_as_eager(draw, ["out"])


ENTRY = {"conv1": "wide_adaln_conv1x1", "conv3": "wide_attention_conv1x1_residual", "conv4": "wide_adaln_conv1x1_gate"}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", [(2, 160, 9, 31), (1, 256, 5, 24)])  # no tile divides the first
def test_triton_with_the_table_in_use(
    device: str,
    dtype: torch.dtype,
    use: str,
    shape: tuple[int, int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    assert_as_exact_as_eager: Callable[..., None],
) -> None:
    kernel = ENTRY.get(use, "wide_conv1x1_residual")
    if options_of(kernel, shape[1], dtype) is None:
        pytest.skip(f"the table leaves {kernel} of {shape[1]} channels in {dtype} to cuBLAS")
    monkeypatch.setattr("dtpm_fast.kernels.wide_conv1x1_triton.FEWEST_PROGRAMS", 1)

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = cast(random_inputs(use, *shape, 1.0), device, dtype)
        ours = call(use, inputs, kernel)
        return [ours], [eager(use, inputs)], [eager(use, cast(inputs, device, torch.float64))]

    assert_as_exact_as_eager(draw, ["out"])


@pytest.mark.parametrize(
    ("shape", "rank", "options"),
    [
        ((2, 144, 3, 7), 36, TILES),
        ((3, 64, 5, 5), 16, TILES | {"BLOCK_P": 32, "BLOCK_N": 64}),
        ((1, 17, 1, 1), 1, TILES),
        ((2, 160, 9, 31), 40, None),  # the table in use
    ],
)
def test_triton_with_the_adapter_by_the_rule(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    rank: int,
    options: dict[str, int] | None,
    monkeypatch: pytest.MonkeyPatch,
    assert_as_exact_as_eager: Callable[..., None],
) -> None:
    kernel, (samples, channels, height, width) = "wide_conv1x1_adapter", shape
    if options is None and options_of(kernel, channels, dtype) is None:
        pytest.skip(f"the table leaves {kernel} of {channels} channels in {dtype} to cuBLAS")
    monkeypatch.setattr("dtpm_fast.kernels.wide_conv1x1_triton.FEWEST_PROGRAMS", 1)
    entry = {} if options is None else {kernel: [{"channels": 4096, "bits": b, "options": options} for b in (16, 32)]}

    def definition(inputs: dict[str, Any], adapter: Adapter) -> Tensor:
        return adapter_ref(eager("conv5", inputs), adapter)

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = cast(random_inputs("conv5", *shape, 1.0), device, dtype)
        m_in, m_out = torch.randn(rank, channels) / channels**0.5, torch.randn(channels, rank) / rank**0.5
        condition = torch.randn(samples, rank, height, width).to(memory_format=torch.channels_last)
        adapter = Adapter(*(tensor.to(device, dtype) for tensor in (m_in, m_out, condition)))
        conv5 = inputs["weight"], inputs["bias"]
        with using_table(table() | entry):
            ours = conv5_adapter(inputs["x"], inputs["residual"], conv5, inputs["factor"], adapter)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        exact = Adapter(*(tensor.double() for tensor in adapter[:3]))
        return (
            [ours],
            [definition(inputs, adapter)],
            [definition(cast(inputs, device, torch.float64), exact)],
        )

    assert_as_exact_as_eager(draw, ["out"])


def test_triton_of_equal_channels_is_finite(device: str, dtype: torch.dtype) -> None:
    """A pixel whose channels are all equal has the largest rstd; behind the last channel nothing may overflow."""
    inputs = cast(random_inputs("conv1", 1, 96, 2, 3, 0.0), device, dtype)
    inputs["x"][:, :, 0, 0] = 100.0
    with using_table(entries(TILES | {"BLOCK_K": 64})):
        ours = call("conv1", inputs, "wide_adaln_conv1x1")
    assert ours.isfinite().all()


@pytest.mark.parametrize("use", USES)
def test_without_the_kernel_it_is_the_definition(use: str) -> None:
    inputs = cast(random_inputs(use, 2, 12, 3, 5, 1.0), "cpu", torch.float64)
    torch.testing.assert_close(call(use, inputs), eager(use, inputs))


@pytest.mark.parametrize(
    ("samples", "pixels", "outputs", "tile"),
    [
        (8, 256 * 256, 512, (128, 128, 8)),
        (1, 32 * 32, 1024, (128, 64, 4)),  # 128 programs fill an H100 well enough
        (1, 32 * 32, 512, (64, 64, 4)),
        (1, 16 * 16, 1024, (32, 64, 4)),
        (1, 1, 16, (32, 64, 4)),
    ],
)
def test_tiles_are_small_where_a_map_is_small(
    samples: int, pixels: int, outputs: int, tile: tuple[int, int, int]
) -> None:
    options = {"BLOCK_P": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    grid, used = launch(samples, pixels, outputs, options)
    assert (used["BLOCK_P"], used["BLOCK_N"], used["num_warps"]) == tile
    assert used.keys() == options.keys()
    assert grid == (-(-pixels // tile[0]) * -(-outputs // tile[1]), samples)


def test_the_recorded_table_has_them_where_rows_of_channels_are_too_long() -> None:
    for kernel, narrow in WIDE.items():
        for channels in (48, 64, 128, 256, 512, 1024):
            found = [bool(options_of(name, channels, torch.bfloat16)) for name in (narrow, kernel)]
            assert any(found), (kernel, channels)
