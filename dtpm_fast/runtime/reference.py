"""The reference backend: the plain modules of dtpm_fast.model, nothing hoisted. What every other backend is held to."""

from torch import Tensor

from dtpm_fast.diffusion import prior_gamma
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.runtime.sampler import C_IN, Conditions, Steps, sample, update


class Reference:
    """`prepare` and `step` of the plain model."""

    def __init__(self, model: DTPM, steps: Steps) -> None:
        self.model, self.steps = model, steps
        parameter = next(model.denoiser.parameters())
        self.table = steps.table.to(parameter)
        self.gammas = prior_gamma(steps.gammas, model.config).to(parameter)

    def prepare(self, y_d: Tensor) -> Conditions:
        y_eps = self.model.predict(y_d)
        code = self.model.code_of(y_d, y_eps)
        conditions = {"y_eps": y_eps, "condition": self.model.condition_of(y_d, y_eps)}
        return conditions if code is None else {**conditions, "code": code}

    def step(self, x: Tensor, previous: Tensor, i: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
        row, y_eps = self.table[i], conditions["y_eps"]
        gamma = self.gammas[i].expand(x.shape[0])
        output = self.model.denoise(row[C_IN] * x, conditions["condition"], gamma, conditions.get("code"), y_eps)
        return update(row, x, output, previous, y_eps)

    def restore(self, y_d: Tensor, noise: Tensor) -> Tensor:
        return sample(self, self.prepare(y_d), noise)

    def tensors(self) -> dict[str, Tensor]:
        """What depends on the weights beside the model itself, as `Plan.tensors`."""
        return {"table": self.table, "gammas": self.gammas}

    def of(self, model: DTPM, steps: Steps) -> "Reference":
        return Reference(model, steps)
