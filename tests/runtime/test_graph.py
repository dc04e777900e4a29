"""The graph backend without a GPU: what a capture records is recorded here from PyTorch's dispatcher, on the CPU.

A replay runs the recorded operators again on the recorded tensors, as a CUDA graph does: whatever a step would take
from Python instead (a size, a number, a fresh tensor) is frozen in it, and a wrong buffer gives the wrong picture. Real
graphs are tested by the tests marked `gpu` in test_backends.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtpm_fast.errors import UserError
from dtpm_fast.runtime.graph import Graph
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.sampler import make_steps
from dtpm_fast.runtime.task_swap import TaskSwap


class Recording(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.pool = -1  # that it was captured in

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, recorded in self.calls:
            again = function(*args, **kwargs)
            for new, old in zip(tree_leaves(again), tree_leaves(recorded), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """torch.cuda with captures that record on the CPU; the list of them."""
    made: list[Recording] = []

    @contextmanager
    def capture(recording: Recording, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert isinstance(pool, int)
        assert stream is the_stream
        recording.pool = pool
        made.append(recording)
        with recording:
            yield

    the_stream, pools = SimpleNamespace(wait_stream=lambda other: None), count()
    for name, value in {
        "graph_pool_handle": lambda: next(pools), "synchronize": lambda device: None,
        "memory_reserved": lambda device: 0, "empty_cache": lambda: None, "set_stream": lambda stream: None,
        "Stream": lambda device: the_stream, "current_stream": lambda device: the_stream,
        "stream": lambda stream: nullcontext(), "CUDAGraph": Recording, "graph": capture,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def picture(seed: int, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y_d = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    return y_d.contiguous(memory_format=torch.channels_last), noise_fields(seed, height, width)


@pytest.mark.parametrize(
    "settings", [{"semantic_code": "compact"}, {"predictor": "none", "condition": "predicted"}], ids=str
)
@torch.inference_mode()
def test_replay_is_the_uncaptured_run_for_every_picture_and_after_a_swap(
    random_model: Callable[..., tuple], captures: list[Recording], settings: dict
) -> None:
    model, config = random_model(**settings)
    steps = make_steps(config, 3)
    plan = Plan(model, steps)
    graph = Graph(plan, torch.device("cuda"), capacity=2)
    shapes = [(1, 8, 8), (2, 16, 24)]
    for seed in (0, 1, 2):  # uncaptured, captured, and what the second round captured
        for shape in shapes:
            y_d, noise = picture(seed, *shape)
            assert torch.equal(graph.restore(y_d, noise), plan.restore(y_d, noise))
        assert len(captures) == (len(shapes) if seed else 0)
    second, _ = random_model(seed=1, **settings)
    tasks = TaskSwap(plan.tensors(), "first")
    tasks.add("second", plan.of(second, plan.steps).tensors())
    tasks.take("second")
    fresh = Plan(second, steps)
    for shape in shapes:
        y_d, noise = picture(3, *shape)
        assert torch.equal(graph.restore(y_d, noise), fresh.restore(y_d, noise))
    assert len(captures) == len(shapes)


@torch.inference_mode()
def test_the_least_recently_used_shape_goes_and_results_stay(
    random_model: Callable[..., tuple], captures: list[Recording]
) -> None:
    model, config = random_model()
    graph = Graph(Plan(model, make_steps(config, 2)), torch.device("cuda"), capacity=2)
    small, wide, tall = (picture(0, *shape) for shape in ((1, 8, 8), (1, 8, 16), (1, 16, 8)))
    for given in (small, wide, tall):  # a size that comes once is worth no graph
        graph.restore(*given)
    assert not captures
    first = graph.restore(*small)
    kept = first.clone()
    for given in (wide, small, tall, picture(1, 1, 8, 8)):  # tall drives wide out
        graph.restore(*given)
    assert [shape[-2:] for shape in graph.graphs] == [(16, 8), (8, 8)]
    assert set(graph.bytes) == {(1, 3, 16, 8), (1, 3, 8, 8)}
    assert len(captures) == 3
    assert len({capture.pool for capture in captures}) == 1
    graph.restore(*wide)
    assert len(captures) == 4
    assert torch.equal(first, kept)  # a caller's picture is its own


@torch.inference_mode()
def test_memory_given_back_is_captured_anew(random_model: Callable[..., tuple], captures: list[Recording]) -> None:
    model, config = random_model()
    graph = Graph(Plan(model, make_steps(config, 2)), torch.device("cuda"))
    given = picture(0, 1, 8, 8)
    first = [graph.restore(*given) for _ in range(2)][1]
    graph.clear()
    assert not graph.graphs and not graph.bytes
    assert torch.equal(graph.restore(*given), first)
    assert len(captures) == 2
    assert captures[0].pool != captures[1].pool  # a pool goes with its last graph


def test_a_cpu_is_refused(random_model: Callable[..., tuple]) -> None:
    model, config = random_model()
    with pytest.raises(UserError, match="need a CUDA device"):
        Graph(Plan(model, make_steps(config, 2)), torch.device("cpu"))
