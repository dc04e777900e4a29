import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounter

from dtpm_fast import Restorer
from dtpm_fast.errors import UserError
from dtpm_fast.runtime.backends import choose_backend
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.precision import choose_precision
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.sampler import make_steps
from dtpm_fast.runtime.task_swap import TaskSwap

CPU = torch.device("cpu")
SIZES = [(1, 8, 8), (1, 40, 24), (2, 16, 56)]


def picture(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1, noise_fields(2, height, width)


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / (a.cpu().double() - b.cpu().double()).square().mean()))


@pytest.mark.parametrize(("backend", "precision", "bound"), [("fused", "float32", 60), ("fused", "bfloat16", 45)])
def test_a_backend_keeps_its_bound(
    random_model: Callable[..., tuple], backend: str, precision: str, bound: float
) -> None:
    model, config = random_model(semantic_code="compact")
    steps = make_steps(config, 4)
    stepper, _ = choose_backend(backend, model, steps, CPU, precision)
    with torch.inference_mode():
        for size in SIZES:
            y_d, noise = picture(*size)
            assert psnr(stepper.restore(y_d, noise), Reference(model, steps).restore(y_d, noise)) >= bound


@pytest.mark.slow
def test_the_compiled_backend_compiles_each_part_once_for_a_size(
    random_model: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever layout the picture comes in: the steps' own pictures all have one."""
    counters: list[CompileCounter] = []

    def counted(module: nn.Module, original: Callable[..., nn.Module] = torch.compile) -> nn.Module:
        counters.append(CompileCounter())
        return original(module, backend=counters[-1])

    monkeypatch.setattr(torch, "compile", counted)
    model, config = random_model()
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.compiler.reset()
        counters.clear()
        stepper, _ = choose_backend("compiled", model, make_steps(config, 3), CPU, "float32")
        image = torch.rand(1, 3, 32, 48).contiguous(memory_format=layout) * 2 - 1
        stepper.restore(image, torch.randn(1, 3, 32, 48))
        assert [counter.frame_count for counter in counters] == [1, 1]


def test_the_compiled_backend_keeps_its_bound_for_every_size(random_model: Callable[..., tuple]) -> None:
    model, config = random_model(encoder_blocks=[1], decoder_blocks=[1], predictor="none")
    steps = make_steps(config, 2)
    stepper, why = choose_backend("compiled", model, steps, CPU, "float32")
    assert why.startswith("backend compiled: as asked")
    with torch.inference_mode():
        for size in ((1, 16, 24), (1, 40, 16)):
            y_d, noise = picture(*size)
            assert psnr(stepper.restore(y_d, noise), Reference(model, steps).restore(y_d, noise)) >= 60


def test_a_failure_of_the_compiler_alone_is_one_line(
    random_model: Callable[..., tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = random_model()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    y_d, noise = picture(1, 8, 8)
    for error, expected, message in (
        (TorchDynamoException("no compiler\nand how it came to that"), UserError, r"failed \(no compiler\); use"),
        (RuntimeError("out of memory"), RuntimeError, "^out of memory$"),
    ):

        def failing(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(torch, "compile", lambda module, failing=failing: failing)
        stepper, _ = choose_backend("compiled", model, make_steps(config, 2), CPU)
        with pytest.raises(expected, match=message):
            stepper.restore(y_d, noise)


def test_auto_says_what_it_took_and_why(random_model: Callable[..., tuple]) -> None:
    model, config = random_model()
    steps = make_steps(config, 2)
    stepper, why = choose_backend("auto", model, steps, CPU, "float32")
    assert isinstance(stepper, Plan)
    start = "backend fused: chosen by auto, the fastest on a CPU; precision float32: as asked; "
    assert why.startswith((f"{start}C++ blocks for ", f"{start}blocks in PyTorch"))
    gated, config = random_model(adapter_kind="gated")
    stepper, why = choose_backend("auto", gated, steps, CPU)
    assert isinstance(stepper, Reference)
    assert why == "backend reference, float32: chosen by auto, because gated adapters cannot be merged"
    without, config = random_model(adapter_kind="gated", adapter_positions="none")  # nothing to merge
    assert choose_backend("auto", without, make_steps(config, 2), CPU)[1].startswith("backend fused")


def test_what_cannot_be_had_is_refused(random_model: Callable[..., tuple]) -> None:
    model, config = random_model()
    gated, _ = random_model(adapter_kind="gated")
    steps = make_steps(config, 2)
    for name, of, precision, message in (
        ("magic", model, "auto", "unknown backend 'magic'"),
        ("graph", model, "auto", "need a CUDA device"),
        ("fused", gated, "auto", "cannot be merged"),
        ("fused", model, "float8", "unknown precision 'float8'"),
        ("reference", model, "bfloat16", "float32 only"),
    ):
        with pytest.raises(UserError, match=message):
            choose_backend(name, of, steps, CPU, precision)


def test_precision_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, dtype in ((("amx_bf16",), torch.bfloat16), (("avx512_bf16",), torch.bfloat16), ((), torch.float32)):
        monkeypatch.setattr("dtpm_fast.runtime.precision._cpu_has", lambda unit, has=has: unit in has)
        chosen, why = choose_precision("auto", CPU)
        assert chosen == dtype
        assert "this CPU" in why
    amx, avx2 = {torch.bfloat16: "amx", torch.float32: "avx512"}, {torch.float32: "avx2"}
    monkeypatch.setattr("dtpm_fast.runtime.precision._cpu_has", lambda unit: True)
    assert choose_precision("auto", CPU, amx.get) == (torch.bfloat16, "this CPU multiplies it (amx)")
    dots = {torch.bfloat16: "avx512bf16", torch.float32: "avx512"}
    assert choose_precision("auto", CPU, dots.get) == (torch.bfloat16, "this CPU multiplies it (avx512bf16)")
    assert choose_precision("auto", CPU, avx2.get)[0] == torch.float32  # not PyTorch's operators in bfloat16
    assert choose_precision("float32", CPU) == (torch.float32, "as asked")
    assert choose_precision("bfloat16", CPU, avx2.get) == (torch.bfloat16, "as asked")  # although slower


def test_warmup_and_the_log_line(
    tmp_path: Path,
    random_weights: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "dtpm_fast")
    restorer = Restorer.from_pretrained(random_weights(tmp_path / "w.safetensors"), "derain", device="cpu")
    assert caplog.messages == [restorer.about]
    shapes: list[tuple[int, ...]] = []
    restore = restorer.backend.restore

    def seen(y_d: Tensor, noise: Tensor) -> Tensor:
        shapes.append(tuple(y_d.shape))
        return restore(y_d, noise)

    monkeypatch.setattr(restorer.backend, "restore", seen)
    assert restorer.warmup([(8, 8), (9, 17)], batch=2) > 0
    assert shapes == 2 * [(2, 3, 8, 8)] + 2 * [(2, 3, 16, 24)]  # a graph is captured when a size comes again
    assert caplog.messages[-1].startswith("warm after")


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "reference"),
        ("cpu", "fused"),
        pytest.param("cuda", "fused", marks=pytest.mark.gpu),
        pytest.param("cuda", "graph", marks=pytest.mark.gpu),
    ],
)
def test_set_task_gives_what_a_new_restorer_gives(
    tmp_path: Path, random_weights: Callable[..., Path], device: str, backend: str
) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)
    sigmas = {"derain": 0.1, "desnow": 0.1, "deblur": 0.03}  # of the sampler's table and the time embedding
    files = {
        task: random_weights(
            tmp_path / f"{task}.safetensors", task=task, seed=seed, sigma_data=sigma, prior_sigma_data=0.1
        )
        for seed, (task, sigma) in enumerate(sigmas.items())
    }
    others = [  # of another shape, and of another table of the sampler
        random_weights(tmp_path / "wide.safetensors", width=24),
        random_weights(tmp_path / "unclipped.safetensors", clip=False, sigma_data=0.1, prior_sigma_data=0.1),
    ]
    common: dict[str, Any] = {"steps": 5, "device": device, "backend": backend, "sampler": "dpm++2m"}  # no defaults
    restorer = Restorer.from_pretrained(files["derain"], "derain", **common)
    fresh = {task: Restorer.from_pretrained(file, task, **common)(photo) for task, file in files.items()}
    assert len({picture.tobytes() for picture in fresh.values()}) == 3
    for task in ("desnow", "derain", "deblur", "desnow"):  # new, back, new, and one from before
        restorer.set_task(task, files[task])
        assert f"{task}.safetensors ({task}" in restorer.about
        np.testing.assert_array_equal(restorer(photo), fresh[task])
    for other in others:
        with pytest.raises(UserError, match="another network"):
            restorer.set_task("derain", other)
    with pytest.raises(UserError, match="trained for the task 'desnow'"):
        restorer.set_task("defocus")
    np.testing.assert_array_equal(restorer(photo), fresh["desnow"])
    random_weights(files["derain"], seed=7, sigma_data=0.1, prior_sigma_data=0.1)  # the file has changed meanwhile
    restorer.set_task("derain", files["derain"])
    np.testing.assert_array_equal(restorer(photo), Restorer.from_pretrained(files["derain"], "derain", **common)(photo))


