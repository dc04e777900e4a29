"""Activation checkpointing: blocks keep their inputs alone and compute the rest again in the backward pass."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from dtpm_fast.model.block import Block
from dtpm_fast.model.dtpm import DTPM


def recompute_blocks(model: DTPM) -> None:
    """Trade a second forward pass of every block for its activations. The model's parameters keep their names."""
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
