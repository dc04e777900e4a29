"""Measures every fused kernel's tile sizes on this GPU against cuBLAS, and writes the dispatch table.

    python -m dtpm_fast.kernels.tune --output dispatch.json

Nothing else tunes: without this command the recorded table decides, and DTPM_FAST_DISPATCH=dispatch.json names another.
"""

import argparse
import datetime
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

from dtpm_fast.atomic import atomic_path
from dtpm_fast.commands.run import run
from dtpm_fast.errors import UserError
from dtpm_fast.kernels import block_compute
from dtpm_fast.kernels.block_compute import BlockWeights, Modulation
from dtpm_fast.kernels.channel_attention import attention_of
from dtpm_fast.kernels.dispatch import Options, Table, table, using_table
from dtpm_fast.kernels.traffic import block_inputs

CHANNELS = (32, 64, 128, 256, 512)
DTYPES = {16: torch.bfloat16, 32: torch.float32}
BATCH = 8
EPS = 1e-6
# These have no other form than their kernel, so the table holds one entry of them for any number of channels.
ALWAYS = ("dwconv_gate_pool_forward", "gate_backward", "dwconv_backward")
ANY = 65536

_TILES = [
    {"BLOCK_P": pixels, "num_warps": warps, "num_stages": stages}
    for pixels, warps, stages in itertools.product((16, 32, 64, 128), (2, 4, 8), (1, 2, 3))
]
_STRIPS = [
    {"BLOCK_W": columns, "BLOCK_C": channels, "ROWS": rows, "num_warps": warps}
    for columns, channels, rows, warps in itertools.product((8, 16, 32), (16, 32, 64), (8, 16, 32), (4, 8))
    if 2 <= columns * channels // (32 * warps) <= 8
]
CANDIDATES: dict[str, list[Options]] = {
    "adaln_conv1x1_forward": [tile | {"BLOCK_N": outputs} for tile in _TILES for outputs in (64, 128)],
    "adaln_conv1x1_backward": _TILES,
    "attention_ffn_forward": _TILES,
    "ffn_backward": _TILES,
    "conv3_backward": _TILES,
    **dict.fromkeys(ALWAYS, _STRIPS),
}


def tune(channels: tuple[int, ...], bits: tuple[int, ...]) -> Table:
    """Time every candidate and the form without the kernel; keep the fastest, or none where the kernel loses.

    An entry also serves the smaller channel counts that have none. So a count at which the kernel loses, below one at
    which it wins, gets an entry without options, which stands for the form without the kernel.
    """
    found: Table = {kernel: [] for kernel in CANDIDATES}
    jobs = [(kernel, c, width) for kernel in CANDIDATES for width in bits for c in channels]
    with tqdm(jobs, unit="kernel") as progress:
        for kernel, c, width in progress:
            if kernel in ALWAYS and c != 64:
                continue
            progress.set_postfix_str(f"{kernel} C={c} {width} bits")
            step = _steps(c, DTYPES[width])[kernel]
            timed = [(seconds, options) for options in CANDIDATES[kernel] if (seconds := _time(kernel, options, step))]
            if kernel not in ALWAYS:
                timed.append((_time(kernel, None, step) or float("inf"), {}))
            best = min(timed, key=lambda entry: entry[0])[1]
            entry = {"channels": ANY if kernel in ALWAYS else c, "bits": width, "options": best or None}
            found[kernel].append(entry)
    return found


def _time(kernel: str, options: Options | None, step: Callable[[], Any]) -> float | None:
    """Median milliseconds with a cold L2 cache; None where the tile does not fit the GPU. No options: not fused."""
    entries = [] if options is None else [{"channels": ANY, "bits": b, "options": options} for b in DTYPES]
    with using_table(table() | {kernel: entries}):
        try:
            milliseconds: float = triton.testing.do_bench(step, warmup=10, rep=50, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            return None
    return milliseconds


def _steps(channels: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Each kernel's group at the presets' shape of this many channels: 256² at 64, halved with every doubling."""
    side = 256 * 64 // channels
    inputs = block_inputs(BATCH, channels, side, side, dtype, "cuda")
    x, modulation, weights = inputs[0], Modulation(*inputs[1:5]), BlockWeights(*inputs[5:])
    h = block_compute._adaln_conv1x1(x, modulation, weights, EPS)
    g, mean = block_compute._dwconv_gate_pool(h, weights)
    attention = attention_of(mean, weights.sca_weight, weights.sca_bias)
    arguments = (g, attention, x, modulation, weights, None, EPS, True)
    return {
        "adaln_conv1x1_forward": lambda: block_compute._adaln_conv1x1(x, modulation, weights, EPS),
        "adaln_conv1x1_backward": lambda: block_compute._adaln_conv1x1_backward(h, x, x, modulation, weights, EPS),
        "attention_ffn_forward": lambda: block_compute._attention_ffn(*arguments),
        "ffn_backward": lambda: block_compute._ffn_backward(x, x, modulation, weights, EPS),
        "conv3_backward": lambda: block_compute._conv3_backward(x, g, attention, weights),
        "dwconv_gate_pool_forward": lambda: block_compute._dwconv_gate_pool(h, weights),
        "gate_backward": lambda: block_compute._gate_backward(g, attention, mean, h, weights),
        "dwconv_backward": lambda: block_compute._dwconv_backward(h, h, weights),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.kernels.tune",
        description="Measure the fused kernels' tile sizes on this GPU and write the dispatch table.",
        epilog="example: python -m dtpm_fast.kernels.tune --output dispatch.json --bits 16",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, choices=CHANNELS, metavar="C")
    parser.add_argument("--bits", type=int, nargs="+", default=(16, 32), choices=(16, 32))
    arguments = parser.parse_args()
    return run(lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise UserError("tuning measures on a CUDA device, and PyTorch sees none here; the recorded table stays in use")
    found = tune(tuple(sorted(arguments.channels)), tuple(arguments.bits))
    measured_on = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    with atomic_path(arguments.output) as path:
        path.write_text(json.dumps({"measured_on": measured_on, "kernels": found}, indent=1) + "\n", encoding="utf-8")
    print(f"{arguments.output}: name it in DTPM_FAST_DISPATCH to use it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