@pytest.mark.parametrize("tiles_first", [True, False])
def test_set_task_around_a_picture_in_tiles(
    tmp_path: Path, random_weights: Callable[..., Path], tiles_first: bool
) -> None:
    """Tiles of a GPU's plan have a plan of their own, made while a picture is under way."""
    files = {
        task: random_weights(
            tmp_path / f"{task}.safetensors", task=task, seed=seed, sigma_data=sigma, prior_sigma_data=0.1
        )
        for seed, (task, sigma) in enumerate({"derain": 0.1, "desnow": 0.03}.items())
    }
    made = [
        Restorer.from_pretrained(files[task], task, device="cpu", backend="fused", tile=128)
        for task in ("derain", "desnow")
    ]
    for restorer in made:
        restorer.backend = Plan(restorer.model, restorer.steps, torch.float32, "kernels")
    restorer, fresh = made
    photo = np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)
    wanted = restorer(photo) if tiles_first else None
    restorer.set_task("desnow", files["desnow"])
    np.testing.assert_array_equal(restorer(photo), fresh(photo))
    restorer.set_task("derain", files["derain"])
    if wanted is not None:
        np.testing.assert_array_equal(restorer(photo), wanted)


@pytest.mark.gpu
def test_the_fused_kernels_keep_their_bound_on_a_gpu(random_model: Callable[..., tuple]) -> None:
    model, config = random_model(semantic_code="compact")
    steps = make_steps(config, 4)
    device = torch.device("cuda")
    for precision, bound in (("float32", 60), ("bfloat16", 45)):
        with torch.inference_mode():
            for size in SIZES:
                y_d, noise = picture(*size)
                exact = Reference(model.cpu(), steps).restore(y_d, noise)
                stepper, _ = choose_backend("fused", model.cuda(), steps, device, precision)
                assert psnr(stepper.restore(y_d.cuda(), noise.cuda()), exact) >= bound


@pytest.mark.gpu
def test_graph_replay_is_the_uncaptured_run_and_swaps(random_model: Callable[..., tuple]) -> None:
    model, config = random_model(semantic_code="compact")
    second, _ = random_model(seed=1, semantic_code="compact")
    steps = make_steps(config, 4)
    device = torch.device("cuda")
    with torch.inference_mode():
        graph, _ = choose_backend("graph", model.cuda(), steps, device)
        graph.capacity = 2  # type: ignore[attr-defined]
        pictures = [[t.cuda() for t in picture(*size)] for size in SIZES]
        for y_d, noise in pictures * 3:  # uncaptured, captured, and the first one captured anew
            assert torch.equal(graph.restore(y_d, noise), graph.plan.restore(y_d, noise))  # type: ignore[attr-defined]
        assert len(graph.graphs) == 2  # type: ignore[attr-defined]
        fresh = graph.plan.of(second.cuda(), graph.steps)  # type: ignore[attr-defined]
        tasks = TaskSwap(graph.plan.tensors(), "first")  # type: ignore[attr-defined]
        tasks.add("second", fresh.tensors())
        tasks.take("second")
        for y_d, noise in pictures:
            assert torch.equal(graph.restore(y_d, noise), fresh.restore(y_d, noise))
