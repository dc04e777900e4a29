"""The rule by which kernels are held correct, and the device that they run on here: a GPU, or Triton's interpreter."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dtpm_fast.kernels.device import INTERPRETED


@pytest.fixture
def device() -> str:
    """Where Triton kernels run in this process."""
    if torch.cuda.is_available() and not INTERPRETED:
        return "cuda"
    if not INTERPRETED:
        pytest.skip("no CUDA device; test_interpreter.py runs this in Triton's interpreter")
    return "cpu"


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What the kernels compute in; bfloat16 only on a GPU, because Triton's interpreter gets it silently wrong."""
    if INTERPRETED and request.param == "bfloat16":
        pytest.skip("Triton's interpreter gets bfloat16 silently wrong")
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def _fresh_random_inputs() -> None:
    torch.seed()


@pytest.fixture
def assert_as_exact_as_eager() -> Callable[..., None]:
    """error(ours) ≤ 1.5 · error(eager PyTorch in the same dtype), both in the 2-norm against the float64 oracle."""

    def check(ours: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor], names: Sequence[str]) -> None:
        assert len(ours) == len(eager) == len(exact) == len(names)
        for mine, theirs, truth, name in zip(ours, eager, exact, names, strict=True):
            assert mine.shape == truth.shape, name
            assert mine.dtype == theirs.dtype, name
            error, allowed = relative_error(mine, truth), 1.5 * relative_error(theirs, truth)
            assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"

    return check


def relative_error(value: Tensor, truth: Tensor) -> float:
    truth = truth.detach().double().cpu()
    assert truth.norm() > 0
    return float((value.detach().double().cpu() - truth).norm() / truth.norm())
