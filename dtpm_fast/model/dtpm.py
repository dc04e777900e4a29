"""The whole model of figure 3: denoiser, semantic encoder, and for stage II the initial predictor and the adapters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dtpm_fast.config import ModelConfig
from dtpm_fast.model.adapter import CGAdapter, resize_to_level
from dtpm_fast.model.block import NAFBlock
from dtpm_fast.model.denoiser import Denoiser
from dtpm_fast.model.semantic import SemanticEncoder, compact_encoder, load_compact, load_resnet18, resnet18_encoder
from dtpm_fast.model.unet import UNet, zero_init


class Predictor(UNet):
    """The initial predictor g: y_eps = y_d + g(y_d). A NAFNet: published NAFNet weights of its shape load as they are.

    Its last convolution starts at zero, so that training starts from y_eps = y_d and not from noise.
    """

    def __init__(self, width: int, encoder: tuple[int, ...], middle: int, decoder: tuple[int, ...]) -> None:
        super().__init__(3, width, encoder, middle, decoder, NAFBlock)
        zero_init(self.ending)

    def forward(self, y_d: Tensor) -> Tensor:  # type: ignore[override]
        return y_d + super().forward(y_d, lambda _, block, x: block(x))


class DTPM(nn.Module):
    """Stage I is the denoiser and its semantic encoder alone; stage II adds the predictor and the adapters.

    All images are (B, 3, H, W) in [-1, 1], H and W multiples of `multiple`.
    """

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        self.config, self.stage = config, stage
        self.semantic = _semantic_encoder(config)
        self.denoiser = Denoiser(
            config.width, config.encoder_blocks, config.middle_blocks, config.decoder_blocks,
            config.embedding, self.semantic.code_channels if self.semantic else 0,
        )  # fmt: skip
        self.multiple = self.denoiser.multiple
        self.predictor: Predictor | None = None
        self.adapters = nn.ModuleDict()
        if stage == 2:
            if config.predictor == "unet":
                self.predictor = Predictor(
                    config.predictor_width, config.predictor_encoder_blocks,
                    config.predictor_middle_blocks, config.predictor_decoder_blocks,
                )  # fmt: skip
                self.multiple = max(self.multiple, self.predictor.multiple)
            for position, channels in self.denoiser.positions().items():
                if _has_adapter(position, config.adapter_positions):
                    adapter = CGAdapter(channels, config.adapter_ratio, config.adapter_kind)
                    self.adapters[position.replace(".", "_")] = adapter

    def predict(self, y_d: Tensor) -> Tensor:
        """y_eps = g(y_d), the initial predictor's picture; without a predictor (table 6) it is y_d itself."""
        return y_d if self.predictor is None else self.predictor(y_d)

    def code(self, image: Tensor) -> Tensor | None:
        """The semantic code (B, C) of an image; None when the config has none."""
        return None if self.semantic is None else self.semantic(image)

    def denoise(self, x: Tensor, y: Tensor, gamma: Tensor, code: Tensor | None, y_eps: Tensor | None = None) -> Tensor:
        """The network's raw output F for x and gamma (both as `diffusion.estimate` makes them) and the condition y
        (eq. 4, 6).

        `y_eps` is the picture that guides the adapters; stage I has none.
        """
        adapt = None if y_eps is None or not self.adapters else self._adapt(y_eps)
        return self.denoiser(torch.cat([x, y], dim=1), gamma, code, adapt)

    def condition_of(self, y_d: Tensor, y_eps: Tensor) -> Tensor:
        """Stage II's condition channels: y_d as in eq. 6, or y_eps by the config."""
        return y_d if self.config.condition == "degraded" else y_eps

    def code_of(self, y_d: Tensor, y_eps: Tensor) -> Tensor | None:
        """Stage II's semantic code: of y_eps (detached), or of y_d by the config."""
        return self.code(y_eps.detach() if self.config.code_source == "predicted" else y_d)

    def _adapt(self, y_eps: Tensor) -> Callable[[str, nn.Module, Tensor], Tensor]:
        levels: dict[int, Tensor] = {}

        def adapt(position: str, block: nn.Module, f: Tensor) -> Tensor:
            key = position.replace(".", "_")
            if key not in self.adapters:
                return f
            level = (y_eps.shape[-1] // f.shape[-1]).bit_length() - 1
            if level not in levels:
                levels[level] = resize_to_level(y_eps, level)
            return self.adapters[key](f, levels[level])

        return adapt


def load_semantic_weights(model: DTPM) -> None:
    """Fill the semantic encoder with its pretrained weights: those that ship with the package, or torchvision's."""
    if model.semantic is not None:
        state = load_compact() if model.config.semantic_code == "compact" else load_resnet18()
        model.semantic.load_state_dict(state)


def _semantic_encoder(config: ModelConfig) -> SemanticEncoder | None:
    return {"compact": compact_encoder, "resnet18": resnet18_encoder, "none": lambda: None}[config.semantic_code]()


def _has_adapter(position: str, positions: str) -> bool:
    """ "encoder" counts the middle blocks as well, as stage II's fine-tuning options do."""
    if positions == "decoder":
        return position.startswith("decoders")
    if positions == "encoder":
        return not position.startswith("decoders")
    return positions == "all"
