"""What a GPU would be given, seen without one: PyTorch's fake tensors say that they lie on CUDA, and have shapes only.

Operators run on them as on a GPU as far as devices and shapes go. So a tensor that was left on the CPU, a copy between
the two, and a wait for a value show here; a captured graph would allow none of the three. The launches are counted,
because a small picture takes as long as they are many.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from dtpm_fast.kernels import Adapter, MergedConv5, dwconv_triton, tune, wide_conv1x1_triton
from dtpm_fast.kernels.block_compute import BlockWeights, Modulation, block_backward, block_forward
from dtpm_fast.kernels.device import INTERPRETED
from dtpm_fast.kernels.dispatch import ALWAYS, WIDE, table, using_table
from dtpm_fast.model.block import use_kernels
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.sampler import Steps, make_steps
from dtpm_fast.training.ema import EMA
from dtpm_fast.training.objective import Objective
from dtpm_fast.training.optimizers import make_optimizers

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter runs no kernel on CUDA")


class Launches(TorchDispatchMode):
    """The operators that start work on the device: those with an output that is no view of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given, made = (
            [t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs or {}), result)
        )
        name = str(function).removesuffix(".default")
        assert {t.device.type for t in (*given, *made)} <= {"cuda"}, f"{name} is not on the GPU alone"
        memory = {t.untyped_storage()._cdata for t in given}
        fresh = any(t.untyped_storage()._cdata not in memory for t in made)
        if (fresh or name.split(".")[1].endswith("_")) and not name.startswith(("aten.empty", "aten.new_empty")):
            self.names.append(name)
        return result


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    return FakeTensorMode()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Triton kernels that are launched, by name, none of which runs."""
    launched: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
    return launched


def on_cuda(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cuda")


def move(module: nn.Module) -> None:
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = on_cuda(tensor)
                    tensors[name] = moved if tensors is part._buffers else nn.Parameter(moved, tensor.requires_grad)


@contextmanager
def plan_on_cuda(
    fake: FakeTensorMode, random_model: Callable[..., tuple], form: Any, **settings: Any
) -> Iterator[tuple[Plan, Tensor, Tensor]]:
    """A plan, a picture and noise, inside of the fake mode."""
    model, config = random_model(**settings)
    steps: Steps = make_steps(config, 4)
    with fake, torch.inference_mode():
        move(model)
        steps = replace(steps, gammas=fake.from_tensor(steps.gammas), table=fake.from_tensor(steps.table))
        y_d = torch.empty(2, 3, 48, 64, device="cuda").contiguous(memory_format=torch.channels_last)
        yield Plan(model, steps, torch.bfloat16, form), y_d, torch.empty(1, 3, 48, 64, device="cuda")


@pytest.mark.parametrize("form", ["kernels", "folded"])
@pytest.mark.parametrize(
    "settings",
    [{"semantic_code": "compact"}, {"predictor": "none", "condition": "predicted"}, {"preset": "light", "eta": 0.5}],
    ids=str,
)
def test_a_restoration_stays_on_the_device(
    fake: FakeTensorMode, random_model: Callable[..., tuple], form: str, settings: dict
) -> None:
    with plan_on_cuda(fake, random_model, form, **settings) as (plan, y_d, noise):
        fields = noise.expand(plan.steps.noise_fields, -1, -1, -1)
        with Launches() as launches:
            restored = plan.restore(y_d, fields)
        assert restored.shape == y_d.shape
        assert restored.device.type == "cuda"
    assert launches.names


def test_what_is_launched_around_the_blocks_of_a_step(fake: FakeTensorMode, random_model: Callable[..., tuple]) -> None:
    with plan_on_cuda(fake, random_model, "kernels", preset="light") as (plan, y_d, noise):
        conditions = plan.prepare(y_d)
        x = noise.expand_as(y_d)
        with Launches() as launches:
            plan.step(x, x, 0, conditions)
        blocks = [name for name in launches.names if name == "dtpm_fast.denoising_block"]
        assert len(blocks) == len(plan.step_module.unet.positions)
        resolutions = len(plan.step_module.unet.encoder)
        # The intro's 4, one for the modulation of all blocks, 4 for a change of resolution and back, the ending's 2,
        # the sampler's 3 with the first noise in its layout; and 2 copies to channels_last, which cuDNN's maps are in.
        assert len(launches.names) - len(blocks) <= 12 + 4 * resolutions, launches.names
        assert "dtpm_fast.sampler_update" in launches.names


def test_what_is_launched_before_the_steps_depends_on_the_levels_alone(
    fake: FakeTensorMode, random_model: Callable[..., tuple]
) -> None:
    counts = []
    for blocks in (1, 7):
        settings = {"predictor": "none", "encoder_blocks": (1, blocks), "decoder_blocks": (1, 1)}
        with plan_on_cuda(fake, random_model, "kernels", **settings) as (plan, y_d, _), Launches() as launches:
            plan.prepare(y_d)
            counts.append(len(launches.names))
    assert counts[0] == counts[1]


def inputs(channels: int) -> tuple[Tensor, Modulation, BlockWeights, Adapter]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda")

    c, r = channels, channels // 4
    x, condition = (empty(2, n, 24, 40).to(memory_format=torch.channels_last) for n in (c, r))
    modulation = Modulation(*torch.empty(2, 4 * c, device="cuda").chunk(4, dim=1))
    shapes = [(2 * c, c, 1, 1), (2 * c, 1, 3, 3), (c, c, 1, 1), (c, c, 1, 1), (2 * c, c, 1, 1), (c, c, 1, 1)]
    weights = [empty(*size) for shape in shapes for size in (shape, shape[:1])] + [empty(1, c, 1, 1)] * 2
    adapter = Adapter(empty(r, c), empty(c, r), condition, MergedConv5(empty(c, c), empty(c), empty(c, c)))
    return x, modulation, BlockWeights(*weights), adapter


WIDE_BLOCK = [
    "wide_conv1x1_kernel",
    "dwconv_gate_pool_forward_kernel",
    "attention_kernel",
    *3 * ["wide_conv1x1_kernel"],
]
FUSED_BLOCK = [
    "adaln_conv1x1_forward_kernel",
    "dwconv_gate_pool_forward_kernel",
    "attention_kernel",
    "attention_ffn_forward_kernel",
]


@pytest.mark.parametrize(("channels", "launches"), [(64, FUSED_BLOCK), (512, WIDE_BLOCK)])
@torch.no_grad()
def test_a_block_is_four_launches_and_six_of_many_channels(
    fake: FakeTensorMode, kernels: list[str], channels: int, launches: list[str]
) -> None:
    with fake:
        x, modulation, weights, adapter = inputs(channels)
        with Launches() as others:
            block_forward(x, modulation, weights, adapter, 1e-6, save=False)
    assert kernels == launches
    assert others.names == []


@torch.no_grad()
def test_a_block_whose_products_are_cublas_launches_nothing_for_numbers_of_a_channel(
    fake: FakeTensorMode, kernels: list[str]
) -> None:
    with fake, using_table(table() | {name: [] for name in WIDE}):
        x, modulation, weights, adapter = inputs(512)
        with Launches() as others:
            block_forward(x, modulation, weights, adapter, 1e-6, save=False)
    assert sorted(kernels) == [
        "adaln_forward_kernel",
        "adaln_forward_kernel",
        "attention_kernel",
        "dwconv_gate_pool_forward_kernel",
        "scale_channels_kernel",
        "simple_gate_forward_kernel",
    ]
    products = [name for name in others.names if name in ("aten.linear", "aten.addmm", "aten.mm")]
    assert len(products) == 6, others.names  # of the block four, of the adapter two
    assert set(others.names) - set(products) == {"aten.addcmul"}
    assert len(others.names) == 6 + 2


@pytest.mark.parametrize("channels", [64, 512])
@torch.no_grad()
def test_what_the_tuner_times_is_its_kernel_or_the_form_without(
    fake: FakeTensorMode, kernels: list[str], channels: int
) -> None:
    with fake:
        steps = tune._steps(channels, torch.bfloat16)
        for job in tune.jobs_of((channels,), (16,)):
            name = "wide_conv1x1_kernel" if job.kernel in WIDE else f"{job.kernel}_kernel"
            forms = [*tune.candidates(job)[:1], *([] if job.kernel in ALWAYS else [None])]
            for options in forms:
                kernels.clear()
                with tune._alone(job.kernel, options), Launches() as others:
                    steps[job.kernel]()
                # An adapter's other form is conv5's wide product, and two of cuBLAS behind it.
                behind = job.kernel == "wide_conv1x1_adapter" and options is None
                assert (name in kernels) == (options is not None or behind), job
                assert not behind or others.names.count("aten.addmm") == 2, job
                assert kernels or others.names, job


@pytest.mark.parametrize("channels", [64, 128, 512])
@torch.no_grad()
def test_what_is_compiled_ahead_is_what_the_tuner_times(
    fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    launched: set[tuple[str, frozenset[tuple[str, Any]]]] = set()

    def record(kernel: JITFunction, *_: Any, **given: Any) -> None:
        options = {name: value for name, value in given.items() if name.isupper() or name.startswith("num_")}
        launched.add((kernel.fn.__name__, frozenset(options.items())))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for module in (dwconv_triton, wide_conv1x1_triton):  # `_compile` changes them, in a process of its own
        monkeypatch.setattr(module, "FEWEST_PROGRAMS", module.FEWEST_PROGRAMS)
    with fake:
        steps = tune._steps(channels, torch.bfloat16)
        for job in tune.jobs_of((channels,), (16,)):
            if job.channels != channels:
                continue
            name = "wide_conv1x1_kernel" if job.kernel in WIDE else f"{job.kernel}_kernel"
            launched.clear()
            for options in tune.candidates(job):
                with tune._alone(job.kernel, options):
                    steps[job.kernel]()
            timed = {launch for launch in launched if launch[0] == name}
            launched.clear()
            fewest = dwconv_triton.FEWEST_PROGRAMS, wide_conv1x1_triton.FEWEST_PROGRAMS
            assert len([*tune._compile(job)]) == len(tune.candidates(job))
            dwconv_triton.FEWEST_PROGRAMS, wide_conv1x1_triton.FEWEST_PROGRAMS = fewest
            assert bool(timed) == bool(tune.candidates(job)), job
            assert timed <= launched, job


@pytest.mark.parametrize("channels", [64, 512])
@torch.no_grad()
def test_a_backward_stays_on_the_device(fake: FakeTensorMode, kernels: list[str], channels: int) -> None:
    with fake:
        x, modulation, weights, _ = inputs(channels)
        with Launches():
            z, y, g, mean = block_forward(x, modulation, weights, None, 1e-6, save=True)
            assert y is not None
            for frozen in (False, True):
                grad_x, _, grads = block_backward(z, x, y, g, mean, modulation, weights, 1e-6, frozen)
    assert grad_x.shape == x.shape
    assert grads is None
    assert "dwconv_backward_kernel" in kernels


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"stage": 1}, {}, {"tune": "predictor", "predictor_norm": "psnr"}, {"semantic_code": "compact", "loss": "l2"}],
    ids=str,
)
def test_the_loss_of_a_batch_stays_on_the_device(
    fake: FakeTensorMode, random_model: Callable[..., tuple], fused: bool, settings: dict
) -> None:
    """The forward half: autograd's own threads ask for a real device."""
    model, config = random_model(**settings)
    model.requires_grad_(True)
    use_kernels(model, fused)
    with fake:
        move(model)
        pictures = [torch.empty(2, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last) for _ in range(3)]
        with Launches(), torch.autocast("cuda", torch.bfloat16):
            loss = Objective(model, config)(*pictures, torch.empty(2, device="cuda"))
    assert loss.shape == ()
    assert loss.requires_grad
    assert loss.device.type == "cuda"


def test_an_update_of_the_weights_stays_on_the_device(fake: FakeTensorMode, random_model: Callable[..., tuple]) -> None:
    """Clipping, Muon and the average of the weights; PyTorch's own Adam counts its steps on the CPU."""
    model, config = random_model()
    model.requires_grad_(True)
    with fake:
        move(model)
        trained = dict(model.named_parameters())
        muon, ema = make_optimizers("muon", trained.values(), 1e-3)[0], EMA(trained, 0.99)
        for parameter in trained.values():
            parameter.grad = torch.empty_like(parameter)
        with Launches() as launches:
            nn.utils.clip_grad_norm_(trained.values(), config.train.clip_grad)
            muon.step()
            ema.update(1)
    assert launches.names
