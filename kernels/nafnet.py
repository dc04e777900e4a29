"""The same kernels for stock NAFNet: its affine LayerNorm is AdaLN with shift = bias and scale = weight - 1."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtpm_fast.kernels.block import block_weights, denoising_block


class AcceleratedBlock(nn.Module):
    """A NAFNet block that computes through `denoising_block`; its parameters keep their names and their tensors."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        block_weights(block)
        for name in ("norm1", "conv1", "conv2", "sca", "conv3", "norm2", "conv4", "conv5"):
            setattr(self, name, getattr(block, name))
        self.beta, self.gamma = block.beta, block.gamma
        self.eps = _eps_of(block)
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        shift1, scale1 = self._modulation(self.get_submodule("norm1"), x.shape[0])
        shift2, scale2 = self._modulation(self.get_submodule("norm2"), x.shape[0])
        return denoising_block(x, shift1, scale1, shift2, scale2, block_weights(self), eps=self.eps)

    @staticmethod
    def _modulation(norm: nn.Module, samples: int) -> tuple[Tensor, Tensor]:
        shift, scale = norm.get_parameter("bias"), norm.get_parameter("weight") - 1
        return shift.expand(samples, -1), scale.expand(samples, -1)


def accelerate_nafnet(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of a stock NAFNet whose blocks run fused: same state dict, same results, channels_last.

    Args:
        model: any module that contains NAFNet blocks, recognised by their parameters (norm1, conv1 to conv5, sca.1,
            norm2, beta, gamma); it stays as it is.
        state_dict: weights to load into the copy, as a published checkpoint holds them (also under a key "params").

    Raises: `ValueError` when no block is found, when a block drops out while training (stock checkpoints do not), or
        when the weights do not fit.
    """
    accelerated = copy.deepcopy(model)
    if state_dict is not None:
        nested = state_dict.get("params", state_dict)
        try:
            accelerated.load_state_dict(nested if isinstance(nested, Mapping) else state_dict)
        except RuntimeError as error:
            raise ValueError(f"state_dict does not fit the model: {error}") from error
    if _is_block(accelerated):
        return AcceleratedBlock(accelerated).to(memory_format=torch.channels_last)
    names = [name for name, module in accelerated.named_modules() if _is_block(module)]
    if not names:
        raise ValueError(
            f"model {type(model).__name__} has no NAFNet block (norm1, conv1 to conv5, sca.1, beta, gamma)"
        )
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(accelerated.get_submodule(parent), attribute, AcceleratedBlock(accelerated.get_submodule(name)))
    return accelerated.to(memory_format=torch.channels_last)


def _is_block(module: nn.Module) -> bool:
    try:
        block_weights(module)
        return all(
            getattr(getattr(module, norm), name).dim() == 1
            for norm in ("norm1", "norm2")
            for name in ("weight", "bias")
        )
    except (AttributeError, ValueError):
        return False


def _eps_of(block: nn.Module) -> float:
    """The norms' common eps, 1e-6 in NAFNet. Refuses what the kernels would compute differently."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(
                f"{name} of {type(block).__name__} drops out with p = {module.p}, which the kernels do not"
            )
    found = {float(getattr(norm, "eps", 1e-6)) for norm in (block.norm1, block.norm2)}
    if len(found) > 1:
        raise ValueError(f"norm1 and norm2 of {type(block).__name__} have different eps: {sorted(found)}")
    return found.pop()
