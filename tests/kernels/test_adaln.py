"""AdaLN: oracle, gradients, Triton kernels by the rule, registration, and errors."""

from collections.abc import Callable

import pytest
import torch

from dtpm_fast.kernels import adaln
from dtpm_fast.kernels.adaln import _adaln, _adaln_backward, adaln_ref

SHAPES = [(1, 48, 5, 7), (3, 32, 3, 9), (2, 20, 9, 17)]
FORMATS = [torch.channels_last, torch.contiguous_format]
NAMES = ["out", "x.grad", "shift.grad", "scale.grad"]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_by_the_rule(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    offset: float,
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
    assert_as_exact_as_eager: Callable[..., None],
) -> None:
    # The last shape has three tiles: a program walks over two of them, as it does of a large map.
    monkeypatch.setattr("dtpm_fast.kernels.adaln_triton.programs_per_sample", lambda tiles, samples: min(tiles, 2))

    def draw() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        x = (torch.randn(shape) + offset).to(device, dtype).contiguous(memory_format=memory_format)
        wide = torch.randn(shape[0], 4 * shape[1]).to(device, dtype)
        shift, scale = wide.chunk(4, dim=1)[1:3]  # strided rows, as a block's modulation comes
        grad = torch.randn(shape).to(device, dtype)

        def run(function: Callable[..., torch.Tensor], kind: torch.dtype) -> list[torch.Tensor]:
            inputs = [tensor.detach().to(kind).requires_grad_() for tensor in (x, shift, scale)]
            out = function(*inputs)
            return [out, *torch.autograd.grad(out, inputs, grad.to(kind))]

        ours = run(adaln, dtype)
        assert ours[0].is_contiguous(memory_format=memory_format)
        assert all(torch.equal(a, b) for a, b in zip(ours, run(adaln, dtype), strict=True))
        return ours, run(adaln_ref, dtype), run(adaln_ref, torch.float64)

    assert_as_exact_as_eager(draw, NAMES)


# In the interpreter, of pixels behind the last one, which no kernel may store or add up.
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered in:RuntimeWarning")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_triton_without_an_eps(device: str, memory_format: torch.memory_format) -> None:
    """The last tile is a part of one; its other pixels are 0 times an infinite 1/std."""
    x = torch.randn(1, 48, 5, 7, device=device).contiguous(memory_format=memory_format)
    inputs = [x, *torch.randn(2, 1, 48, device=device)]
    inputs, grad = [tensor.requires_grad_() for tensor in inputs], torch.randn(1, 48, 5, 7, device=device)
    out, expected = (function(*inputs, 0.0) for function in (adaln, adaln_ref))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    grads, wanted = (torch.autograd.grad(result, inputs, grad) for result in (out, expected))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)


def test_oracle_is_the_definition() -> None:
    x, shift, scale = torch.randn(2, 6, 3, 4).double() + 100, torch.randn(2, 6).double(), torch.randn(2, 6).double()
    expected = torch.empty_like(x)
    for sample in range(2):
        for row in range(3):
            for column in range(4):
                pixel = x[sample, :, row, column]
                normal = (pixel - pixel.mean()) / (pixel.var(unbiased=False) + 1e-6).sqrt()
                expected[sample, :, row, column] = normal * (1 + scale[sample]) + shift[sample]
    torch.testing.assert_close(adaln(x, shift, scale), expected)


def test_written_out_gradients_are_the_oracles() -> None:
    inputs = [torch.randn(2, 5, 3, 4), torch.randn(2, 5), torch.randn(2, 5)]
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(adaln, inputs)
    assert torch.autograd.gradcheck(lambda *tensors: _adaln(*tensors, 1e-6), inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=memory_format).requires_grad_()
    shift, scale = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    torch.library.opcheck(_adaln, (x, shift, scale, 1e-6))
    torch.library.opcheck(_adaln_backward, (torch.randn(2, 5, 3, 4), x.detach(), shift.detach(), scale.detach(), 1e-6))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("memory_format", FORMATS)
def test_what_the_kernels_return_is_what_was_registered(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 16, 3, 4, device="cuda").bfloat16().contiguous(memory_format=memory_format)
    shift, scale = torch.randn(2, 64, device="cuda").bfloat16().chunk(4, dim=1)[1:3]
    for operation, inputs in ((_adaln, (x, shift, scale, 1e-6)), (_adaln_backward, (x * 2, x, shift, scale, 1e-6))):
        torch.library.opcheck(operation, inputs, test_utils=("test_schema", "test_faketensor"))


def test_float16_statistics_do_not_overflow() -> None:
    x = torch.randn(1, 64, 3, 3).half() * 300
    zero = torch.zeros(1, 64).half()
    assert adaln(x, zero, zero).isfinite().all()


def test_errors_name_the_argument() -> None:
    x, vector = torch.randn(2, 4, 6, 5), torch.randn(2, 4)
    with pytest.raises(TypeError, match=r"x must be float16.*int32"):
        adaln(x.int(), vector, vector)
    with pytest.raises(ValueError, match=r"x must be a \(B, C, H, W\) map"):
        adaln(x[0], vector, vector)
    with pytest.raises(ValueError, match="x has strides"):
        adaln(x[..., ::2], vector, vector)
    with pytest.raises(ValueError, match=r"shift must have shape \(B, C\) = \(2, 4\)"):
        adaln(x, vector[:, :3], vector)
    with pytest.raises(ValueError, match=r"scale has strides"):
        adaln(x, vector, torch.randn(4, 2).t())
    with pytest.raises(ValueError, match="scale is on meta"):
        adaln(x, vector, vector.to("meta"))
