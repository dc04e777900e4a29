"""Predicted memory traffic of the block, in units of T, the bytes of one map of C channels; and what autograd keeps.

    python -m dtpm_fast.kernels.traffic                    prints the table
    python -m dtpm_fast.kernels.traffic --write FILE.md    puts it between the file's two marker lines
    ncu --clock-control none --csv --print-units base --metrics dram__bytes_read.sum,dram__bytes_write.sum \\
        -k 'regex:adaln_conv1x1|dwconv|attention_ffn|ffn_b|conv3_b|gate_b' \\
        python -m dtpm_fast.kernels.traffic --launch --batch 32 > ncu.csv
    python -m dtpm_fast.kernels.traffic --measured ncu.csv --batch 32 --write FILE.md    with what a GPU's counters say

The fused kernels are counted by what they read and write once. Eager PyTorch is counted as it runs: every operation's
inputs and outputs, over shapes alone (no memory, no GPU). Neither counts caches, weights or per-program sums.
"""

import argparse
import csv
import functools
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run
from dtpm_fast.kernels.adapter import Adapter, MergedConv5, adapter_ref
from dtpm_fast.kernels.block import denoising_block, denoising_block_ref
from dtpm_fast.kernels.block_compute import BlockWeights, Modulation
from dtpm_fast.kernels.document import write_table


class Maps(NamedTuple):
    """Maps of C channels that a kernel reads and writes."""

    read: float
    written: float


FORWARD = {
    "adaln_conv1x1_forward": Maps(1, 2),
    "dwconv_gate_pool_forward": Maps(2, 1),
    "attention_ffn_forward": Maps(2, 1),
}
# Of many channels, in the order of the block; what training keeps, y and g, is written anyway.
WIDE_FORWARD = {
    "wide_adaln_conv1x1": Maps(1, 2),
    "dwconv_gate_pool_forward": Maps(2, 1),
    "wide_attention_conv1x1_residual": Maps(2, 1),
    "wide_adaln_conv1x1_gate": Maps(1, 1),
    "wide_conv1x1_residual": Maps(2, 1),
}
# By group: transposed products, AdaLN's backward; for the weights, AdaLN, gate and scaling once more, products, sums.
WIDE_BACKWARD = {
    "ffn": Maps(21, 9),
    "conv3": Maps(7, 2),
    "wide_adaln_conv1x1": Maps(1, 2),
    "gate_backward": Maps(3, 2),
    "dwconv_backward": Maps(2, 2),
    "adaln_conv1x1": Maps(11, 3),
}
# Of these without what the weights' gradients alone take.
WIDE_FROZEN_BACKWARD = WIDE_BACKWARD | {"ffn": Maps(10, 7), "conv3": Maps(3, 1), "adaln_conv1x1": Maps(5, 2)}
# y is written besides, and g, which is written anyway, is kept; the backward computes h once more.
TRAINING_FORWARD = FORWARD | {"attention_ffn_forward": Maps(2, 2)}
BACKWARD = {
    "ffn_backward": Maps(2, 1),
    "conv3_backward": Maps(2, 1),
    "adaln_conv1x1_forward": Maps(1, 2),
    "gate_backward": Maps(3, 2),
    "dwconv_backward": Maps(2, 2),
    "adaln_conv1x1_backward": Maps(4, 1),
}
# One pass of `launch`, in this order; in inference y is not kept.
STEPS = {"inference": FORWARD, "training": TRAINING_FORWARD, "backward": BACKWARD}
# What an adapter of rank C / 4 adds, in inference: its condition, read by `attention_ffn_forward`; of many channels
# by `wide_conv1x1_adapter`, in conv5's place.
ADAPTER = Maps(0.25, 0)


class Eager(NamedTuple):
    """Of the oracle in eager PyTorch, in T."""

    forward: float
    backward: float
    kept: float
    adapter: float  # what an adapter of rank C / 4 adds


