"""Fused Triton kernels of the denoising block and their plain-PyTorch oracle. Imports torch and triton only."""
