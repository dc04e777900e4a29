"""Channel attention: gradients, Triton kernels by the rule, registration, autocast, and errors."""

from collections.abc import Callable

import pytest
import torch

from dtpm_fast.kernels import channel_attention
from dtpm_fast.kernels.channel_attention import (
    _channel_attention,
    _channel_attention_backward,
    channel_attention_ref,
)
from dtpm_fast.kernels.channel_attention_triton import MOST_PROGRAMS, attention_options, mean_and_attention

FORMATS = [torch.channels_last, torch.contiguous_format]
NAMES = ["out", "x.grad", "weight.grad", "bias.grad"]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 48, 5, 7), (3, 72, 3, 9), (2, 20, 37, 41)])
def test_triton_by_the_rule(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    offset: float,
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
    assert_as_exact_as_eager: Callable[..., None],
) -> None:
    if shape[2] > 9:  # a program walks over several tiles, as it does of a large map
        several = "dtpm_fast.kernels.channel_attention_triton.programs_per_sample"
        monkeypatch.setattr(several, lambda tiles, samples: min(tiles, 7))

    def draw() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        channels = shape[1]
        x = (torch.randn(shape) + offset).to(device, dtype).contiguous(memory_format=memory_format)
        weight = (torch.randn(channels, channels, 1, 1) / channels).to(device, dtype)
        bias = torch.randn(channels).to(device, dtype)
        grad = torch.randn(shape).to(device, dtype)

        def run(function: Callable[..., torch.Tensor], kind: torch.dtype) -> list[torch.Tensor]:
            inputs = [tensor.detach().to(kind).requires_grad_() for tensor in (x, weight, bias)]
            out = function(*inputs)
            return [out, *torch.autograd.grad(out, inputs, grad.to(kind))]

        ours = run(channel_attention, dtype)
        assert ours[0].is_contiguous(memory_format=memory_format)
        assert all(torch.equal(a, b) for a, b in zip(ours, run(channel_attention, dtype), strict=True))
        return ours, run(channel_attention_ref, dtype), run(channel_attention_ref, torch.float64)

    assert_as_exact_as_eager(draw, NAMES)


@pytest.mark.parametrize("programs", [1, 41, MOST_PROGRAMS + 1])
def test_triton_adds_the_sums_of_all_programs(device: str, programs: int) -> None:
    assert 1 < attention_options(72)["BLOCK_S"] < 41  # several steps, of which the last is not full
    sums, weight, bias = torch.randn(2, programs, 72), torch.randn(72, 72), torch.randn(72)
    mean, attention = mean_and_attention(sums.to(device), 50, weight.to(device), bias.to(device))
    expected = sums.double().sum(1) / 50
    torch.testing.assert_close(mean.cpu(), expected)
    torch.testing.assert_close(attention.cpu(), (expected @ weight.double().T + bias).float())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_and_registration(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(4, 4), torch.randn(4)
    inputs = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(channel_attention, inputs)
    assert torch.autograd.gradcheck(lambda *tensors: _channel_attention(*tensors)[0], inputs)
    torch.library.opcheck(_channel_attention, [tensor.requires_grad_() for tensor in (x, weight, bias)])
    inner = [tensor.detach() for tensor in (torch.randn(2, 4, 3, 5), x, x.mean((2, 3)).double(), weight, bias)]
    torch.library.opcheck(_channel_attention_backward, inner)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("memory_format", FORMATS)
def test_what_the_kernels_return_is_what_was_registered(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 16, 3, 4, device="cuda").bfloat16().contiguous(memory_format=memory_format)
    weight, bias = torch.randn(16, 16, device="cuda").bfloat16(), torch.randn(16, device="cuda").bfloat16()
    mean = x.double().mean((2, 3))
    for operation, inputs in (
        (_channel_attention, (x, weight, bias)),
        (_channel_attention_backward, (x * 2, x, mean, weight, bias)),
    ):
        torch.library.opcheck(operation, inputs, test_utils=("test_schema", "test_faketensor"))


def test_autocast_casts_the_weights() -> None:
    x, weight, bias = torch.randn(2, 4, 3, 5), torch.randn(4, 4, 1, 1, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = channel_attention(x, weight, bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_errors_name_the_argument() -> None:
    x, weight, bias = torch.randn(2, 4, 6, 5), torch.randn(4, 4), torch.randn(4)
    with pytest.raises(TypeError, match="weight is float64 but the input is float32"):
        channel_attention(x, weight.double(), bias)
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 4\)"):
        channel_attention(x, weight[:2], bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
        channel_attention(x, weight, torch.randn(3))
