"""The kernels against eager PyTorch and torch.compile, side by side in one run.

    pytest benchmarks/bench_kernels.py --benchmark-only --benchmark-json=benchmarks/results/kernels.json
    pytest benchmarks/bench_kernels.py --benchmark-only -k "block and 64 and bfloat16"

A case's own time is the fused form's. Its extra_info holds, for every form, the 20/50/80 quantiles in milliseconds, the
peak memory, and the ratio to the fused form; for the fused form also the predicted bytes and the share of the copy
bandwidth measured in the same process; and the device and versions. Rounds are interleaved, with a cold L2 cache.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dtpm_fast.kernels import BlockWeights, adaln, channel_attention, denoising_block, simple_gate
from dtpm_fast.kernels.adaln import adaln_ref
from dtpm_fast.kernels.block import denoising_block_ref
from dtpm_fast.kernels.channel_attention import channel_attention_ref
from dtpm_fast.kernels.simple_gate import simple_gate_ref
from dtpm_fast.kernels.traffic import BACKWARD, FORWARD, TRAINING_FORWARD, block_inputs, total

pytestmark = pytest.mark.filterwarnings("default")  # the compilers' advice on settings fails no measurement
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels' speed is a GPU's")

BATCH, ROUNDS = 8, 30
CHANNELS = (32, 64, 128, 256, 512)
DIRECTIONS = ("forward", "backward", "both")


def block_ref(*inputs: Tensor) -> Tensor:
    return denoising_block_ref(*inputs[:5], BlockWeights(*inputs[5:]))


def block(*inputs: Tensor) -> Tensor:
    return denoising_block(*inputs[:5], BlockWeights(*inputs[5:]))


# Oracle, fused form, which of the block's inputs they take, and maps of C channels that each direction moves.
OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[int], dict[str, int]]] = {
    "adaln": (adaln_ref, adaln, [0, 1, 2], {"forward": 2, "backward": 3}),
    "simple_gate": (simple_gate_ref, simple_gate, [0], {"forward": 3, "backward": 5}),
    "channel_attention": (channel_attention_ref, channel_attention, [0, 9, 10], {"forward": 3, "backward": 4}),
    "block": (block_ref, block, [*range(19)], {"forward": total(TRAINING_FORWARD), "backward": total(BACKWARD)}),
}


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_training(benchmark: BenchmarkFixture, operation: str, direction: str, channels: int, dtype: str) -> None:
    """The operation with gradients for all of its inputs."""
    reference, fused, places, maps = OPERATIONS[operation]
    side = 256 * 64 // channels  # the presets' shapes: 256² at 64 channels, halved with every doubling
    inputs = block_inputs(BATCH, channels, side, side, getattr(torch, dtype), "cuda")
    inputs = [inputs[place].detach().requires_grad_() for place in places]
    unit = inputs[0].numel() * inputs[0].element_size()
    if operation == "simple_gate":  # it halves its input
        inputs = [torch.cat((inputs[0], inputs[0]), 1).detach().requires_grad_()]
    nchw = [tensor.detach().contiguous().requires_grad_() for tensor in inputs]
    forms = {
        "fused": _step(fused, inputs, direction),
        "eager": _step(reference, nchw, direction),
        "eager channels_last": _step(reference, inputs, direction),
        "compile": _step(_compiled(reference), inputs, direction),
        "compile max-autotune": _step(_compiled(reference, "max-autotune-no-cudagraphs"), inputs, direction),
    }
    moved = maps["forward"] + maps["backward"] if direction == "both" else maps[direction]
    _record(benchmark, forms, moved * unit)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_block_inference(benchmark: BenchmarkFixture, channels: int, dtype: str) -> None:
    """The block's forward as the sampler runs it: nothing is kept."""
    side = 256 * 64 // channels
    inputs = block_inputs(BATCH, channels, side, side, getattr(torch, dtype), "cuda")
    nchw = [tensor.contiguous() for tensor in inputs]
    forms = {
        "fused": functools.partial(block, *inputs),
        "eager": functools.partial(block_ref, *nchw),
        "eager channels_last": functools.partial(block_ref, *inputs),
        "compile": functools.partial(_compiled(block_ref), *inputs),
        "compile max-autotune": functools.partial(_compiled(block_ref, "max-autotune-no-cudagraphs"), *inputs),
    }
    with torch.no_grad():
        _record(benchmark, forms, total(FORWARD) * inputs[0].numel() * inputs[0].element_size())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_block_on_the_cpu(benchmark: BenchmarkFixture, layout: str) -> None:
    """The oracle, which is what CPU tensors run, in both layouts: C = 32, 64²."""
    inputs = block_inputs(1, 32, 64, 64, torch.float32, "cpu")
    inputs[0] = inputs[0].contiguous(memory_format=getattr(torch, layout + "_format" * (layout == "contiguous")))
    with torch.no_grad():
        benchmark(block, *inputs)


def _compiled(function: Callable[..., Tensor], mode: str = "default") -> Callable[..., Tensor]:
    """For one shape: what another case compiled must not make it compile for any shape."""
    torch.compiler.reset()
    return torch.compile(lambda *inputs: function(*inputs), mode=mode, dynamic=False)


def _step(function: Callable[..., Tensor], inputs: list[Tensor], direction: str) -> Callable[[], Any]:
    if direction == "forward":
        return functools.partial(function, *inputs)
    grad = torch.randn_like(function(*inputs))
    if direction == "backward":
        out = function(*inputs)
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def _record(benchmark: BenchmarkFixture, forms: dict[str, Callable[[], Any]], predicted_bytes: int) -> None:
    peaks = {name: _peak_memory(step) for name, step in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for name, milliseconds in _interleaved(forms):
        times[name].append(milliseconds)
    ours = statistics.median(times["fused"])
    for name, values in times.items():
        fifths = statistics.quantiles(values, n=5)
        benchmark.extra_info[name] = {
            "ms_20_50_80": [round(value, 4) for value in (fifths[0], statistics.median(values), fifths[3])],
            "times_fused": round(statistics.median(values) / ours, 3),
            "peak_MiB": round(peaks[name] / 2**20, 1),
        }
    bandwidth = _copy_bandwidth()
    benchmark.extra_info |= {
        "predicted_MB": round(predicted_bytes / 1e6, 1),
        "share_of_copy_bandwidth": round(predicted_bytes / (ours * 1e-3) / bandwidth, 3),
        "copy_GB_per_s": round(bandwidth / 1e9),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }

    def once() -> None:
        forms["fused"]()
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=5)


def _interleaved(forms: dict[str, Callable[[], Any]]) -> Iterator[tuple[str, float]]:
    """Milliseconds of each form, turn by turn, the L2 cache overwritten before each."""
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than any L2
    for step in forms.values():
        for _ in range(5):
            step()
    for _ in range(ROUNDS):
        for name, step in forms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            yield name, start.elapsed_time(end)


def _peak_memory(step: Callable[[], Any]) -> int:
    """Bytes that one step takes on top of what is allocated already."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def _copy_bandwidth() -> float:
    """Bytes a second of a device copy, read and written, median of the rounds."""
    source = torch.empty(2**28, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    values = [seconds for _, seconds in _interleaved({"copy": lambda: target.copy_(source)})]
    return 2 * source.numel() / (statistics.median(values) * 1e-3)
