"""The whole restoration, predictor and all steps, as one CUDA graph for every size of picture.

Captured by hand: the graph trees of torch.compile's "reduce-overhead" overwrite outputs when a step feeds itself. The
noise is an input. Not yet run on a GPU by the tests of this repository's CPU machines: tests marked `gpu` wait for one.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.sampler import Conditions

CAPACITY = 8  # graphs kept, the least recently used goes first
WARMUPS = 2  # uncaptured runs: Triton compiles, cuBLAS and cuDNN take their workspaces


@dataclass(frozen=True)
class Captured:
    """A graph and the buffers that it reads and writes. They lie outside the pool that all graphs share, so that the
    replay of one graph cannot touch the picture of another."""

    graph: "torch.cuda.CUDAGraph"
    y_d: Tensor
    noise: Tensor
    restored: Tensor
    bytes: int


class Graph:
    """A plan whose `restore` replays a graph; one is captured for every shape of y_d when it comes the second time: the
    sizes of a folder of photos are often all different, and a capture costs as much as three restorations.

    `Restorer.set_task` changes the weights in place, and the graphs replay with the new ones. `bytes` reports what
    each shape's graph added to the device's memory. Not for several threads at once.
    """

    def __init__(self, plan: Plan, device: torch.device, capacity: int = CAPACITY) -> None:
        if device.type != "cuda":
            raise UserError("backend graph: CUDA graphs need a CUDA device; use --backend fused")
        self.plan, self.steps, self.device, self.capacity = plan, plan.steps, device, capacity
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # PyTorch's own for captures lies on the first device that captured
        self.graphs: OrderedDict[tuple[int, ...], Captured] = OrderedDict()
        self.seen: set[tuple[int, ...]] = set()

    @property
    def bytes(self) -> dict[tuple[int, ...], int]:
        return {shape: captured.bytes for shape, captured in self.graphs.items()}

    def prepare(self, y_d: Tensor) -> Conditions:
        return self.plan.prepare(y_d)

    def step(self, x: Tensor, previous: Tensor, i: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
        return self.plan.step(x, previous, i, conditions)

    def restore(self, y_d: Tensor, noise: Tensor) -> Tensor:
        """Bit-equal to `plan.restore`."""
        shape = tuple(y_d.shape)
        if shape not in self.seen:
            self.seen.add(shape)
            return self.plan.restore(y_d, noise)
        if shape not in self.graphs:
            self.graphs[shape] = self._capture(y_d, noise)
            while len(self.graphs) > self.capacity:  # after the capture: the pool dies with the last graph that uses it
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(shape)
        captured = self.graphs[shape]
        captured.y_d.copy_(y_d)
        captured.noise.copy_(noise)
        captured.graph.replay()
        return captured.restored.clone()

    def clear(self) -> None:
        """Give the graphs' memory back."""
        self.graphs.clear()
        self.pool = torch.cuda.graph_pool_handle()  # the old one died with its last graph

    def _capture(self, y_d: Tensor, noise: Tensor) -> Captured:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # as the capture does: what PyTorch kept before is not the graph's
        before = torch.cuda.memory_reserved(self.device)
        y_d, noise = y_d.clone(memory_format=torch.preserve_format), noise.clone()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for _ in range(WARMUPS):
                restored = self.plan.restore(y_d, noise)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        try:  # "thread_local": what other threads of the program do on the device meanwhile is their own affair.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                restored.copy_(self.plan.restore(y_d, noise))
        finally:  # a capture that fails, for want of memory, leaves its stream current
            torch.cuda.set_stream(current)
        torch.cuda.synchronize(self.device)
        return Captured(graph, y_d, noise, restored, torch.cuda.memory_reserved(self.device) - before)
