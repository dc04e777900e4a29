"""Compiles every kernel of the dispatch table for GPUs that need not be there, and reads what ptxas made of it.

python -m dtpm_fast.kernels.compilation                    prints the table of registers, spills and shared memory
python -m dtpm_fast.kernels.compilation --write FILE.md    puts it between the file's two marker lines
"""
# The interpreter replaces the compiler, so this does not run under TRITON_INTERPRET=1.

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run
from dtpm_fast.kernels import (
    adaln_conv1x1_triton,
    adaln_triton,
    attention_ffn_triton,
    channel_attention_triton,
    dwconv_triton,
    sampler_update_triton,
    simple_gate_triton,
    wide_conv1x1_triton,
)
from dtpm_fast.kernels.adaln_conv1x1_triton import block_of
from dtpm_fast.kernels.dispatch import WIDE, Options, options_of
from dtpm_fast.kernels.document import write_table
from dtpm_fast.kernels.tiles import COMPILER

CAPABILITIES = (80, 90)
CHANNELS = (16, 32, 48, 64, 128, 256, 512)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Pointers to float64 and to float32 whatever the maps hold: sums, and vectors that were sums.
FLOAT64 = {"attention_kernel": {"mean_ptr"}}
FLOAT32 = {
    "attention_kernel": {"sums_ptr", "attention_ptr"},
    "adaln_backward_kernel": {"grad_shift_ptr", "grad_scale_ptr"},
    "channel_sums_kernel": {"sums_ptr"},
    "sampler_update_kernel": {"row_ptr", "x_ptr", "previous_ptr", "y_eps_ptr", "following_ptr", "x0_ptr"},
    "scale_channels_kernel": {"scale_ptr", "offset_ptr"},
    "adaln_conv1x1_backward_kernel": {"grad_shift_ptr", "grad_scale_ptr", "grad_weight_ptr", "grad_bias_ptr"},
    "dwconv_gate_pool_forward_kernel": {"sums_ptr"},
    "gate_backward_kernel": {"scale_ptr", "offset_ptr", "sums_ptr"},
    "attention_ffn_forward_kernel": {"attention_ptr"},
    "wide_conv1x1_kernel": {"attention_ptr"},
    "ffn_backward_kernel": {"vectors_ptr", "matrices_ptr"},
    "conv3_backward_kernel": {"vectors_ptr", "matrices_ptr"},
}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel as it is launched for maps of `channels` in `dtype`."""

    kernel: Any
    channels: int
    dtype: torch.dtype
    constants: dict[str, int | bool]
    options: Options

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: registers and local memory (spills) a thread, shared memory in bytes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def cases() -> Iterator[Case]:
    """Every kernel that the presets run in bfloat16; at 64 channels in the other dtypes too, which use fewer tiles."""
    for channels in CHANNELS:
        for dtype in DTYPES if channels == 64 else DTYPES[:1]:
            yield from _stand_alone(channels, dtype)
            yield from _fused(channels, dtype)


def compile_case(case: Case, capability: int, multiples_of_16: bool = False) -> Resources:
    """Compile for sm_`capability`: for any sizes, or for multiples of 16, of which Triton's launches make use.

    Raises what Triton raises when the kernel does not compile.
    """
    kernel = case.kernel
    constants = {name: value for name, value in case.constants.items() if name in kernel.arg_names}
    # The rest of the launch's options are the compiler's.
    constants |= {name: value for name, value in case.options.items() if name in kernel.arg_names}
    options = COMPILER | {name: value for name, value in case.options.items() if name not in kernel.arg_names}
    pointer = "*" + NAMES[case.dtype]
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            wide = name in FLOAT32.get(kernel.fn.__name__, ())
            double = name in FLOAT64.get(kernel.fn.__name__, ())
            signature[name] = "*fp32" if wide else "*fp64" if double else pointer
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
            if name != "eps" and multiples_of_16:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resource_usage(compiled.asm["cubin"])
    return Resources(registers, spilled, compiled.metadata.shared)


def _stand_alone(channels: int, dtype: torch.dtype) -> Iterator[Case]:
    for channels_last in (True, False):
        layout = {"CHANNELS": channels, "CHANNELS_LAST": channels_last}
        options = adaln_triton.launch_options(channels, channels_last)
        yield Case(adaln_triton.adaln_forward_kernel, channels, dtype, {**layout}, options)
        residual = {**layout, "RESIDUAL": channels_last}  # the block's is channels_last
        yield Case(adaln_triton.adaln_backward_kernel, channels, dtype, residual, options)
        options = channel_attention_triton.launch_options(channels)
        product, offset = layout | {"PRODUCT": True}, layout | {"OFFSET": True}
        yield Case(channel_attention_triton.channel_sums_kernel, channels, dtype, product, options)
        yield Case(channel_attention_triton.scale_channels_kernel, channels, dtype, offset, options)
    options = channel_attention_triton.attention_options(channels)
    yield Case(channel_attention_triton.attention_kernel, channels, dtype, {"CHANNELS": channels}, options)
    if channels == 64:  # the same for any number
        yield Case(
            sampler_update_triton.sampler_update_kernel, channels, dtype, {}, sampler_update_triton.LAUNCH_OPTIONS
        )
    options = simple_gate_triton.launch_options(channels)
    for kernel in (simple_gate_triton.simple_gate_forward_kernel, simple_gate_triton.simple_gate_backward_kernel):
        yield Case(kernel, channels, dtype, {}, options)


def _fused(channels: int, dtype: torch.dtype) -> Iterator[Case]:
    doubled = {"CHANNELS": 2 * channels}
    plain = {"CHANNELS": channels, "OUTPUTS": 2 * channels, "BLOCK_C": block_of(channels)}
    single = {"CHANNELS": channels}
    rank = channels // 4  # of an adapter, as in the presets

    def adapted(rank: int) -> dict[str, int]:
        return {"RANK": rank, "BLOCK_R": block_of(rank)}

    k1, k2, k3 = adaln_conv1x1_triton, dwconv_triton, attention_ffn_triton
    table: list[tuple[str, Any, dict[str, int | bool]]] = [
        ("adaln_conv1x1_forward", k1.adaln_conv1x1_forward_kernel, {**plain}),
        ("dwconv_gate_pool_forward", k2.dwconv_gate_pool_forward_kernel, {**single}),
        ("dwconv_backward", k2.dwconv_backward_kernel, {**doubled}),
        ("attention_ffn_forward", k3.attention_ffn_forward_kernel, {**plain, "SAVE_Y": True, **adapted(0)}),
        ("attention_ffn_forward", k3.attention_ffn_forward_kernel, {**plain, "SAVE_Y": False, **adapted(rank)}),
    ]
    for frozen in (False, True):
        table += [
            ("adaln_conv1x1_backward", k1.adaln_conv1x1_backward_kernel, {**plain, "FROZEN": frozen}),
            ("gate_backward", k2.gate_backward_kernel, {**single, "FROZEN": frozen}),
            ("ffn_backward", k3.ffn_backward_kernel, {**plain, "FROZEN": frozen}),
            ("conv3_backward", k3.conv3_backward_kernel, {**plain, "FROZEN": frozen}),
        ]
    wide: dict[str, int | bool] = {"CHANNELS": channels, "OUTPUTS": channels, "RANK": 0}
    wide |= dict.fromkeys(("ADALN", "ATTENTION", "GATE", "RESIDUAL", "FACTOR"), False)
    for name, own in (
        ("wide_adaln_conv1x1", {"OUTPUTS": 2 * channels, "ADALN": True}),
        ("wide_attention_conv1x1_residual", {"ATTENTION": True, "RESIDUAL": True, "FACTOR": True}),
        ("wide_adaln_conv1x1_gate", {"ADALN": True, "GATE": True}),
        ("wide_conv1x1_residual", {"RESIDUAL": True, "FACTOR": True}),
        ("wide_conv1x1_adapter", {"RESIDUAL": True, "RANK": rank}),
    ):
        table.append((name, wide_conv1x1_triton.wide_conv1x1_kernel, wide | own))
    for name, kernel, constants in table:
        options = options_of(name, channels, dtype)
        if options is not None:
            yield Case(kernel, channels, dtype, constants, options)
            if "ROWS" in options and channels == CHANNELS[-1]:  # as short as small maps make them
                yield Case(kernel, channels, dtype, constants, options | {"ROWS": 2})
            if name in WIDE and channels == CHANNELS[-1]:  # as small as small maps make them, which have so many pixels
                for pixels in (1024, 1):
                    _, smaller = wide_conv1x1_triton.launch(1, pixels, constants["OUTPUTS"], options)
                    yield Case(kernel, channels, dtype, constants, smaller)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def markdown(rows: list[tuple[Case, dict[int, Resources]]]) -> str:
    """One line a kernel, channel count and dtype: the figures of each GPU generation."""
    lines = [
        "| kernel | C | dtype | tile and launch options | registers | spilled bytes | shared bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, got in rows:
        flags = [name for name, value in case.constants.items() if isinstance(value, bool) and value]
        flags += [f"RANK={case.constants['RANK']}"] if case.constants.get("RANK") else []
        options = " ".join([*flags, *(f"{name}={value}" for name, value in case.options.items())])
        figures = (
            " / ".join(str(getattr(found, field.name)) for found in got.values())
            for field in dataclasses.fields(Resources)
        )
        lines.append(f"| {case.name} | {case.channels} | {NAMES[case.dtype]} | {options} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.kernels.compilation",
        description="Compile every kernel of the dispatch table without a GPU; print registers, spills, shared memory.",
        epilog="example: python -m dtpm_fast.kernels.compilation --channels 64 --dtype bf16",
    )
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table between this file's marker lines")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, choices=CHANNELS, metavar="C")
    parser.add_argument("--dtype", nargs="+", default=[*NAMES.values()], choices=[*NAMES.values()])
    parser.add_argument(
        "--capability", type=int, nargs="+", default=CAPABILITIES, choices=(80, 86, 89, 90, 100, 120), metavar="SM",
        help="GPUs, of 80, 86, 89, 90, 100, 120 (default: 80 90)",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.write and tuple(arguments.capability) != CAPABILITIES:
        parser.error("--write is for the table of sm_80 and sm_90: leave out --capability")
    return run(lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> int:
    chosen = [c for c in cases() if c.channels in arguments.channels and NAMES[c.dtype] in arguments.dtype]
    gpus = arguments.capability
    rows = [(case, {gpu: compile_case(case, gpu) for gpu in gpus}) for case in tqdm(chosen, unit="kernel")]
    text = markdown(rows)
    if arguments.write is None:
        print(text)
    else:
        write_table(arguments.write, "compiled kernels", text)
    spilled = [case.name for case, got in rows if any(found.spilled_bytes for found in got.values())]
    if spilled:
        raise UserError(f"these kernels spill registers: {', '.join(sorted(set(spilled)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
