"""The C++ blocks for CPUs: the float64 oracle by the kernels' rule, every instruction set, threads, refusals."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dtpm_fast.config import Config
from dtpm_fast.kernels.block import block_weights, denoising_block_ref
from dtpm_fast.model.adapter import CGAdapter
from dtpm_fast.model.block import DenoisingBlock
from dtpm_fast.model.dtpm import Predictor
from dtpm_fast.runtime import cpu_unet
from dtpm_fast.runtime.backends import choose_backend
from dtpm_fast.runtime.cpu_unet import (
    CpuBlock,
    CpuPictureMap,
    CpuUNet,
    input_dtype,
    instruction_set,
    native_update,
    scratch,
)
from dtpm_fast.runtime.plan import Plan, native_form
from dtpm_fast.runtime.sampler import make_steps, update
from dtpm_fast.runtime.unet import FoldedUNet, MergedAdapter, PictureMap, own_mean

_nafnet = pytest.importorskip("dtpm_fast._nafnet", reason="dtpm_fast._nafnet was not built, which needs OpenMP")

ISAS = _nafnet.instruction_sets()
PAIRED = [name for name, _ in _nafnet.instruction_sets(bfloat16=True)]
needs_bfloat16 = pytest.mark.skipif(not PAIRED, reason="this CPU multiplies no bfloat16 (AVX512_BF16, Intel AMX)")
# Samples, channels, height, width: one pixel, odd sides, several bands and column strips, channels that fill no panel.
SHAPES = [(1, 16, 1, 1), (3, 24, 5, 7), (1, 32, 67, 50), (2, 40, 1, 33), (1, 256, 3, 131), (1, 96, 9, 2)]


def inputs(samples: int, channels: int, height: int, width: int, offset: float) -> tuple[DenoisingBlock, list[Tensor]]:
    """A block none of whose parts is zero; x (B, H, W, C) and four rows (B, C): shift1, scale1, shift2, scale2."""
    block = DenoisingBlock(channels, 8).requires_grad_(False)
    block.beta.normal_(std=0.3)
    block.gamma.normal_(std=0.3)
    return block, [torch.randn(samples, height, width, channels) + offset, *torch.randn(4, samples, channels) * 0.3]


def network_and_rows(width: int) -> tuple[Predictor, Tensor]:
    """A network none of whose parts is zero, and the modulation rows of its blocks."""
    network = Predictor(width, (1, 1), 1, (1, 1)).requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith((".beta", ".gamma")) or name.startswith("ending"):
            parameter.normal_(std=0.3)
    return network, torch.randn(1, sum(4 * channels for channels in network.positions().values())) * 0.3 + 1


def plain(block: DenoisingBlock, x: Tensor, rows: Sequence[Tensor], adapter: CGAdapter | None, y: Tensor) -> Tensor:
    nchw = x.permute(0, 3, 1, 2)
    out = denoising_block_ref(nchw, *rows, block_weights(block))
    return (out if adapter is None else adapter(out, y)).permute(0, 2, 3, 1)


def native(
    isa: str, block: DenoisingBlock, x: Tensor, rows: Sequence[Tensor], adapter: CGAdapter | None, y: Tensor
) -> Tensor:
    merged = None if adapter is None else MergedAdapter(adapter)
    ours = CpuBlock(block, merged, isa)
    condition = None
    if merged is not None:
        condition = CpuPictureMap(*merged.condition(ours.residual_bias, ours.rank), isa, of_inputs=True)(y)
    shift1, scale1, shift2, scale2 = rows
    return ours(x.clone(), (shift1, 1 + scale1, shift2, 1 + scale2), condition, 0, own_mean)


def drawn(
    shape: tuple[int, ...], offset: float, adapted: bool
) -> tuple[DenoisingBlock, Tensor, list[Tensor], CGAdapter | None, Tensor]:
    """What `plain` and `native` take: block, x, rows, adapter, y."""
    block, (x, *rows) = inputs(*shape, offset)
    adapter = CGAdapter(shape[1], 0.25, "linear").requires_grad_(False) if adapted else None
    if adapter is not None:
        adapter.m_out.weight.normal_(std=0.1)
        assert adapter.m_out.bias is not None
        adapter.m_out.bias.normal_(std=0.1)
    return block, x, rows, adapter, torch.rand(shape[0], 3, *shape[2:]) * 2 - 1


def plain_in(
    dtype: torch.dtype, block: DenoisingBlock, x: Tensor, rows: Sequence[Tensor], adapter: CGAdapter | None, y: Tensor
) -> Tensor:
    """`plain` with everything in this dtype."""
    block, adapter = (None if m is None else copy.deepcopy(m).to(dtype) for m in (block, adapter))
    return plain(block, x.to(dtype), [row.to(dtype) for row in rows], adapter, y.to(dtype))


def error(values: list[Tensor], truths: list[Tensor]) -> float:
    value, truth = torch.stack(values).double(), torch.stack(truths)
    return float((value - truth).norm() / truth.norm())


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "adapter"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("isa", "lanes"), ISAS)
def test_a_block_is_as_exact_as_eager(isa: str, lanes: int, shape: tuple[int, ...], adapted: bool) -> None:
    """Its relative error against the float64 oracle is at most 1.5 times eager's, over four draws together."""
    if shape[1] % lanes:
        assert instruction_set(torch.float32, shape[1]) != isa
        return
    for offset in (0.0, 100.0):
        ours, eager, exact = [], [], []
        for _ in range(4):
            block, x, rows, adapter, y = drawn(shape, offset, adapted)
            ours.append(native(isa, block, x, rows, adapter, y))
            eager.append(plain(block, x, rows, adapter, y))
            exact.append(plain_in(torch.float64, block, x, rows, adapter, y))
        assert error(ours, exact) <= 1.5 * error(eager, exact)


