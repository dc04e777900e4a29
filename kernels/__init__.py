"""Fused Triton kernels of the denoising block and their plain-PyTorch oracle. What computes
imports torch and triton only; the commands of this folder also use the package."""

from dtpm_fast.kernels.adaln import adaln
from dtpm_fast.kernels.adapter import Adapter, MergedConv5, merge_conv5
from dtpm_fast.kernels.block import BlockWeights, block_weights, denoising_block
from dtpm_fast.kernels.channel_attention import channel_attention
from dtpm_fast.kernels.nafnet import accelerate_nafnet
from dtpm_fast.kernels.sampler_update import sampler_update
from dtpm_fast.kernels.simple_gate import simple_gate

__all__ = [
    "Adapter",
    "BlockWeights",
    "MergedConv5",
    "accelerate_nafnet",
    "adaln",
    "block_weights",
    "channel_attention",
    "denoising_block",
    "merge_conv5",
    "sampler_update",
    "simple_gate",
]
