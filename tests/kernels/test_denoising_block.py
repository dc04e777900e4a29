"""The fused block: oracle against its equations, Triton kernels by the rule, gradients, registration, compile, errors."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dtpm_fast.kernels import BlockWeights, denoising_block
from dtpm_fast.kernels.block import _block, _block_backward, _block_train, denoising_block_ref
from dtpm_fast.kernels.dispatch import TABLE

NAMES = ["out", "x", "shift1", "scale1", "shift2", "scale2", *BlockWeights._fields]
FUSED = ["adaln_conv1x1_forward", "adaln_conv1x1_backward", "attention_ffn_forward", "ffn_backward", "conv3_backward"]


def random_inputs(samples: int, channels: int, height: int, width: int, offset: float = 0.0) -> list[Tensor]:
    """x, the modulation (chunks of one tensor, as a block's linear map gives them), and the weights."""
    x = (torch.randn(samples, channels, height, width) + offset).to(memory_format=torch.channels_last)
    shapes = [
        (2, 1, 1, 1),
        (2,),
        (2, 0, 3, 3),
        (2,),
        (1, 1, 1, 1),
        (1,),
        (1, 1, 1, 1),
        (1,),
        (2, 1, 1, 1),
        (2,),
        (1, 1, 1, 1),
        (1,),
    ]
    weights = []
    for outputs, *rest in shapes:
        kernel = [channels if rest[0] else 1, *rest[1:]] if rest else []
        fan_in = max(1, torch.Size(kernel).numel())
        weights.append(torch.randn(outputs * channels, *kernel) / fan_in**0.5)
    weights += [torch.randn(1, channels, 1, 1) for _ in range(2)]
    return [x, *torch.randn(samples, 4 * channels).chunk(4, dim=1), *weights]


def call(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    return function(*inputs[:5], BlockWeights(*inputs[5:19]), tuple(inputs[19:]) or None)


def run(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, kind: torch.dtype) -> list[Tensor]:
    inputs = [tensor.detach().to(kind).requires_grad_() for tensor in inputs]
    out = call(function, inputs)
    return [out, *torch.autograd.grad(out, inputs, grad.to(kind))]


@pytest.fixture(params=["recorded", "fused", "parts"])
def table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The recorded dispatch table; one that fuses everything, in small tiles; and one that fuses what it must."""
    recorded = json.loads(TABLE.read_text(encoding="utf-8"))
    kernels = recorded["kernels"]
    if request.param == "fused":
        for name in kernels:
            options = {"BLOCK_W": 8, "BLOCK_C": 16, "ROWS": 4}
            if name in FUSED:
                options = {"BLOCK_P": 16} | ({"BLOCK_N": 32} if name == FUSED[0] else {})
            kernels[name] = [{"channels": 1024, "bits": bits, "options": options} for bits in (16, 32)]
    if request.param == "parts":
        for name in FUSED:
            del kernels[name]
    path = tmp_path / "dispatch.json"
    path.write_text(json.dumps(recorded), encoding="utf-8")
    monkeypatch.setenv("DTPM_FAST_DISPATCH", str(path))
    return request.param


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 48, 13, 7), (3, 32, 9, 19)])
def test_triton_by_the_rule(
    device: str,
    dtype: torch.dtype,
    table: str,  # noqa: ARG001
    shape: tuple[int, int, int, int],
    offset: float,
    assert_as_exact_as_eager: Callable[..., None],
) -> None:
    inputs = [tensor.to(device, dtype) for tensor in random_inputs(*shape, offset)]
    grad = torch.randn(shape).to(device, dtype)
    ours = run(denoising_block, inputs, grad, dtype)
    eager, exact = run(denoising_block_ref, inputs, grad, dtype), run(denoising_block_ref, inputs, grad, torch.float64)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert_as_exact_as_eager(ours, eager, exact, NAMES)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(denoising_block, inputs, grad, dtype), strict=True))


@pytest.mark.parametrize("channels", [16, 48])
def test_triton_inference_with_an_adapter(
    device: str, dtype: torch.dtype, table: str, channels: int, assert_as_exact_as_eager: Callable[..., None]
) -> None:
    inputs = [tensor.to(device, dtype) for tensor in random_inputs(2, channels, 11, 6)]
    matrix = (torch.eye(channels) + torch.randn(channels, channels) / channels).to(device, dtype)
    inputs += [matrix, torch.randn(2, channels, 11, 6).to(device, dtype)]
    with torch.no_grad():
        results = [call(denoising_block, inputs), call(denoising_block_ref, inputs)]
        exact = call(denoising_block_ref, [tensor.double() for tensor in inputs])
    assert_as_exact_as_eager(results[:1], results[1:], [exact], ["out"])
    grad = torch.randn(2, channels, 11, 6).to(device, dtype)
    trained = run(denoising_block, inputs, grad, dtype)
    expected = run(denoising_block_ref, inputs, grad, torch.float64)
    eager = run(denoising_block_ref, inputs, grad, dtype)
    assert_as_exact_as_eager(trained[-2:], eager[-2:], expected[-2:], ["matrix", "bias map"])
    if table == "fused":
        assert all(torch.equal(results[0], call(denoising_block, inputs)) for _ in range(2))