@needs_bfloat16
@pytest.mark.parametrize("isa", PAIRED)
@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "adapter"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 16 == 0] + [(2, 48, 6, 9)], ids=str)
def test_a_block_with_rounded_products_is_more_exact_than_eager_bfloat16(
    isa: str, shape: tuple[int, ...], adapted: bool
) -> None:
    """Only its products are rounded, and maps are not: three quarters of eager's error is a bound."""
    for offset in (0.0, 100.0):
        ours, eager, exact = [], [], []
        for _ in range(4):
            block, x, rows, adapter, y = drawn(shape, offset, adapted)
            ours.append(native(isa, block, x, rows, adapter, y))
            eager.append(plain_in(torch.bfloat16, block, x, rows, adapter, y))
            exact.append(plain_in(torch.float64, block, x, rows, adapter, y))
        assert error(ours, exact) <= 0.75 * error(eager, exact)


@needs_bfloat16
@pytest.mark.parametrize("isa", PAIRED)
def test_the_whole_network_with_rounded_products_is_more_exact_than_folded_bfloat16(isa: str) -> None:
    network, rows = network_and_rows(32)
    ours, eager, exact = [], [], []
    for _ in range(4):
        h = torch.randn(2, 12, 20, 32)
        ours.append(CpuUNet(network, {}, isa)(h.clone(), rows, {}))
        eager.append(FoldedUNet(network, {}, torch.bfloat16)(h.bfloat16(), rows.bfloat16(), {}))
        exact.append(FoldedUNet(network, {}, torch.float64)(h.double(), rows.double(), {}))
    assert error(ours, exact) <= 0.75 * error(eager, exact)


@pytest.mark.parametrize(("isa", "lanes"), ISAS)
def test_the_whole_network_is_as_exact_as_folded_operators(isa: str, lanes: int) -> None:
    """Down, up and the ending as well, on a batch whose sides differ."""
    width = 2 * lanes
    network, rows = network_and_rows(width)
    ours, eager, exact = [], [], []
    for _ in range(4):
        h = torch.randn(2, 12, 20, width)
        ours.append(CpuUNet(network, {}, isa)(h.clone(), rows, {}))
        eager.append(FoldedUNet(network, {}, torch.float32)(h.clone(), rows, {}))
        exact.append(FoldedUNet(network, {}, torch.float64)(h.double(), rows.double(), {}))
    assert error(ours, exact) <= 1.5 * error(eager, exact)


