"""dtpm-fast: DTPM (CVPR 2024), diffusion texture priors for image restoration, as a fast runtime."""

import os
from typing import TYPE_CHECKING, Any

# GCC's OpenMP reads it when it is loaded, with torch. A thread that waits for another spins for so many turns before it
# sleeps; with the default, thirty times as many, a program that takes one of two cores makes ours ten times as slow.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from dtpm_fast.smoothing import rtv_smooth

if TYPE_CHECKING:
    from dtpm_fast.runtime.restorer import Restorer

__version__ = "0.1.0"
__all__ = ["Restorer", "__version__", "rtv_smooth"]


def __getattr__(name: str) -> Any:
    """`Restorer` on first use: it imports torch, which smoothing does not need."""
    if name == "Restorer":
        from dtpm_fast.runtime.restorer import Restorer

        return Restorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
