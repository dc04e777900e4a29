"""dtpm-fast: DTPM (CVPR 2024), diffusion texture priors for image restoration, as a fast runtime."""

__version__ = "0.1.0"

from dtpm_fast.smoothing import rtv_smooth

__all__ = ["__version__", "rtv_smooth"]