@pytest.mark.parametrize(("isa", "lanes"), ISAS)
def test_a_map_of_a_picture_is_as_exact_as_eager(isa: str, lanes: int) -> None:
    for size in ((1, 1), (5, 7), (2, 99)):
        weight, bias = torch.randn(3 * lanes, 3, 3, 3), torch.randn(3 * lanes)
        forms = CpuPictureMap(weight, bias, isa), PictureMap(weight, bias, torch.float32)
        exact = PictureMap(weight.double(), bias.double(), torch.float64)
        for instead in (None, torch.randn(2, *size, 3 * lanes)):
            pictures = [torch.rand(2, 3, *size) * 2 - 1 for _ in range(4)]
            ours, eager = ([form(p, instead) for p in pictures] for form in forms)
            truth = [exact(p.double(), None if instead is None else instead.double()) for p in pictures]
            assert error(ours, truth) <= 1.5 * error(eager, truth)


@pytest.mark.parametrize("isa", [ISAS[0][0], *PAIRED])
def test_a_map_of_inputs_is_the_map_rounded_once(isa: str) -> None:
    weight, bias, picture = torch.randn(48, 3, 3, 3), torch.randn(48), torch.rand(2, 3, 5, 19) * 2 - 1
    wide, inputs = (CpuPictureMap(weight, bias, isa, of_inputs=of_inputs)(picture) for of_inputs in (False, True))
    assert inputs.dtype == input_dtype(isa) == (torch.bfloat16 if isa in PAIRED else torch.float32)
    assert torch.equal(inputs, wide.to(inputs.dtype)) and inputs.data_ptr() % 64 == 0


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_the_sampler_s_update_is_as_exact_as_eager(sampler: str, clip: bool) -> None:
    steps = make_steps(Config.of(clip=clip), 4, sampler)
    ours, eager, exact = [], [], []
    for row in steps.table:
        x = torch.randn(1, 3, 7, 11).expand(3, -1, -1, -1)  # one noise field for a batch
        given = [x, torch.randn(3, 3, 7, 11) * 40, torch.randn(3, 3, 7, 11), torch.rand(3, 3, 7, 11) * 2 - 1]
        ours.append(torch.stack(native_update(row.float(), *given)))
        eager.append(torch.stack(update(row.float(), *given)))
        exact.append(torch.stack(update(row, *(t.double() for t in given))))
        assert (exact[-1][1].abs() > 2).any() != clip  # x0 reaches beyond the range unless it is clipped
    assert error(ours, exact) <= 1.5 * error(eager, exact)


def test_an_update_keeps_nan() -> None:
    x = torch.zeros(1, 3, 4, 5)
    output = x.clone()
    output[0, 1, 2, 3] = float("nan")
    steps = make_steps(Config(), 4)
    for values in native_update(steps.table[0].float(), x, output, x, x):
        assert torch.equal(values.isnan(), output.isnan())


@pytest.mark.parametrize("isa", [ISAS[0][0], *PAIRED])
def test_no_bit_depends_on_the_number_of_threads(isa: str) -> None:
    block, (x, *rows) = inputs(2, 64, 70, 300, 0.0)  # several strips, bands and chunks
    assert _nafnet.strip_width(70, 300, 64) < 300
    kept = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outputs.append(native(isa, block, x, rows, None, torch.zeros(2, 3, 70, 300)))
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])
    assert not torch.equal(outputs[0], x)


