"""The fused block: oracle and equations, Triton kernels by the rule, gradients, registration, compile, errors."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dtpm_fast.kernels import Adapter, BlockWeights, adaln, block_weights, denoising_block, merge_conv5, simple_gate
from dtpm_fast.kernels.block import _block, _block_backward, _block_train, denoising_block_ref
from dtpm_fast.kernels.block_compute import (
    Modulation,
    _conv1x1_weight,
    adaln_conv1x1,
    conv5_adapter,
    dwconv_gate_pool,
    wide,
)
from dtpm_fast.kernels.device import INTERPRETED
from dtpm_fast.kernels.dispatch import WIDE, Table, table, using_table
from dtpm_fast.model.block import DenoisingBlock, use_kernels

NAMES = ["out", "x", "shift1", "scale1", "shift2", "scale2", *BlockWeights._fields]
EPS = 0.01  # another than the default: one that is not passed on would not be seen
# Of the table that fuses everything: in float32 too, at 48 channels, no more than sm_86 and sm_89 have.
TILE = {"BLOCK_P": 16, "num_warps": 8, "num_stages": 1}
FUSED = ["adaln_conv1x1_forward", "adaln_conv1x1_backward", "attention_ffn_forward", "ffn_backward", "conv3_backward"]


def random_inputs(
    samples: int, channels: int, height: int, width: int, offset: float = 0.0, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """x, the modulation (chunks of one tensor, as a block's linear map gives them), and the weights."""
    x = (torch.randn(samples, channels, height, width) + offset).to(memory_format=torch.channels_last)
    convolutions = [(2, channels, 1), (2, 1, 3), (1, channels, 1), (1, channels, 1), (2, channels, 1), (1, channels, 1)]
    weights: list[Tensor] = []
    for outputs, inputs, side in convolutions:
        fan_in = inputs * side**2
        weights.append(torch.randn(outputs * channels, inputs, side, side) / fan_in**0.5)
        weights.append(torch.randn(outputs * channels))
    weights += [torch.randn(1, channels, 1, 1) for _ in range(2)]
    x, rows, *weights = (tensor.to(device, dtype) for tensor in (x, torch.randn(samples, 4 * channels), *weights))
    return [x, *rows.chunk(4, dim=1), *weights]


def random_adapter(samples: int, channels: int, rank: int, height: int, width: int) -> list[Tensor]:
    """M_in, M_out and the condition."""
    m_in, m_out = torch.randn(rank, channels) / channels**0.5, torch.randn(channels, rank) / rank**0.5
    return [m_in, m_out, torch.randn(samples, rank, height, width)]


def call(function: Callable[..., Tensor], inputs: list[Tensor], eps: float = EPS) -> Tensor:
    adapter = Adapter(*inputs[19:]) if inputs[19:] else None
    return function(*inputs[:5], BlockWeights(*inputs[5:19]), adapter, eps)


def run(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, kind: torch.dtype, eps: float = EPS
) -> list[Tensor]:
    inputs = [tensor.detach().to(kind).requires_grad_() for tensor in inputs]
    out = call(function, inputs, eps)
    return [out, *torch.autograd.grad(out, inputs, grad.to(kind))]


@pytest.fixture(params=["recorded", "fused", "wide", "parts"])
def kernels(request: pytest.FixtureRequest, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The recorded dispatch table; one that fuses everything, in smaller tiles; one whose forward is that of many
    channels, and which fuses nothing else; and one that fuses what it must. The second has strips of several rows,
    sums of many programs and programs of several tiles, which only large maps have otherwise."""
    recorded = table()
    if request.param != "fused" and dtype == torch.float32:
        pytest.skip("in float32 the recorded table fuses what it must, whose algebra is checked in float64")
    strip = {"GROUPS": 4, "COLUMNS": 2, "BLOCK_C": 64, "ROWS": 8}
    product = {"BLOCK_P": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4}
    own = dict.fromkeys(WIDE, product) | {FUSED[0]: TILE | {"BLOCK_N": 32}}
    wanted = {"fused": FUSED, "wide": WIDE, "parts": ()}
    entries: Table = {}
    for name, entry in recorded.items():
        if request.param == "recorded" or (request.param != "fused" and name not in FUSED and name not in WIDE):
            entries[name] = entry
        elif (name in FUSED or name in WIDE) and name not in wanted[request.param]:
            entries[name] = []
        else:
            options = own.get(name, TILE if name in FUSED else strip)
            entries[name] = [{"channels": 1024, "bits": bits, "options": options} for bits in (16, 32)]
    monkeypatch.setattr("dtpm_fast.kernels.wide_conv1x1_triton.FEWEST_PROGRAMS", 1)
    if request.param == "fused":
        monkeypatch.setattr("dtpm_fast.kernels.dwconv_triton.FEWEST_PROGRAMS", 1)
        monkeypatch.setattr("dtpm_fast.kernels.channel_attention_triton.MOST_PROGRAMS", 1)
        for module in ("adaln_conv1x1_triton", "attention_ffn_triton"):
            monkeypatch.setattr(f"dtpm_fast.kernels.{module}.programs_per_sample", _two_programs)
    with using_table(entries):
        yield request.param


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
def test_the_largest_fused_tile_fits_every_gpu() -> None:
    from dtpm_fast.kernels import attention_ffn_triton, compilation

    constants = {"CHANNELS": 48, "BLOCK_C": 64, "FROZEN": False}
    case = compilation.Case(attention_ffn_triton.ffn_backward_kernel, 48, torch.float32, constants, TILE)
    assert compilation.compile_case(case, 80).shared_bytes <= 99 * 1024


def _two_programs(tiles: int, samples: int, total: int) -> int:
    return min(tiles, 2)


# In the interpreter without an eps, of pixels behind the last one, which no kernel may store or add up.
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered in:RuntimeWarning")
@pytest.mark.parametrize(("shape", "offset", "eps"), [((1, 48, 9, 7), 0.0, 0.0), ((3, 32, 5, 7), 100.0, EPS)])
def test_triton_by_the_rule(
    device: str,
    dtype: torch.dtype,
    kernels: str,
    shape: tuple[int, int, int, int],
    offset: float,
    eps: float,
    assert_as_exact_as_eager: Callable[..., None],
) -> None:
    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = random_inputs(*shape, offset, device, dtype)
        grad = torch.randn(shape).to(device, dtype)
        ours = run(denoising_block, inputs, grad, dtype, eps)
        assert ours[0].is_contiguous(memory_format=torch.channels_last)
        if (kernels == "fused" or device == "cuda") and dtype != torch.float32:
            again = run(denoising_block, inputs, grad, dtype, eps)
            assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        eager = run(denoising_block_ref, inputs, grad, dtype, eps)
        return ours, eager, run(denoising_block_ref, inputs, grad, torch.float64, eps)

    assert_as_exact_as_eager(draw, NAMES)


def test_triton_with_frozen_weights_by_the_rule(
    device: str, dtype: torch.dtype, kernels: str, assert_as_exact_as_eager: Callable[..., None]
) -> None:
    shape = (3, 32, 5, 7)

    def trained(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, kind: torch.dtype) -> list[Tensor]:
        first = [tensor.detach().to(kind).requires_grad_() for tensor in inputs[:5]]
        out = call(function, [*first, *(tensor.to(kind) for tensor in inputs[5:])])
        return [out, *torch.autograd.grad(out, first, grad.to(kind))]

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = random_inputs(*shape, 1.0, device, dtype)
        for place in (1, 3):  # shifts that the samples share, of no stride, beside scales that they do not
            inputs[place] = inputs[place][:1].expand(3, -1)
        grad = torch.randn(shape).to(device, dtype)
        ours = trained(denoising_block, inputs, grad, dtype)
        return (
            ours,
            trained(denoising_block_ref, inputs, grad, dtype),
            trained(denoising_block_ref, inputs, grad, torch.float64),
        )

    assert_as_exact_as_eager(draw, NAMES[:6])


@pytest.mark.parametrize(("channels", "rank"), [(16, 4), (48, 12), (32, 20)])
def test_triton_with_an_adapter(
    device: str,
    dtype: torch.dtype,
    kernels: str,
    channels: int,
    rank: int,
    assert_as_exact_as_eager: Callable[..., None],
) -> None:
    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = random_inputs(2, channels, 5, 3, 0.0, device, dtype)
        inputs[0] = inputs[0].contiguous()  # NCHW, as the condition
        inputs += [tensor.to(device, dtype) for tensor in random_adapter(2, channels, rank, 5, 3)]
        grad = torch.randn(2, channels, 5, 3).to(device, dtype)
        results = []
        for function, kind in (
            (denoising_block, dtype),
            (denoising_block_ref, dtype),
            (denoising_block_ref, torch.float64),
        ):
            with torch.no_grad():
                inference = call(function, [tensor.to(kind) for tensor in inputs])
            results.append([inference, *run(function, inputs, grad, kind)[-3:]])
        return results[0], results[1], results[2]

    assert_as_exact_as_eager(draw, ["out", "m_in", "m_out", "condition"])


def test_triton_takes_the_merged_conv5_that_it_is_given(device: str) -> None:
    """Of many channels; as exact as one made in the call, and in use: another gives another result."""
    inputs = random_inputs(2, 24, 5, 3, 0.0, device, torch.float16)
    m_in, m_out, condition = (tensor.to(device, torch.float16) for tensor in random_adapter(2, 24, 6, 5, 3))
    tile = {"BLOCK_P": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    entries = {"wide_conv1x1_adapter": [{"channels": 1024, "bits": 16, "options": tile}], "attention_ffn_forward": []}
    weights = BlockWeights(*inputs[5:])
    merged = merge_conv5(weights.conv5_weight, weights.conv5_bias, weights.gamma, m_in, m_out)
    with using_table(table() | entries), torch.no_grad():
        made, given, other = (
            denoising_block(*inputs[:5], weights, Adapter(m_in, m_out, condition, merge), EPS)
            for merge in (None, merged, merged._replace(bias=merged.bias + 1))
        )
    assert torch.equal(given, made)
    torch.testing.assert_close(other, given + 1, rtol=1e-2, atol=1e-2)


def test_triton_compiles_without_a_graph_break(device: str) -> None:
    inputs = [tensor.to(device).requires_grad_() for tensor in random_inputs(1, 16, 5, 3)]
    compiled = torch.compile(
        lambda *tensors: call(denoising_block, list(tensors)).square().sum(), fullgraph=True, backend="aot_eager"
    )
    expected = torch.autograd.grad(call(denoising_block, inputs).square().sum(), inputs)
    # What the fake function promises, and Inductor asserts.
    assert [grad.stride() for grad in expected[5:]] == [weight.stride() for weight in inputs[5:]]
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)
    frozen = [tensor.detach() for tensor in inputs[5:]]
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs[:5], *frozen), inputs[:5]), expected[:5])


def test_triton_under_activation_checkpointing_and_autocast(device: str) -> None:
    inputs = [tensor.to(device).requires_grad_() for tensor in random_inputs(1, 16, 5, 3)]
    m_in, m_out, condition = (tensor.to(device) for tensor in random_adapter(1, 16, 4, 5, 3))
    with torch.autocast(device, torch.float16):
        out = checkpoint(lambda *tensors: call(denoising_block, list(tensors)), *inputs, use_reentrant=False)
        expected = call(denoising_block, inputs)
        adapted = call(denoising_block, [*inputs, m_in, m_out, condition])
    assert out.dtype == adapted.dtype == torch.float16
    inside = F.conv2d(expected, m_in.half()[:, :, None, None]) + condition.half()
    wanted_map = expected + F.conv2d(inside, m_out.half()[:, :, None, None])
    torch.testing.assert_close(adapted, wanted_map, rtol=1e-2, atol=1e-1)
    grads, wanted = (torch.autograd.grad(result.float().sum(), inputs) for result in (out, expected))
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_triton_gives_each_argument_alone_its_gradient(device: str) -> None:
    """What else requires one decides neither whether there is a gradient nor what it is."""
    inputs = [tensor.to(device) for tensor in random_inputs(1, 16, 4, 3)]
    inputs += [tensor.to(device) for tensor in random_adapter(1, 16, 4, 4, 3)]
    grad = torch.randn(1, 16, 4, 3, device=device)
    out, *together = run(denoising_block, inputs, grad, torch.float32)
    for place in (0, 2, 7, 18, 19, 20, 21):  # x, scale1, conv2's weight, gamma, the adapter's three
        alone = [tensor.detach().requires_grad_(i == place) for i, tensor in enumerate(inputs)]
        found = call(denoising_block, alone)
        torch.testing.assert_close(found, out, rtol=1e-3, atol=1e-3)
        (found,) = torch.autograd.grad(found, alone[place], grad)
        torch.testing.assert_close(found, together[place], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 16, 1, 9), (1, 16, 6, 1), (2, 16, 3, 37)])
def test_triton_on_lines_points_and_several_strips(device: str, shape: tuple[int, int, int, int]) -> None:
    """One pixel, row or column: contiguous and channels_last are the same then, and Triton makes the 1 a constant. The
    last map is wider than a strip of any of the 3×3's kernels, and higher than one."""
    inputs = random_inputs(*shape, 0.0, device)
    grad = torch.randn(shape).to(device)
    for ours, exact in zip(
        run(denoising_block, inputs, grad, torch.float32),
        run(denoising_block_ref, inputs, grad, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-3, atol=1e-3)


def test_triton_under_ddp(device: str, tmp_path: Path) -> None:
    """Gradients arrive in DDP's buckets as they do without it."""
    torch.manual_seed(0)
    block = DenoisingBlock(16, 8)
    nn.init.normal_(block.modulation.weight)
    nn.init.normal_(block.beta)
    block = block.to(device, memory_format=torch.channels_last)
    use_kernels(block)
    x, e = torch.randn(1, 16, 3, 4, device=device), torch.randn(1, 8, device=device)
    alone = torch.autograd.grad(block(x, e).square().sum(), [*block.parameters()])
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        DistributedDataParallel(block)(x, e).square().sum().backward()
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close([parameter.grad for parameter in block.parameters()], [*alone])


@pytest.mark.gpu
def test_triton_under_inductor() -> None:
    inputs = [tensor.to("cuda").requires_grad_() for tensor in random_inputs(1, 16, 5, 3)]
    compiled = torch.compile(lambda *tensors: call(denoising_block, list(tensors)).square().sum(), fullgraph=True)
    expected = torch.autograd.grad(call(denoising_block, inputs).square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "adapted"), [(64, False), (64, True), (256, True)])
def test_triton_in_a_captured_graph(channels: int, adapted: bool) -> None:
    """No allocation or wait on the host that a CUDA graph refuses; a replay is bit-equal and reads new inputs."""
    inputs = random_inputs(3, channels, 40, 24)
    if adapted:
        inputs += random_adapter(3, channels, channels // 4, 40, 24)
        inputs[-1] = inputs[-1].to(memory_format=torch.channels_last)
    inputs = [tensor.to("cuda", torch.bfloat16) for tensor in inputs]
    if adapted:  # with its merged conv5, as the sampler gives it
        inputs.append(merge_conv5(*inputs[15:17], inputs[18], *inputs[19:21]))
    with torch.no_grad():
        call(denoising_block, inputs)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(denoising_block, inputs)
        inputs[0].copy_(torch.randn_like(inputs[0]))
        graph.replay()
        assert torch.equal(out, call(denoising_block, inputs))


@pytest.mark.gpu
def test_triton_beyond_32_bit_offsets() -> None:
    """Maps of more than 2^31 elements: the last rows are what the same rows of a small map give."""
    channels, height, width, rows = 64, 8200, 4100, 24
    x = torch.empty(1, channels, height, width, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    x.normal_()
    modulation, weights = [], []
    for place, tensor in enumerate(random_inputs(1, channels, 1, 1)[1:]):
        (modulation if place < 4 else weights).append(tensor.to("cuda", torch.bfloat16))
    w = BlockWeights(*weights)
    last = x[:, :, -rows:].contiguous(memory_format=torch.channels_last)
    h, h_last = (adaln_conv1x1(tensor, Modulation(*modulation), w, 1e-6) for tensor in (x, last))
    assert h.numel() > 2**31
    assert torch.equal(h[:, :, -rows:], h_last)
    g, g_last = (dwconv_gate_pool(tensor, w)[0] for tensor in (h, h_last))
    assert torch.equal(g[:, :, 1 - rows :], g_last[:, :, 1:])  # the first row lacks its neighbour above
    for function, full, part in ((simple_gate, h, h_last), (lambda t: adaln(t, *modulation[:2]), x, last)):
        assert torch.equal(function(full)[:, :, -rows:], function(part))


@pytest.mark.gpu
def test_triton_of_many_channels_beyond_32_bit_offsets() -> None:
    """As above, of the products of many channels, whatever the table in use leaves to cuBLAS."""
    channels, height, width, rows = 256, 4100, 2060, 24
    x = torch.empty(1, channels, height, width, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    x.normal_()
    assert x.numel() > 2**31
    _, *small = (tensor.to("cuda", torch.bfloat16) for tensor in random_inputs(1, channels, 1, 1))
    modulation, w = Modulation(*small[:4]), BlockWeights(*small[4:])
    m_in, m_out, _ = (tensor.to("cuda", torch.bfloat16) for tensor in random_adapter(1, channels, 64, 1, 1))
    condition = torch.empty_like(x[:, :64], memory_format=torch.channels_last).normal_()
    attention = torch.randn(1, channels, device="cuda")
    conv3, conv4, conv5 = (w[6:8], w[8:10], w[10:12])
    shift_and_scale = modulation.shift2, modulation.scale2, 1e-6

    def conv3_of(t: Tensor, _: Tensor) -> Tensor:
        return wide("wide_attention_conv1x1_residual", t, *conv3, attention=attention, residual=t, factor=w.beta)

    def conv4_of(t: Tensor, _: Tensor) -> Tensor:
        return wide("wide_adaln_conv1x1_gate", t, *conv4, adaln=shift_and_scale, gate=True)

    def adapter_of(t: Tensor, condition: Tensor) -> Tensor:
        return conv5_adapter(t, t, conv5, w.gamma, Adapter(m_in, m_out, condition))

    last, last_condition = (t[:, :, -rows:].contiguous(memory_format=torch.channels_last) for t in (x, condition))
    tile = {"BLOCK_P": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    entries = {name: [{"channels": channels, "bits": 16, "options": tile}] for name in WIDE}
    first = {name: [] for name in WIDE.values()}
    with using_table(table() | first | entries):
        for function in (lambda t, _: adaln_conv1x1(t, modulation, w, 1e-6), conv3_of, conv4_of, adapter_of):
            assert torch.equal(function(x, condition)[:, :, -rows:], function(last, last_condition))


def test_oracle_is_the_equations() -> None:
    x, shift1, scale1, shift2, scale2, *weights = (tensor.double() for tensor in random_inputs(2, 6, 5, 4, 100.0))
    w = BlockWeights(*weights)

    def norm(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = value - value.mean(1, keepdim=True)
        normal = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return normal * (1 + scale)[:, :, None, None] + shift[:, :, None, None]

    def conv(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], value) + bias[:, None, None]

    h = conv(norm(x, shift1, scale1), w.conv1_weight, w.conv1_bias)
    padded = F.pad(h, (1, 1, 1, 1))
    h = w.conv2_bias[:, None, None] + sum(
        w.conv2_weight[:, 0, i, j, None, None] * padded[:, :, i : i + 5, j : j + 4] for i in range(3) for j in range(3)
    )
    h = h[:, :6] * h[:, 6:]
    h = h * conv(h.mean((2, 3), keepdim=True), w.sca_weight, w.sca_bias)
    y = x + w.beta * conv(h, w.conv3_weight, w.conv3_bias)
    h = conv(norm(y, shift2, scale2), w.conv4_weight, w.conv4_bias)
    z = y + w.gamma * conv(h[:, :6] * h[:, 6:], w.conv5_weight, w.conv5_bias)
    torch.testing.assert_close(denoising_block(x, shift1, scale1, shift2, scale2, w), z)
    m_in, m_out, condition = (tensor.double() for tensor in random_adapter(2, 6, 2, 5, 4))
    inside = torch.einsum("rc,bchw->brhw", m_in, z) + condition
    wanted_map = z + torch.einsum("cr,brhw->bchw", m_out, inside)
    adapted = denoising_block(x, shift1, scale1, shift2, scale2, w, Adapter(m_in, m_out, condition))
    torch.testing.assert_close(adapted, wanted_map)
    # and conv5 multiplied out with it
    weight, bias, matrix = merge_conv5(w.conv5_weight, w.conv5_bias, w.gamma, m_in, m_out)
    gated = h[:, :6] * h[:, 6:]
    parts = zip((weight, matrix, m_out), (gated, y, condition), strict=True)
    products = [torch.einsum("oc,bchw->bohw", factor, value) for factor, value in parts]
    torch.testing.assert_close(y + bias[:, None, None] + sum(products), wanted_map)


def test_written_out_gradients_are_the_oracles() -> None:
    inputs = [tensor.double().requires_grad_() for tensor in random_inputs(2, 4, 3, 5)]

    def registered(*tensors: Tensor) -> Tensor:
        return _block_train(tensors[0], list(tensors[1:5]), list(tensors[5:]), EPS)[0]

    torch.testing.assert_close(registered(*inputs), call(denoising_block, inputs))
    assert torch.autograd.gradcheck(registered, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *tensors: call(denoising_block, list(tensors)), inputs, fast_mode=True)
    frozen = [tensor.detach() for tensor in inputs[5:]]
    assert torch.autograd.gradcheck(lambda *tensors: registered(*tensors, *frozen), inputs[:5], fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
def test_opcheck() -> None:
    inputs = random_inputs(2, 4, 3, 5)
    x, modulation, weights = inputs[0], inputs[1:5], inputs[5:]
    for adapter in ([], random_adapter(2, 4, 2, 3, 5)):
        torch.library.opcheck(_block, (x, modulation, weights, adapter, 1e-6))
    _, y, g, mean = _block_train(x, modulation, weights, 1e-6)
    for frozen in (False, True):
        torch.library.opcheck(_block_backward, (torch.randn(x.shape), x, y, g, mean, modulation, weights, 1e-6, frozen))
    for tensor in (x, *weights):
        tensor.requires_grad_()
    torch.library.opcheck(_block_train, (x, modulation, weights, 1e-6))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
def test_what_the_kernels_return_is_what_was_registered() -> None:
    inputs = random_inputs(2, 16, 3, 5, 0.0, "cuda", torch.bfloat16)
    x, modulation, weights = inputs[0], inputs[1:5], inputs[5:]
    adapter = [tensor.cuda().bfloat16() for tensor in random_adapter(2, 16, 4, 3, 5)]
    adapter[2] = adapter[2].to(memory_format=torch.channels_last)
    _, y, g, mean = _block_train(x, modulation, weights, 1e-6)
    for operation, given in (
        (_block, (x, modulation, weights, adapter, 1e-6)),
        (_block_train, (x, modulation, weights, 1e-6)),
        *((_block_backward, (x * 2, x, y, g, mean, modulation, weights, 1e-6, frozen)) for frozen in (False, True)),
    ):
        torch.library.opcheck(operation, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_gradients_of_many_pixels_have_float32_sums(
    dtype: torch.dtype, assert_as_exact_as_eager: Callable[..., None]
) -> None:
    """So many that cuBLAS splits the sum."""

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        grad, x = (torch.randn(8, 128, 128, 128, device="cuda").to(dtype) for _ in range(2))
        grad, x = (tensor.to(memory_format=torch.channels_last) for tensor in (grad, x))

        def exact(number: torch.dtype) -> Tensor:
            weight = torch.zeros(128, 128, 1, 1, device="cuda", dtype=number, requires_grad=True)
            return torch.autograd.grad(F.conv2d(x.to(number), weight), weight, grad.to(number))[0].flatten(1)

        return [_conv1x1_weight(grad, x).to(dtype)], [exact(dtype)], [exact(torch.float64)]

    assert_as_exact_as_eager(draw, ["weight.grad"])


def test_errors_name_the_argument() -> None:
    inputs = random_inputs(2, 4, 6, 5)
    weights = BlockWeights(*inputs[5:])

    def block(**changes: Tensor | BlockWeights | Adapter) -> Tensor:
        arguments = dict(zip(["x", "shift1", "scale1", "shift2", "scale2"], inputs, strict=False)) | {
            "weights": weights
        }
        return denoising_block(**(arguments | changes))

    with pytest.raises(ValueError, match="x has strides"):
        block(x=inputs[0][..., ::2])
    with pytest.raises(TypeError, match="conv1_weight is float32 but the input is float64"):
        block(x=inputs[0].double())
    with pytest.raises(ValueError, match=r"scale2 must have shape \(B, C\) = \(2, 4\)"):
        block(scale2=torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"conv2_weight must have shape \(8, 1, 3, 3\)"):
        block(weights=weights._replace(conv2_weight=weights.conv1_weight))
    with pytest.raises(ValueError, match=r"beta must have shape \(1, 4, 1, 1\)"):
        block(weights=weights._replace(beta=weights.beta.flatten()))
    with pytest.raises(ValueError, match="gamma is on meta"):
        block(weights=weights._replace(gamma=weights.gamma.to("meta")))
    adapter = Adapter(*random_adapter(2, 4, 2, 6, 5))
    merged = merge_conv5(weights.conv5_weight, weights.conv5_bias, weights.gamma, *adapter[:2])
    for wrong, message in (
        (adapter._replace(m_in=torch.randn(2, 8)), r"adapter\.m_in must have shape \(4, 4\)"),
        (adapter._replace(m_in=torch.tensor(1.0)), r"adapter\.m_in must have shape \(0, 4\)"),
        (adapter._replace(m_out=torch.randn(4, 3)), r"adapter\.m_out must have shape \(4, 2\)"),
        (adapter._replace(condition=torch.randn(1, 2, 6, 5)), r"adapter\.condition must be \(2, 2, 6, 5\)"),
        (adapter._replace(condition=torch.randn(2, 2, 6, 5).half()), r"adapter\.condition must be"),
        (
            adapter._replace(merged=merged._replace(bias=torch.randn(3))),
            r"adapter\.merged\.bias must have shape \(4,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            block(adapter=wrong)
    for wrong, message in (
        (
            (torch.randn(4, 4), torch.randn(2, 4, 6, 5)),
            r"adapter must be an Adapter\(.*, not tuple",
        ),
        (adapter._replace(m_in=[[1.0]]), r"adapter\.m_in must be a tensor, not list"),
    ):
        with pytest.raises(TypeError, match=message):
            block(adapter=wrong)
    with pytest.raises(ValueError, match=r"no parameter conv1\.weight"):
        block_weights(nn.Linear(2, 2))
