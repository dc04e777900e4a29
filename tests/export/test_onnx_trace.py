"""Every writer of an ONNX operator against the PyTorch operation that it stands for, by ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

from dtpm_fast.errors import UserError
from dtpm_fast.export.manifest import TensorSpec
from dtpm_fast.export.onnx_graph import field_start, write_onnx
from dtpm_fast.export.onnx_trace import WRITERS, trace
from dtpm_fast.export.ort import open_session
from dtpm_fast.model.semantic import resnet18_encoder

CPU = torch.device("cpu")


class Called(nn.Module):
    """A function of an image as a module, with a weight of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight: Tensor
        self.register_buffer("weight", torch.randn(6, 3, 3, 3))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


CASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sides kept": lambda x, w: F.conv2d(x, w, padding=1),
    "strides, groups and a bias": lambda x, w: F.conv2d(x, w[:3, :1], w[:3, 0, 0, 0], stride=2, groups=3),
    "dilation": lambda x, w: F.conv2d(x, w, dilation=2, padding=(2, 2)),
    "numbers on both sides": lambda x, w: (1 - (2 * x + 0.5) / 3) - x * 4,
    "a tensor first": lambda x, w: w[:, 0, 0, 0].view(2, 3).mean(0).view(1, 3, 1, 1) - x,
    "indices": lambda x, w: x[:, 1:, 2:-1][:, 0][:, None],
    "a number behind a slice": lambda x, w: x[:, :, 1, :2],
    "a new side first": lambda x, w: x[None, 0],
    "halves": lambda x, w: torch.cat(x.permute(0, 2, 3, 1).transpose(1, 3).chunk(2, dim=1), dim=1),
    "unequal parts": lambda x, w: x.split([1, 2], dim=1)[1] * x.split([1, 2], dim=1)[0],
    "layer norm": lambda x, w: F.layer_norm(x.permute(0, 2, 3, 1), (3,), eps=1e-6),
    "sums": lambda x, w: x.sum(dim=1, keepdim=True) + x.mean(dim=(2, 3), keepdim=True),
    "pooling": lambda x, w: F.max_pool2d(x, 3, 2, 1) + F.adaptive_avg_pool2d(x, 1),
    "clipping": lambda x, w: (x.clamp(min=0), x.clamp(max=0.5), x.clamp(-0.25, 0.25)),
    "extremes": lambda x, w: torch.minimum(x, -x.abs()) + torch.maximum(x, x * 0.5),
    "activations": lambda x, w: F.hardswish(x * 4) + F.hardsigmoid(x * 4) + F.relu(x, inplace=False),
    "filled": lambda x, w: torch.cat([torch.ones_like(x[:, :1]), torch.zeros_like(x)], dim=1) + x[:, :1],
    "spread": lambda x, w: x[:1].expand_as(x) * x,
    "shuffle": lambda x, w: F.pixel_shuffle(torch.cat([x, x * 2, x * 3, x * 4], dim=1), 2),
    "sides as numbers": lambda x, w: torch.arange(x.size(3), dtype=torch.float32) / x.size(2) + x,
    "counted": lambda x, w: x.float() * torch.arange(x.size(3)).to(torch.float32),
    "products": lambda x, w: torch.matmul(x.transpose(2, 3), x),
    "matrix": lambda x, w: F.linear(x.mean(dim=(2, 3)), w[:, :, 0, 0], w[:, 0, 1, 1]),
    "rows": lambda x, w: w.index_select(0, torch.arange(x.size(3))[:2])[0] + x[:, :, :1, :1],
    "casts": lambda x, w: (x.to(torch.float16) * 2).float() + x,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_operation(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Called(CASES[case])
    example, image = torch.zeros(2, 3, 8, 12), torch.randn(3, 3, 5, 9)  # written down at one size, run at another
    expected = module(image)
    expected = expected if isinstance(expected, tuple) else (expected,)
    outputs = [TensorSpec(f"y{i}", "float32", (None,) * one.ndim) for i, one in enumerate(expected)]  # type: ignore[arg-type]
    given = [TensorSpec("x", "float32", ("batch", 3, "height", "width"))]
    write_onnx(module, {"x": example}, given, outputs, tmp_path / "x.onnx")
    found = open_session(str(tmp_path / "x.onnx"), CPU).run([spec.name for spec in outputs], {"x": image.numpy()})
    for value, other in zip(found, expected, strict=True):
        assert value.shape == tuple(other.shape)
        np.testing.assert_allclose(value, other.numpy(), rtol=1e-5, atol=2**-8 if case == "casts" else 1e-5)


def test_every_writer_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[str] = set()

    def noted(name: str, writer: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            used.add(name)
            return writer(*args, **kwargs)

        return write

    for name, writer in list(WRITERS.items()):
        monkeypatch.setitem(WRITERS, name, noted(name, writer))
    for function in CASES.values():
        x = torch.zeros(2, 3, 8, 12)
        trace(Called(function), {"x": x}, ["a", "b", "c"] if isinstance(Called(function)(x), tuple) else ["a"])
    assert used == set(WRITERS)


def test_the_trunk_of_the_papers_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = resnet18_encoder()
    for module in encoder.trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = (
                torch.randn_like(module.weight),
                torch.rand_like(module.weight) + 1,
            )
    image = torch.randn(2, 3, 64, 96)
    expected, trunk = encoder.trunk(image), encoder.folded().trunk
    assert not any(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())
    specs = [TensorSpec("x", "float32", ("b", 3, "h", "w"))], [TensorSpec("y", "float32", ("b", 512, "p", "q"))]
    write_onnx(trunk, {"x": torch.zeros(1, 3, 32, 32)}, *specs, tmp_path / "x.onnx")
    (found,) = open_session(str(tmp_path / "x.onnx"), CPU).run(["y"], {"x": image.numpy()})
    scale = float(expected.abs().max())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5 * scale)


def test_the_weights_are_in_the_file(tmp_path: Path) -> None:
    module = Called(lambda x, w: F.conv2d(x, w))
    specs = [TensorSpec("x", "float32", ("b", 3, "h", "w"))], [TensorSpec("y", "float32", ("b", 6, "p", "q"))]
    write_onnx(module, {"x": torch.zeros(1, 3, 8, 8)}, *specs, tmp_path / "x.onnx")
    model = onnx.load(tmp_path / "x.onnx")
    assert [tensor.name for tensor in model.graph.initializer] == ["weight"]  # the module's own name of it
    assert np.array_equal(numpy_helper.to_array(model.graph.initializer[0]), module.weight.numpy())
    assert len(model.SerializeToString()) == (tmp_path / "x.onnx").stat().st_size  # and nothing else is


def test_more_than_a_file_can_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Called(lambda x, w: F.conv2d(x, w))
    specs = [TensorSpec("x", "float32", ("b", 3, "h", "w"))], [TensorSpec("y", "float32", ("b", 6, "p", "q"))]
    monkeypatch.setattr("dtpm_fast.export.onnx_graph.LARGEST", module.weight.nbytes - 1)
    with pytest.raises(UserError, match=r"x\.onnx: would be larger than the 2 GiB"):
        write_onnx(module, {"x": torch.zeros(1, 3, 8, 8)}, *specs, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@given(st.integers(1, 15), st.integers(0, 2**34))
def test_the_start_of_afield_start(number: int, length: int) -> None:
    start = field_start(number, length)
    assert start[0] == number << 3 | 2
    assert sum((byte & 127) << 7 * i for i, byte in enumerate(start[1:])) == length
    assert [byte > 127 for byte in start[1:]] == [True] * (len(start) - 2) + [False]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, w: torch.sin(x), "sin: no ONNX form"),
        (lambda x, w: x.cos(), "cos: no part of the exported graphs"),
        (lambda x, w: x[..., 0], "an index with"),
        (lambda x, w: F.adaptive_avg_pool2d(x, 2), "1x1 alone"),
    ],
)
def test_what_has_no_form_is_named(function: Callable[..., Any], message: str) -> None:
    with pytest.raises((TypeError, AttributeError), match=message):
        trace(Called(function), {"x": torch.zeros(1, 3, 8, 8)}, ["y"])
