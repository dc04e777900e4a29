"""Equation 5, the Conditional Guidance Adapter."""

import pytest
import torch

from dtpm_fast.model.adapter import CGAdapter, resize_to_level


def test_fresh_adapter_is_the_identity():
    for kind in ("linear", "gated"):
        f, y_eps = torch.randn(2, 8, 5, 6), torch.randn(2, 3, 5, 6)
        assert torch.equal(CGAdapter(8, 0.25, kind)(f, y_eps), f)


def test_equation_5_written_out(randomized):
    adapter = randomized(CGAdapter(8, 0.25, "linear"))
    f, y_eps = torch.randn(2, 8, 5, 6), torch.randn(2, 3, 5, 6)
    expected = f + adapter.m_out(adapter.m_in(f) + adapter.conv(y_eps))
    torch.testing.assert_close(adapter(f, y_eps), expected)
    assert adapter.m_in.out_channels == 2  # c to r c with r = 0.25
    gated = randomized(CGAdapter(8, 0.25, "gated"))
    a, b = (gated.m_in(f) + gated.conv(y_eps)).chunk(2, dim=1)
    torch.testing.assert_close(gated(f, y_eps), f + gated.m_out(a * b))


def test_a_linear_adapter_merges_into_one_matrix_and_a_bias_map(randomized):
    adapter = randomized(CGAdapter(8, 0.5, "linear")).double()
    f, y_eps = torch.randn(2, 8, 5, 6).double(), torch.randn(2, 3, 5, 6).double()
    w_in, w_out = adapter.m_in.weight[:, :, 0, 0], adapter.m_out.weight[:, :, 0, 0]
    matrix = torch.eye(8, dtype=torch.float64) + w_out @ w_in
    bias_map = torch.einsum("oc,bchw->bohw", w_out, adapter.conv(y_eps) + adapter.m_in.bias[:, None, None])
    merged = torch.einsum("oc,bchw->bohw", matrix, f) + bias_map + adapter.m_out.bias[:, None, None]
    torch.testing.assert_close(merged, adapter(f, y_eps), rtol=1e-11, atol=1e-11)


def test_gradcheck(randomized):
    for kind in ("linear", "gated"):
        adapter = randomized(CGAdapter(4, 0.5, kind)).double()
        f = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
        y_eps = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda f, y, *_, a=adapter: a(f, y), (f, y_eps, *adapter.parameters()))


def test_resize_to_level_averages():
    y_eps = torch.randn(1, 3, 32, 48)
    assert resize_to_level(y_eps, 3).shape == (1, 3, 4, 6)
    assert torch.equal(resize_to_level(y_eps, 0), y_eps)
    assert resize_to_level(y_eps, 3).std() < 0.4  # antialiased: noise averages out instead of being picked


@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 8), (8, 24), (40, 16)])
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_resize_to_level_is_a_triangle_filter(height: int, width: int, level: int, device: str) -> None:
    """Down to maps one pixel wide, where PyTorch's own result would be wrong."""

    def matrix(size: int) -> torch.Tensor:
        factor = 2**level
        centres = (torch.arange(size // factor, dtype=torch.float64) + 0.5) * factor
        distances = (torch.arange(size, dtype=torch.float64) + 0.5 - centres[:, None]).abs()
        weights = (1 - distances / factor).clamp(min=0)
        return weights / weights.sum(1, keepdim=True)

    y_eps = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = matrix(height) @ y_eps @ matrix(width).T
    torch.testing.assert_close(resize_to_level(y_eps.to(device), level).cpu(), expected, rtol=0, atol=1e-12)
