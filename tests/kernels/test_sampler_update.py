"""The sampler's update: its oracle is the runtime's, the Triton kernel by the rule, registration, and errors."""

import math
from collections.abc import Callable

import pytest
import torch

from dtpm_fast.kernels.sampler_update import _sampler_update, sampler_update, sampler_update_ref
from dtpm_fast.runtime.sampler import update


def inputs(shape: tuple[int, int, int, int], limit: float) -> list[torch.Tensor]:
    """A row, x (one field for the whole batch, as the first step has it), output, the x0 before, y_eps."""
    row = torch.cat([torch.randn(6), torch.tensor([limit])])
    x = torch.randn(1, *shape[1:]).expand(shape)
    output, previous = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2))
    return [row, x, output, previous, torch.rand(shape) * 2 - 1]


@pytest.mark.parametrize("limit", [1.0, math.inf])
@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (3, 3, 31, 47)])
def test_triton_by_the_rule(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    limit: float,
    assert_as_exact_as_eager: Callable[..., None],
) -> None:
    """`dtype` is the network's output's; the pictures are float32."""

    def draw() -> tuple[tuple[torch.Tensor, ...], ...]:
        row, x, output, previous, y_eps = (tensor.to(device) for tensor in inputs(shape, limit))
        arguments = [row, x, output.to(dtype), previous, y_eps]
        ours = sampler_update(*arguments)
        assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in ours)
        exact = sampler_update_ref(*(tensor.double() for tensor in arguments))
        return ours, sampler_update_ref(*arguments), exact

    assert_as_exact_as_eager(draw, ["next", "x0"])


def test_triton_keeps_nan(device: str) -> None:
    row, x, output, previous, y_eps = (tensor.to(device) for tensor in inputs((2, 3, 5, 7), 1.0))
    output[1, 2, 3, 4] = float("nan")
    for values in sampler_update(row, x, output, previous, y_eps):
        assert torch.equal(values.isnan(), output.isnan())


def test_it_is_the_samplers_own_and_registered() -> None:
    row, x, output, previous, y_eps = inputs((2, 3, 4, 6), 1.0)
    for ours, theirs in zip(
        sampler_update(row, x, output, previous, y_eps), update(row, x, output, previous, y_eps), strict=True
    ):
        assert torch.equal(ours, theirs)
    x, y_eps = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, y_eps))
    torch.library.opcheck(_sampler_update, (row, x, output, previous, y_eps))


def test_errors_name_the_argument() -> None:
    row, x, output, previous, y_eps = inputs((1, 3, 4, 6), 1.0)
    with pytest.raises(ValueError, match=r"row must have shape \(7,\)"):
        sampler_update(row[:6], x, output, previous, y_eps)
    with pytest.raises(ValueError, match="previous must have shape"):
        sampler_update(row, x, output, previous[..., :5], y_eps)
    with pytest.raises(TypeError, match=r"y_eps is torch\.float64"):
        sampler_update(row, x, output, previous, y_eps.double())
