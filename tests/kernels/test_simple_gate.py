"""SimpleGate: gradients, Triton kernels by the rule, registration, and errors."""

from collections.abc import Callable

import pytest
import torch

from dtpm_fast.kernels import simple_gate
from dtpm_fast.kernels.simple_gate import _simple_gate, _simple_gate_backward, simple_gate_ref

FORMATS = [torch.channels_last, torch.contiguous_format]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 96, 5, 7), (3, 6, 3, 9), (2, 2, 31, 47)])
def test_triton_by_the_rule(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    memory_format: torch.memory_format,
    assert_as_exact_as_eager: Callable[..., None],
) -> None:
    def draw() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        x = torch.randn(shape).to(device, dtype).contiguous(memory_format=memory_format)
        grad = torch.randn(shape[0], shape[1] // 2, *shape[2:]).to(device, dtype)

        def run(function: Callable[..., torch.Tensor], kind: torch.dtype) -> list[torch.Tensor]:
            x_kind = x.to(kind).detach().requires_grad_()
            out = function(x_kind)
            return [out, *torch.autograd.grad(out, x_kind, grad.to(kind))]

        ours = run(simple_gate, dtype)
        assert ours[0].is_contiguous(memory_format=memory_format)
        assert all(torch.equal(a, b) for a, b in zip(ours, run(simple_gate, dtype), strict=True))
        return ours, run(simple_gate_ref, dtype), run(simple_gate_ref, torch.float64)

    assert_as_exact_as_eager(draw, ["out", "x.grad"])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_and_registration(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=memory_format)
    assert torch.autograd.gradcheck(simple_gate, x.double().requires_grad_())
    assert torch.autograd.gradcheck(_simple_gate, x.double().requires_grad_())
    torch.library.opcheck(_simple_gate, (x.requires_grad_(),))
    torch.library.opcheck(_simple_gate_backward, (torch.randn(2, 3, 3, 4), x.detach()))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("memory_format", FORMATS)
def test_what_the_kernels_return_is_what_was_registered(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 16, 3, 4, device="cuda").bfloat16().contiguous(memory_format=memory_format)
    for operation, inputs in ((_simple_gate, (x,)), (_simple_gate_backward, (x[:, :8].clone(), x))):
        torch.library.opcheck(operation, inputs, test_utils=("test_schema", "test_faketensor"))


def test_odd_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="x must have an even number of channels, not 5"):
        simple_gate(torch.randn(1, 5, 2, 2))