def test_a_mean_from_outside_is_taken() -> None:
    block, (x, *rows) = inputs(1, 16, 6, 5, 0.0)
    ours = CpuBlock(block, None, "portable")
    four = (rows[0], 1 + rows[1], rows[2], 1 + rows[3])
    seen: list[Tensor] = []

    def mean(number: int, gated: Tensor) -> Tensor:
        assert number == 3
        seen.append(gated.clone())
        return own_mean(number, gated)

    torch.testing.assert_close(ours(x.clone(), four, None, 3, mean), ours(x.clone(), four, None, 3, own_mean))
    assert seen[0].shape == x.shape
    other = ours(x.clone(), four, None, 3, lambda number, gated: own_mean(number, gated) + 1)
    assert (other - ours(x.clone(), four, None, 3, own_mean)).abs().max() > 1e-3


def test_weights_are_changed_in_place_and_a_copys_are_its_own() -> None:
    block, (x, *rows) = inputs(1, 16, 6, 5, 0.0)
    four = (rows[0], 1 + rows[1], rows[2], 1 + rows[3])

    def result(of: CpuBlock) -> Tensor:
        return of(x.clone(), four, None, 0, own_mean)

    ours, other = CpuBlock(block, None, "portable"), CpuBlock(inputs(1, 16, 6, 5, 0.0)[0], None, "portable")
    before, wanted, copied = result(ours), result(other), copy.deepcopy(ours)
    for buffer, value in zip(copied.buffers(), other.buffers(), strict=True):
        buffer.copy_(value)
    assert torch.equal(result(copied), wanted) and not torch.equal(wanted, before)
    assert torch.equal(result(ours), before)


