"""Which fused kernels run, and with which tile sizes: a recorded table, by kernel, channels and dtype.

`dispatch.json` beside this file holds it; `python -m dtpm_fast.kernels.tune` measures and writes one. A kernel runs
with the entry of the smallest listed channel count that holds its own. Where there is none, or its options are null,
cuBLAS and the stand-alone kernels do the work.
"""

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("dispatch.json")
# Channels of an entry that serves any number of them.
ANY = 65536
BITS = (16, 32)

_TILE = frozenset(("BLOCK_P", "num_warps", "num_stages"))
_PRODUCT = frozenset(("BLOCK_P", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"))
_STRIP = frozenset(("GROUPS", "COLUMNS", "BLOCK_C", "ROWS", "num_warps"))
# The options that each kernel takes.
OPTIONS = {
    "adaln_conv1x1_forward": _TILE | {"BLOCK_N"},
    "adaln_conv1x1_backward": _TILE,
    "attention_ffn_forward": _TILE,
    "ffn_backward": _TILE,
    "conv3_backward": _TILE,
    "wide_adaln_conv1x1": _PRODUCT,
    "wide_attention_conv1x1_residual": _PRODUCT,
    "wide_adaln_conv1x1_gate": _PRODUCT,
    "wide_conv1x1_residual": _PRODUCT,
    "wide_conv1x1_adapter": _PRODUCT,
    "dwconv_gate_pool_forward": _STRIP,
    "gate_backward": _STRIP,
    "dwconv_backward": _STRIP,
}
# These have no other form than their kernel: the table holds one entry of them for any number of channels.
ALWAYS = ("dwconv_gate_pool_forward", "gate_backward", "dwconv_backward")

# The products of many channels, and the kernel that does without each where its own channels are few enough.
WIDE = {
    "wide_adaln_conv1x1": "adaln_conv1x1_forward",
    "wide_attention_conv1x1_residual": "attention_ffn_forward",
    "wide_adaln_conv1x1_gate": "attention_ffn_forward",
    "wide_conv1x1_residual": "attention_ffn_forward",
    "wide_conv1x1_adapter": "attention_ffn_forward",
}

Options = dict[str, int]
Table = dict[str, list[dict[str, Any]]]

_in_use: list[Table] = []


def options_of(kernel: str, channels: int, dtype: torch.dtype) -> Options | None:
    """Launch options of `kernel` for maps of `channels`; None where the table leaves the work to cuBLAS."""
    fitting = [e for e in table().get(kernel, []) if e["bits"] == 8 * dtype.itemsize and e["channels"] >= channels]
    if not fitting:
        return None
    options: Options | None = min(fitting, key=lambda entry: entry["channels"])["options"]
    return options


def table() -> Table:
    """The table in use: `using_table`'s, else the file that DTPM_FAST_DISPATCH names, else the one recorded here."""
    return _in_use[-1] if _in_use else read_table(os.environ.get("DTPM_FAST_DISPATCH") or str(TABLE))


@contextmanager
def using_table(kernels: Table) -> Iterator[None]:
    """Run with another table, as the tuner and the tests do."""
    _in_use.append(kernels)
    try:
        yield
    finally:
        _in_use.pop()


@functools.cache
def read_table(path: str) -> Table:
    """The table in a file. Raises `ValueError`, naming the file and the entry, for anything that is not one: a wrong
    option would otherwise be an error inside of a kernel's launch, or a group of kernels silently not in use."""
    try:
        kernels: Table = json.loads(Path(path).read_text(encoding="utf-8"))["kernels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no dispatch table ({type(error).__name__}: {error})") from error
    try:
        _check(kernels)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no dispatch table: {error}") from error
    return kernels


def _check(kernels: Table) -> None:
    unknown = kernels.keys() - OPTIONS.keys()
    if unknown:
        raise ValueError(f"there is no kernel {min(unknown)}")
    for kernel, entries in kernels.items():
        for entry in entries:
            channels, bits, options = entry["channels"], entry["bits"], entry["options"]
            if not isinstance(channels, int) or channels < 1 or bits not in BITS:
                raise ValueError(f"{kernel} has an entry for {channels} channels of {bits} bits")
            if options is None and kernel not in ALWAYS:
                continue
            if options is None or options.keys() != OPTIONS[kernel]:
                raise ValueError(f"{kernel} at {channels} channels takes exactly {', '.join(sorted(OPTIONS[kernel]))}")
            for name, value in options.items():
                power = name not in ("ROWS", "COLUMNS", "num_stages")
                if type(value) is not int or not 0 < value <= 1024 or (power and value & (value - 1)):
                    raise ValueError(f"{kernel} at {channels} channels has {name} = {value}")
    for kernel in ALWAYS:
        for bits in BITS:
            if not any(entry["bits"] == bits and entry["channels"] == ANY for entry in kernels.get(kernel, [])):
                raise ValueError(f"{kernel} needs an entry of {bits} bits for {ANY} channels, having no other form")
