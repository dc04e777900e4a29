"""How much memory a picture takes, and how much there is: `--tile auto`."""

import math
import os
from pathlib import Path

import torch

from dtpm_fast.config import ModelConfig
from dtpm_fast.device import free_cuda_memory
from dtpm_fast.errors import UserError
from dtpm_fast.runtime.tiling import OVERLAP

# Maps of C channels at full size that live at once at the worst moment of a plan's step, bias maps of all levels
# included, and pictures beside them, by the plan's form; measured (benchmarks/bench_restore.py memory) and rounded up.
MAPS = {"folded": 20.0, "kernels": 20.0, "native": 2.75}  # of the C++ blocks without the maps of products' inputs
PICTURES = {"folded": 4, "kernels": 4, "native": 20}
CPU_BUDGET = 2 << 30  # bytes: a laptop runs other things as well
PICTURE = 3 * torch.float32.itemsize  # bytes of a pixel
TILES = (2048, 1536, 1280, 1024, 768, 512, 384, 256, 192, 128)


def needed(config: ModelConfig, pixels: int, dtype: torch.dtype, form: str = "folded") -> int:
    """Bytes that a plan takes beyond its weights for a batch of so many pixels."""
    maps, of_map = MAPS[form], dtype.itemsize
    if form == "folded" and of_map < 4:
        maps *= 4 / 3  # where a CPU does not multiply bfloat16, PyTorch's operators hold float32 inside
    if form == "native":
        # The gated map and the conditions are in the products' dtype, all else is float32.
        maps, of_map = maps + (1 + _condition_maps(config)) * dtype.itemsize / 4, 4
    return round(pixels * (maps * config.width * of_map + PICTURES[form] * PICTURE))


def _condition_maps(config: ModelConfig) -> float:
    """What the conditions of all adapters take, in maps of full size: rC channels each, which fill vectors of 16."""
    if config.adapter_positions == "none":
        return 0.0
    levels = zip(config.encoder_blocks, reversed(config.decoder_blocks), strict=True)
    blocks = [*(encoder + decoder for encoder, decoder in levels), config.middle_blocks]
    found = 0.0
    for level, count in enumerate(blocks):
        rank = 16 * math.ceil(config.adapter_ratio * (config.width << level) / 16)
        found += count * rank / (config.width << 2 * level)
    return found


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    return free_cuda_memory(device) if device.type == "cuda" else _free()


def budget(device: torch.device) -> int:
    """Bytes that a picture may take: half of what is free, and on a CPU never more than 2 GiB."""
    half = free_memory(device) // 2
    return half if device.type == "cuda" else min(half, CPU_BUDGET)


def check_fits(batch: int, height: int, width: int, fields: int, device: torch.device) -> None:
    """Raise `UserError` where not even the pictures that a restoration holds whole fit into the free memory: a system
    that promises more than it has would kill the process instead. Fields of noise are copied when they get a border."""
    noise, free = fields * PICTURE * height * width, free_memory(device)
    least = max(whole(batch, height, width) + noise, 2 * noise)
    if least > free:
        raise UserError(
            f"a picture of {width}x{height} pixels: not enough memory; it takes {least / 2**30:.1f} GiB in the "
            f"smallest tiles, and {free / 2**30:.1f} GiB are free; make it smaller or cut it"
        )


def whole(batch: int, height: int, width: int) -> int:
    """Bytes that stay whole however small the tiles: y_d, y_eps, the blended map, and x and x0 of two steps."""
    return 7 * PICTURE * batch * height * width


def choose_tile(
    config: ModelConfig, batch: int, height: int, width: int, dtype: torch.dtype, free: int, form: str = "folded"
) -> int | None:
    """The core of the largest tiles that fit into `free` bytes, beside pictures that leave too little into an eighth of
    them: small tiles cost more time than they save; None where the whole picture fits."""
    if needed(config, batch * height * width, dtype, form) <= free:
        return None
    room = max(free - whole(batch, height, width), free // 8)
    for core in TILES:
        if needed(config, batch * (core + 2 * OVERLAP) ** 2, dtype, form) <= room:
            return core
    return TILES[-1]


def _free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    within = free_in_group(Path("/sys/fs/cgroup"))
    return free if within is None else min(free, within)


def free_in_group(group: Path) -> int | None:
    """Bytes that are free of a container's own limit (control groups, version 2), None where it has none. Files that
    the system keeps in memory and has not read lately count as free: they go when something else needs their place."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit of its own
        return None
    return max(0, limit - used + int(kept.get("inactive_file", 0)))