def total(kernels: dict[str, Maps]) -> float:
    """All maps that these kernels read and write."""
    return sum(sum(maps) for maps in kernels.values())


def eager(channels: int = 64, size: int = 256, batch: int = 8, dtype: torch.dtype = torch.bfloat16) -> Eager:
    """Count the oracle's operations as they run over shapes."""
    inputs = block_inputs(batch, channels, size, size, dtype, "meta")
    unit = inputs[0].numel() * inputs[0].element_size()
    leaves = [tensor.requires_grad_() for tensor in inputs]
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor)] = tensor
        return tensor

    with _Count() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = denoising_block_ref(leaves[0], *Modulation(*leaves[1:5]), BlockWeights(*leaves[5:]))
    with _Count() as backward:
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    behind = adapter_inputs(out.detach())
    with torch.no_grad(), _Count() as adapter:
        adapter_ref(out, behind)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept.values()}
    kept_bytes = sum(storages.values())
    return Eager(*(count / unit for count in (forward.bytes, backward.bytes, kept_bytes, adapter.bytes)))


def block_inputs(batch: int, channels: int, height: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Random x (channels_last), shifts and scales, and the fourteen weights, in the order of `BlockWeights`."""
    x = torch.randn(batch, channels, height, width, dtype=dtype, device=device)
    modulation = [0.1 * torch.randn(batch, channels, dtype=dtype, device=device) for _ in range(4)]
    weights = []
    for outputs, inputs, side in (
        (2, channels, 1),
        (2, 1, 3),
        *[(1, channels, 1)] * 2,
        (2, channels, 1),
        (1, channels, 1),
    ):
        scale = (inputs * side**2) ** -0.5
        weights.append(scale * torch.randn(outputs * channels, inputs, side, side, dtype=dtype, device=device))
        weights.append(torch.randn(outputs * channels, dtype=dtype, device=device))
    weights += [torch.randn(1, channels, 1, 1, dtype=dtype, device=device) for _ in range(2)]
    return [x.contiguous(memory_format=torch.channels_last), *modulation, *weights]


def adapter_inputs(z: Tensor) -> Adapter:
    """A random adapter of rank C / 4 for the block's output z, with its merged conv5."""
    samples, channels, height, width = z.shape
    rank = max(1, channels // 4)
    m_in, m_out = 0.1 * z.new_empty(rank, channels).normal_(), 0.1 * z.new_empty(channels, rank).normal_()
    condition = z.new_empty(samples, rank, height, width).normal_().contiguous(memory_format=torch.channels_last)
    weight, bias, matrix = z.new_empty(channels, channels).normal_(), z.new_zeros(channels), m_out @ m_in
    return Adapter(m_in, m_out, condition, MergedConv5(weight, bias, matrix))


class _Count(TorchDispatchMode):
    """Bytes of every operation's tensors; views and allocations move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self,
        function,
        types,
        arguments=(),
        keywords=None,
    ) -> Any:
        out = function(*arguments, **(keywords or {}))
        if not function.is_view and "empty" not in str(function):
            tensors = [*_tensors((arguments, keywords or {})), *_tensors(out)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def launch(channels: int, size: int, batch: int) -> None:
    """`STEPS` of the block for a profiler to count, and once before it, which compiles."""
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device whose traffic could be counted")
    inputs = [t.requires_grad_() for t in block_inputs(batch, channels, size, size, torch.bfloat16, "cuda")]
    block = functools.partial(denoising_block, inputs[0], *Modulation(*inputs[1:5]), BlockWeights(*inputs[5:]))
    for _ in range(2):
        with torch.no_grad():
            block()
        z = block()
        torch.autograd.grad(z, inputs, torch.randn_like(z))
    torch.cuda.synchronize()


def read_counters(file: Path) -> dict[tuple[str, str], float]:
    """Bytes that each kernel of each of `STEPS` read and wrote a launch, median, from what `ncu --csv` printed of
    `launch`. A kernel's launches are told apart by their order.

    Raises: `UserError` for a file that holds no bytes, or part of a pass.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    heads = [place for place, line in enumerate(lines) if line.startswith('"ID"')]
    launches: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[heads[0] :]) if heads else ():
        name, metric = str(row["Kernel Name"]).split("(")[0].removesuffix("_kernel"), str(row["Metric Name"])
        if metric.startswith("dram__bytes") and row["Metric Unit"] == "byte":
            counted = launches.setdefault(name, {})
            counted[row["ID"]] = counted.get(row["ID"], 0.0) + float(row["Metric Value"].replace(",", ""))
    if not launches:
        raise UserError(f"{file}: holds no dram__bytes in bytes; it is to be what ncu --csv --print-units base printed")
    found = {}
    for name, counted in launches.items():
        values, steps = [*counted.values()], [step for step, kernels in STEPS.items() if name in kernels]
        if steps and len(values) % len(steps):
            raise UserError(f"{file}: holds {len(values)} launches of {name}, and a pass has {len(steps)}")
        for place, step in enumerate(steps):
            found[step, name] = statistics.median(values[place :: len(steps)])
    return found


def markdown(channels: int, size: int, batch: int, measured: Mapping[tuple[str, str], float] | None = None) -> str:
    """Each kernel's reads and writes, beside the bytes that a GPU counted, and the sums beside eager's."""
    counted_bytes = {key: f"{value / 1e6:.0f}" for key, value in (measured or {}).items()}
    unit = batch * channels * size**2 * 2
    lines = [
        f"C = {channels}, {size}², batch {batch}, 16 bits: T = {unit / 1e6:.1f} MB.",
        "",
        "| step | kernel | reads, T | writes, T | predicted, MB | measured, MB |",
        "|---|---|---|---|---|---|",
    ]
    for step, kernels in STEPS.items():
        lines += [
            f"| {step} | {name} | {maps.read} | {maps.written} | {sum(maps) * unit / 1e6:.0f} "
            f"| {counted_bytes.get((step, name), 'not run')} |"
            for name, maps in kernels.items()
        ]
    counted = eager(channels, size, batch)
    lines += [
        "",
        "| | forward | with an adapter | forward in training | backward | kept for the backward |",
        "|---|---|---|---|---|---|",
        *(
            f"| {form} | {total(forward)} T | {total(forward) + sum(ADAPTER)} T | {total(training)} T "
            f"| {total(backward)} T | 3 T |"
            for form, forward, training, backward in (
                ("fused", FORWARD, TRAINING_FORWARD, BACKWARD),
                ("many channels", WIDE_FORWARD, WIDE_FORWARD, WIDE_BACKWARD),
            )
        ),
        f"| eager PyTorch, counted | {counted.forward:.1f} T | {counted.forward + counted.adapter:.1f} T "
        f"| {counted.forward:.1f} T | {counted.backward:.1f} T | {counted.kept:.1f} T |",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.kernels.traffic",
        description="Predict the memory traffic of the fused block and count that of eager PyTorch.",
        epilog="example: python -m dtpm_fast.kernels.traffic --channels 64 --size 256 --batch 8",
    )
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table between this file's marker lines")
    parser.add_argument("--launch", action="store_true", help="run the block once on the GPU, for ncu to count")
    parser.add_argument("--measured", type=Path, metavar="NCU.csv", help="what ncu --csv printed of that")
    arguments = parser.parse_args()

    def work() -> int:
        shape = arguments.channels, arguments.size, arguments.batch
        if min(shape) < 1:
            raise UserError("--channels, --size and --batch must be 1 or more")
        if arguments.launch:
            launch(*shape)
            return 0
        text = markdown(*shape, None if arguments.measured is None else read_counters(arguments.measured))
        if arguments.write is None:
            print(text)
        else:
            write_table(arguments.write, "traffic", text)
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