NO_MEMORY = """
import resource
import numpy as np
from dtpm_fast import _nafnet

def down(channels):
    maps = np.ones((1, 8, 8, channels), np.float32), np.ones(8 * channels * channels, np.float32)
    given = *maps, np.zeros(2 * channels, np.float32), np.empty((1, 4, 4, 2 * channels), np.float32)
    return lambda: _nafnet.down(*given, threads=2, isa="portable") or given[-1].copy()

down(16)()  # the threads are there now
call = down(1024)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
kept = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 10), kept[1]))
try:
    call()
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, kept)
    assert (call() == 4 * 1024).all()
    print("an error, and then a result")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits a process's memory as Linux does")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer takes memory without a limit")
def test_too_little_memory_in_a_thread_is_an_error_of_the_call() -> None:
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "an error, and then a result\n"), done.stderr


def test_wrong_arrays_are_refused_and_not_read() -> None:
    ok = np.zeros((1, 4, 4, 16), np.float32)
    weight, bias = np.zeros(8 * 16 * 16, np.float32), np.zeros(32, np.float32)
    out = np.zeros((1, 2, 2, 32), np.float32)
    how = {"threads": 1, "isa": "portable"}
    _nafnet.down(ok, weight, bias, out, **how)
    for given, message in (
        ((ok, weight[:-1], bias, out), "weight: expected 2048 values, got 2047"),
        ((ok, weight, bias, out[:, :1]), "out: expected"),
        ((ok[:, :3], weight, bias, out), "must be even"),
        ((np.zeros((1, 4, 4, 15), np.float32), weight, bias, out), "no multiple"),
        ((ok[0], weight, bias, out), "4 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            _nafnet.down(*(np.ascontiguousarray(array) for array in given), **how)
    for wrong in (ok.astype(np.float64), ok[:, :, ::2]):
        with pytest.raises(TypeError):
            _nafnet.down(wrong, weight, bias, out, **how)
    with pytest.raises(ValueError, match="threads"):
        _nafnet.down(ok, weight, bias, out, threads=0, isa="portable")
    with pytest.raises(ValueError, match="unknown instruction set neon"):
        _nafnet.down(ok, weight, bias, out, threads=1, isa="neon")
    for isa in ("amx", "avx512bf16"):
        if isa in PAIRED:  # their weights are pairs: half as many numbers
            with pytest.raises(ValueError, match="weight: expected 1024 values, got 2048"):
                _nafnet.down(ok, weight, bias, out, threads=1, isa=isa)
        else:
            with pytest.raises(RuntimeError, match=f"no {isa}"):
                _nafnet.down(ok, weight, bias, out, threads=1, isa=isa)


def test_a_condition_of_other_channels_is_refused() -> None:
    block, x, rows, adapter, _ = drawn((1, 16, 4, 4), 0.0, adapted=True)
    assert adapter is not None
    ours = CpuBlock(block, MergedAdapter(adapter), "portable")
    four = (rows[0], 1 + rows[1], rows[2], 1 + rows[3])
    for channels, message in ((ours.rank + 1, "must fill vectors"), (ours.rank + 4, "expected")):
        with pytest.raises(ValueError, match=message):
            ours(x.clone(), four, torch.zeros(1, 4, 4, channels), 0, own_mean)


@pytest.mark.parametrize("isa", [ISAS[0][0], *PAIRED])
def test_a_map_of_inputs_of_another_dtype_is_refused(isa: str) -> None:
    block, x, rows, adapter, y = drawn((1, 32, 4, 4), 0.0, adapted=True)
    assert adapter is not None
    merged = MergedAdapter(adapter)
    ours = CpuBlock(block, merged, isa)
    condition = CpuPictureMap(*merged.condition(ours.residual_bias, ours.rank), isa, of_inputs=True)(y)
    four = (rows[0], 1 + rows[1], rows[2], 1 + rows[3])
    expected = "float32" if condition.dtype == torch.float32 else "int16, the bits of bfloat16 numbers"
    for wrong in (condition.half(), condition.bfloat16() if expected == "float32" else condition.float()):
        with pytest.raises(TypeError, match=f"condition: expected a contiguous array of {expected}"):
            ours(x.clone(), four, wrong, 0, own_mean)


def test_fused_says_which_blocks_run_and_falls_back_to_pytorch(
    random_model: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = random_model()
    steps = make_steps(config, 2)
    plan, why = choose_backend("fused", model, steps, torch.device("cpu"), "float32")
    assert isinstance(plan, Plan) and plan.form == "native"
    assert why.endswith(f"C++ blocks for {native_form(model, torch.float32)}")
    plan, why = choose_backend("fused", model, steps, torch.device("cpu"), "bfloat16")
    assert isinstance(plan, Plan) and plan.form == ("native" if native_form(model, torch.bfloat16) else "folded")
    assert why.endswith(f"C++ blocks for {PAIRED[0]}" if plan.form == "native" else "blocks in PyTorch")
    odd, odd_config = random_model(width=18, adapter_ratio=0.5)
    plan, why = choose_backend("fused", odd, make_steps(odd_config, 2), torch.device("cpu"), "float32")
    assert isinstance(plan, Plan) and plan.form == "folded" and why.endswith("blocks in PyTorch")
    narrow, narrow_config = random_model(predictor_width=18)  # the predictor alone fills no vector
    plan, why = choose_backend("fused", narrow, make_steps(narrow_config, 2), torch.device("cpu"), "float32")
    assert isinstance(plan, Plan) and plan.form == "folded" and why.endswith("blocks in PyTorch")
    with pytest.raises(ValueError, match="cannot run 18 channels"):
        Plan(odd, make_steps(odd_config, 2), form="native")
    monkeypatch.setattr(cpu_unet, "_nafnet", None)
    plan, why = choose_backend("fused", model, steps, torch.device("cpu"), "float32")
    assert isinstance(plan, Plan) and plan.form == "folded" and why.endswith("blocks in PyTorch")


def test_shipped_presets_fill_vectors() -> None:
    for preset in ("tiny", "light", "base"):
        config = Config.of(preset=preset).model
        assert instruction_set(torch.float32, config.width, config.predictor_width) is not None


def test_maps_are_kept_for_the_next_call_and_no_longer():
    with scratch.kept():
        first = scratch.map("gated", 1, 4, 4, 8)
        with scratch.kept():
            assert scratch.map("gated", 1, 2, 2, 8).data_ptr() == first.data_ptr()
        assert scratch.map("gated", 1, 4, 4, 8).data_ptr() == first.data_ptr()
        assert scratch.map("down0", 1, 4, 4, 8).data_ptr() != first.data_ptr()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(scratch.map, "gated", 1, 4, 4, 8).result().data_ptr() != first.data_ptr()
    assert not scratch.maps
