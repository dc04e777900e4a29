"""The optimisers of a run: the paper's Adam for every parameter, or Muon for the matrices and Adam for the rest."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
RMS = 0.2  # of an update, in learning rates: about Adam's


def make_optimizers(name: str, parameters: Iterable[nn.Parameter], lr: float) -> list[torch.optim.Optimizer]:
    """`name` as the setting `optimizer`: "adam" or "muon"."""
    rest = list(parameters)
    matrices = [p for p in rest if name == "muon" and mixes_channels(p)]
    rest = [p for p in rest if not any(p is matrix for matrix in matrices)]
    made: list[torch.optim.Optimizer] = [Muon(matrices, lr)] if matrices else []
    return [*made, torch.optim.Adam(rest, lr=lr, betas=BETAS)] if rest else made


def mixes_channels(parameter: Tensor) -> bool:
    """Whether it is the weight of a linear map, or of a convolution of 1x1 or 2x2: those of 3x3 are depth-wise, or read
    or write a picture, and beta and gamma are no matrices."""
    matrix = parameter.ndim in (2, 4) and min(parameter.shape[:2]) > 1
    return matrix and (parameter.ndim == 2 or parameter.shape[2] < 3)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, of which a matrix takes the nearest orthogonal one as its update (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon), scaled so that Adam's learning rate fits (Liu et al. 2025, arXiv:2502.16982).

    A convolution's weight is the matrix of its rows (out, in x height x width). `torch.optim.Muon` refuses those, and
    multiplies in bfloat16, for which most CPUs are slow: here float32 on the CPU.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(gradient)
                state["average"].lerp_(gradient, 1 - group["momentum"])
                ahead = gradient.lerp(state["average"], group["momentum"])
                matrix = ahead.flatten(1)
                update = orthogonal(matrix) * (RMS * max(matrix.shape) ** 0.5)
                parameter.sub_(update.reshape(parameter.shape), alpha=group["lr"])


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The matrix with singular values of about 1 (0.7 to 1.2) in place of its own: Newton and Schulz's iteration with
    Jordan's quintic, in bfloat16 on CUDA."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
