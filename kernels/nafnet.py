"""The same kernels for stock NAFNet: its affine LayerNorm is AdaLN with shift = bias and scale = weight - 1."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dtpm_fast.kernels.block import block_weights, check_weights, denoising_block

Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str]


class AcceleratedBlock(nn.Module):
    """A NAFNet block that computes through `denoising_block`; its parameters keep their names and their tensors."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        _refuse_what_differs(block)
        for name in ("norm1", "conv1", "conv2", "sca", "conv3", "norm2", "conv4", "conv5"):
            setattr(self, name, getattr(block, name))
        self.beta, self.gamma = block.beta, block.gamma
        self.eps = float(getattr(block.norm1, "eps", 1e-6))
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        shift1, scale1 = self._modulation(self.get_submodule("norm1"), x.shape[0])
        shift2, scale2 = self._modulation(self.get_submodule("norm2"), x.shape[0])
        return denoising_block(x, shift1, scale1, shift2, scale2, block_weights(self), eps=self.eps)

    @staticmethod
    def _modulation(norm: nn.Module, samples: int) -> tuple[Tensor, Tensor]:
        weight = norm.get_parameter("weight")
        # In 16 bits, weight - 1 would lose what a small weight has.
        scale = weight.to(torch.promote_types(weight.dtype, torch.float32)) - 1
        shift = norm.get_parameter("bias").to(scale.dtype)
        return shift.expand(samples, -1), scale.expand(samples, -1)


