"""Every kernel of the dispatch table compiles for sm_80 and sm_90, without a GPU, and spills no register."""

import dataclasses

import pytest

from dtpm_fast.kernels.device import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")

if not INTERPRETED:
    from dtpm_fast.kernels.compilation import CAPABILITIES, CHANNELS, cases, compile_case


@pytest.mark.parametrize("channels", [pytest.param(c, marks=[] if c == 48 else pytest.mark.slow) for c in CHANNELS])
def test_no_kernel_spills(channels: int) -> None:
    chosen = [case for case in cases() if case.channels == channels]
    assert chosen
    for case in chosen:
        for capability in CAPABILITIES:
            got = compile_case(case, capability)
            assert got.spilled_bytes == 0, (case, capability, got)
            # A block gets at most 163 KiB on sm_80 and 227 KiB on sm_90.
            assert got.shared_bytes <= 163 * 1024, (case, capability, got)


def test_one_pixel_is_a_map_too() -> None:
    """Triton makes a constant of every integer argument that is 1, which must not break a kernel's arithmetic."""
    for case in cases():
        if case.channels == 16 and case.constants.get("CHANNELS_LAST", True):
            ones = dict.fromkeys(("pixels", "height", "width"), 1)
            compile_case(dataclasses.replace(case, constants=case.constants | ones), CAPABILITIES[-1])
