"""dtpm-fast: DTPM (CVPR 2024), diffusion texture priors for image restoration, as a fast runtime."""

__version__ = "0.1.0"
