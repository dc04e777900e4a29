"""The loss of a batch as one module: what DistributedDataParallel wraps and torch.compile sees."""

from torch import Tensor, nn

from dtpm_fast.config import Config
from dtpm_fast.diffusion import stage1_loss, stage2_loss
from dtpm_fast.model.dtpm import DTPM

PSNR_FLOOR = 4e-4  # added to a sample's squared error: beyond 40 dB (of [-1, 1] pictures) little more is to be gained


class Objective(nn.Module):
    """Eq. 4 for a pair (x_g, y_s) of stage I; eq. 6 for a pair (y_d, y_g) of stage II, with the predictor's own loss
    when the config gives it a weight, or with that alone (`tune = "predictor"`)."""

    def __init__(self, model: DTPM, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, first: Tensor, second: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
        """(B, 3, H, W) pictures in [-1, 1] and noise, gamma (B,); returns the mean loss, a scalar."""
        diffusion, weight = self.config.diffusion, self.config.train.predictor_loss
        if self.model.stage == 1:
            return stage1_loss(self.model, diffusion, first, second, eps, gamma)
        if self.config.train.tune == "predictor":
            return self._predictor_loss(self.model.predict(first), second)
        loss, y_eps = stage2_loss(self.model, diffusion, second, first, eps, gamma)
        return loss + weight * self._predictor_loss(y_eps, second) if weight else loss

    def _predictor_loss(self, y_eps: Tensor, y_g: Tensor) -> Tensor:
        difference = y_eps - y_g
        norm = self.config.train.predictor_norm
        if norm == "l1":
            return difference.abs().mean()
        if norm == "l2":
            return difference.square().mean()
        return (difference.square().mean(dim=(1, 2, 3)) + PSNR_FLOOR).log10().mul(10).mean()
