"""How a program finds its part of a map: offsets of a tile, and a number of programs that depends on shapes alone."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from dtpm_fast.kernels.device import INTERPRETED

# Of every launch. Products and sums contract into one instruction: Triton asks for a choice, and its default changes.
COMPILER = {"enable_fp_fusion": True}

# Of a launch, where a map is large enough for them: the multiprocessors of an H100. One number for all GPUs, so that
# sums keep their order.
FEWEST_PROGRAMS = 132

_INTERPRETED = tl.constexpr(INTERPRETED)


def programs_per_sample(tiles: int, samples: int, total: int = 1056) -> int:
    """Programs that share one sample's tiles, about `total` in all, whatever the GPU, so that sums keep their order."""
    return min(tiles, max(1, total // samples))


def empty_map(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A new channels_last map of this shape, with the dtype and device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def add_partials(partials: torch.Tensor) -> torch.Tensor:
    """The programs' sums, (samples, programs, ...) in float32, added in float64: how many there are costs no digits."""
    return partials.sum(1, dtype=torch.float64)


@triton.jit
def sum_pixels(x):
    """(pixels, channels) to (1, channels)."""
    if _INTERPRETED:  # noqa: SIM108 (the other branch must not be compiled)
        # numpy adds a column's values one after another; a GPU adds them in a tree, which loses far fewer digits.
        sums = tl.sum(x.to(tl.float64), axis=0).to(tl.float32)
    else:
        sums = tl.sum(x, axis=0)
    return sums[None, :]


@triton.jit
def tile_offsets(sample, first, BLOCK_P: tl.constexpr, c, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where a tile of BLOCK_P pixels from `first` on lies in a dense map: its start (64-bit), and offsets from it."""
    i = tl.arange(0, BLOCK_P)[:, None]
    sample = sample.to(tl.int64)
    if CHANNELS_LAST:
        start = (sample * pixels + first) * CHANNELS
        at = i * CHANNELS + c
    else:
        start = sample * pixels * CHANNELS + first
        at = c.to(tl.int64) * pixels + i
    return start, at