class NAFNet(nn.Module):
    """NAFNet (Chen et al., ECCV 2022, figure 2c) of accelerated blocks, with the published parameter names.

    Args:
        in_channels: of the picture, and of the output.
        width: channels of the first level; each level down doubles them.
        encoder, middle, decoder: blocks of each level; `decoder` counts from the lowest level up.
    """

    def __init__(
        self, in_channels: int, width: int, encoder: Sequence[int], middle: int, decoder: Sequence[int]
    ) -> None:
        super().__init__()
        self.intro = nn.Conv2d(in_channels, width, 3, padding=1)
        self.ending = nn.Conv2d(width, in_channels, 3, padding=1)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        channels = width
        for count in encoder:
            self.encoders.append(_blocks(channels, count))
            self.downs.append(nn.Conv2d(channels, 2 * channels, 2, stride=2))
            channels *= 2
        self.middle_blks = _blocks(channels, middle)
        for count in decoder:
            self.ups.append(nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.PixelShuffle(2)))
            channels //= 2
            self.decoders.append(_blocks(channels, count))

    def forward(self, picture: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape; padded with zeros to a multiple of 2^levels inside, as published."""
        height, width = picture.shape[-2:]
        multiple = 2 ** len(self.encoders)
        picture = F.pad(picture, (0, -width % multiple, 0, -height % multiple))
        x = self.intro(picture)
        skips = []
        for blocks, down in zip(self.encoders, self.downs, strict=True):
            x = blocks(x)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x)
        for blocks, up in zip(self.decoders, self.ups, strict=True):
            x = blocks(up(x) + skips.pop())
        return (self.ending(x) + picture)[:, :, :height, :width]


def accelerate_nafnet(model: nn.Module | Checkpoint, checkpoint: Checkpoint | None = None) -> nn.Module:
    """A stock NAFNet whose blocks run fused: same state dict, same results, channels_last.

    Args:
        model: any module that contains NAFNet blocks, recognised by their parameters (norm1, conv1 to conv5, sca.1,
            norm2, beta, gamma), of which a copy is accelerated; or a checkpoint, from whose shapes a `NAFNet` is built.
        checkpoint: weights to load into the copy: a state dict, also under a key "params" as published ones are, or a
            file of one (.safetensors, else PyTorch's own format, of which tensors alone are read).

    Raises: `ValueError` when there is no block or no checkpoint, when the weights do not fit, and for what the kernels
        would compute differently: dropout, another padding or dilation of conv2, channel attention of local windows,
            expansions other than 2.
    """
    if not isinstance(model, nn.Module):
        if checkpoint is not None:
            raise ValueError("checkpoint: the first argument is a checkpoint already; give a module and a checkpoint")
        weights = _read(model)
        return _load(_network_of(weights), weights).to(memory_format=torch.channels_last)
    accelerated = copy.deepcopy(model)
    if checkpoint is not None:
        _load(accelerated, _read(checkpoint))
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


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(AcceleratedBlock(_Block(channels)) for _ in range(count)))


class _Block(nn.Module):
    """The parameters of a fresh NAFNet block, which is the identity."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, 2 * c, 1)
        self.conv2 = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.conv3 = nn.Conv2d(c, c, 1)
        self.conv4 = nn.Conv2d(c, 2 * c, 1)
        self.conv5 = nn.Conv2d(c, c, 1)
        self.norm1, self.norm2 = nn.LayerNorm(c, eps=1e-6), nn.LayerNorm(c, eps=1e-6)
        self.beta, self.gamma = (nn.Parameter(torch.zeros(1, c, 1, 1)) for _ in range(2))


def _read(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """A state dict, whatever holds it. Nothing but tensors is loaded from a file."""
    held: Any = checkpoint
    if not isinstance(checkpoint, Mapping):
        path = Path(checkpoint)
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                held = load_file(path)
            else:
                held = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise ValueError(f"checkpoint {path} does not exist") from error
        except Exception as error:  # each format has classes of its own
            cause = " ".join(str(error).split())[:200]
            raise ValueError(f"checkpoint {path} cannot be read as a file of tensors ({cause})") from error
    for key in ("params", "params_ema", "state_dict"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError("checkpoint holds no state dict (names and tensors, or those under a key params)")
    return held


def _network_of(weights: Mapping[str, Tensor]) -> NAFNet:
    """The network that these weights are of: its sizes are in their shapes and names."""

    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in weights)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    levels, lifts = count(r"encoders\.(\d+)\."), count(r"decoders\.(\d+)\.")
    if "intro.weight" not in weights or weights["intro.weight"].dim() != 4 or not levels == lifts > 0:
        raise ValueError("checkpoint is no NAFNet's: it lacks intro.weight, or as many encoders as decoders")
    width, channels = weights["intro.weight"].shape[:2]
    encoder = [count(rf"encoders\.{level}\.(\d+)\.") for level in range(levels)]
    decoder = [count(rf"decoders\.{level}\.(\d+)\.") for level in range(lifts)]
    with torch.device("meta"):  # no memory and no initialisation for what is replaced at once
        network = NAFNet(channels, width, encoder, count(r"middle_blks\.(\d+)\."), decoder)
    return network.to_empty(device="cpu").to(weights["intro.weight"].dtype)


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"checkpoint does not fit the model: {' '.join(str(error).split())}") from error
    return model


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


# What conv2's shape does not tell: the settings that the kernels compute, the usual one first.
_CONV2: dict[str, list[Any]] = {
    "stride": [(1, 1)],
    "padding": [(1, 1), "same"],
    "dilation": [(1, 1)],
    "padding_mode": ["zeros"],
}


def _refuse_what_differs(block: nn.Module) -> None:
    """Raises `ValueError` for a block whose parameters have NAFNet's names, but which computes something else."""
    kind = type(block).__name__
    weights = block_weights(block)
    check_weights(weights, weights.conv1_weight)
    for name, module in block.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise ValueError(f"{name} of {kind} drops out with p = {module.p}, which the kernels do not")
    for name, computed in _CONV2.items():
        given = getattr(block.conv2, name, computed[0])
        if given not in computed:
            raise ValueError(f"conv2 of {kind} has {name} = {given!r}, and the kernels compute {computed[0]!r}")
    pool = block.get_submodule("sca.0")
    if not (isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1))):
        raise ValueError(f"sca.0 of {kind} is {pool}, and the kernels take the mean over the whole map")
    found = {float(getattr(norm, "eps", 1e-6)) for norm in (block.norm1, block.norm2)}
    if len(found) > 1:
        raise ValueError(f"norm1 and norm2 of {kind} have different eps: {sorted(found)}")
