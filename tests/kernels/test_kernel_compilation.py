"""Every kernel of the dispatch table compiles for sm_80 and sm_90, without a GPU, and spills no register."""

import dataclasses
import re
from pathlib import Path

import pytest
import triton

from dtpm_fast.kernels import dispatch
from dtpm_fast.kernels.device import INTERPRETED

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])  # 3.6 spills a few bytes in two kernels

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")

if not INTERPRETED:
    from dtpm_fast.kernels.compilation import CAPABILITIES, CHANNELS, cases, compile_case


@pytest.mark.parametrize("channels", [pytest.param(c, marks=[] if c == 48 else pytest.mark.slow) for c in CHANNELS])
def test_no_kernel_spills(channels: int) -> None:
    chosen = [case for case in cases() if case.channels == channels]
    assert chosen
    for case in chosen:
        for capability in CAPABILITIES:
            got = compile_case(case, capability, multiples_of_16=channels == 64)
            assert got.spilled_bytes <= (0 if TRITON >= (3, 7) else 16), (case, capability, got)
            # A block gets at most 99 KiB on sm_86 and sm_89, which run sm_80's code; 163 on sm_80, 227 on sm_90.
            assert got.shared_bytes <= 99 * 1024, (case, capability, got)


def test_no_product_is_rounded_to_tf32() -> None:
    """Triton's default for float32 is TF32, whose error is a thousand times that of float32."""
    found = 0
    for file in Path(dispatch.__file__).parent.glob("*_triton.py"):
        calls = re.findall(r"tl\.dot\(.*", file.read_text(encoding="utf-8"))
        found += len(calls)
        assert all('input_precision="ieee"' in call for call in calls), file.name
    assert found >= 15


def test_one_pixel_is_a_map_too() -> None:
    """Triton makes a constant of every integer argument that is 1, which must not break a kernel's arithmetic."""
    for case in cases():
        smallest = 128 if case.name.startswith("wide") else 16
        if case.channels == smallest and case.constants.get("CHANNELS_LAST", True):
            ones = dict.fromkeys(("pixels", "height", "width", "programs"), 1)
            compile_case(dataclasses.replace(case, constants=case.constants | ones), CAPABILITIES[-1])
