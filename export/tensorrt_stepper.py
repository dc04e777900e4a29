"""TensorRT as a backend: `prepare` once for a picture, then all steps as one CUDA graph.

Every shape has contexts and buffers of its own. What `prepare` writes is what `step` reads: nothing is copied between
them. The buffers' addresses never change, so the graph, captured when a shape comes the second time (most sizes of a
folder of photos come once, and a capture costs a run of the steps), replays for every picture.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.export.manifest import Manifest
from dtpm_fast.export.tensorrt_api import check_place, require_cuda, tensorrt
from dtpm_fast.export.tensorrt_buckets import buckets_of, choose_bucket
from dtpm_fast.export.tensorrt_build import refit_engine
from dtpm_fast.export.tensorrt_engine import Context, Engine, NoRoom
from dtpm_fast.runtime.sampler import Conditions

CAPACITY = 8  # shapes kept, the least recently used goes first


@dataclass
class Shape:
    """One shape's contexts, its buffers by name, and its graph once it is captured."""

    prepare: Context
    step: Context
    tensors: dict[str, Tensor]
    noise: Tensor
    restored: Tensor
    ran: bool = False
    graph: "torch.cuda.CUDAGraph | None" = None


class TensorRTStepper:
    """A `Stepper` over the engines prepare.plan and step.plan.

    A picture goes through the smallest bucket that holds it, at its own size. `refit` exchanges the weights. Raises
    `UserError`: another device than CUDA, TensorRT missing, engines of another version or architecture. Not for several
    threads at once.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        require_cuda(device)
        check_place(folder, manifest, tensorrt(), device)
        self.folder, self.manifest, self.device, self.steps = folder, manifest, device, manifest.steps
        self.buckets = buckets_of(manifest.engine)
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)
            self.engines = {
                name: Engine((folder / manifest.graphs[name].file).read_bytes(), str(folder / graph.file))
                for name, graph in manifest.graphs.items()
            }
        self.indices = torch.arange(len(self.steps), device=device)
        self.shapes: OrderedDict[tuple[int, ...], Shape] = OrderedDict()

    def prepare(self, y_d: Tensor) -> Conditions:
        shape = self._shape(y_d)
        with self._beside():
            shape.tensors["image"].copy_(y_d)
            shape.prepare.run(self.stream.cuda_stream)
        return {spec.name: shape.tensors[spec.name].clone() for spec in self.manifest.graphs["prepare"].outputs}

    def step(self, x: Tensor, previous: Tensor, i: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
        shape = self._shape(conditions["y_eps"])
        with self._beside():
            for name, value in {"x": x, "previous": previous, "index": self.indices[i : i + 1], **conditions}.items():
                shape.tensors[name].copy_(value)
            shape.step.run(self.stream.cuda_stream)
        return shape.tensors["next_x"].clone(), shape.tensors["x0"].clone()

    def restore(self, y_d: Tensor, noise: Tensor, bucket: int | None = None) -> Tensor:
        """`bucket` is the index of the one to take, by default the smallest that holds the picture."""
        shape = self._shape(y_d, bucket)
        with self._beside():
            shape.tensors["image"].copy_(y_d)
            shape.noise.copy_(noise)
            shape.prepare.run(self.stream.cuda_stream)
            if not shape.ran:  # TensorRT finishes what a new shape needs in the first run: that could not be captured
                self._run_steps(shape)
                shape.ran = True
            else:
                if shape.graph is None:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                        self._run_steps(shape)
                    shape.graph = graph
                shape.graph.replay()
        return shape.restored.clone()

    def refit(self, graphs: dict[str, bytes]) -> None:
        """Take the weights of other ONNX graphs, "prepare" and "step", of the same structure. Raises `UserError` when
        the engines were built with fixed weights or the graphs are others."""
        if not self.manifest.engine.get("refit"):
            raise UserError(f"{self.folder}: was built with --fixed-weights; build engines for the new weights")
        torch.cuda.synchronize(self.device)
        self.shapes.clear()  # no graph may hold what the exchange moved
        with torch.cuda.device(self.device):
            for name, engine in self.engines.items():
                refit_engine(engine.engine, graphs[name], engine.name)

    def _run_steps(self, shape: Shape) -> None:
        """All steps, in place and on the current stream: what the graph captures."""
        t = shape.tensors
        t["x"].copy_(shape.noise[:1].expand_as(t["x"]))
        t["previous"].zero_()
        fresh = 1
        for i, sigma in enumerate(self.steps.sigmas):
            t["index"].copy_(self.indices[i : i + 1])
            shape.step.run(torch.cuda.current_stream(self.device).cuda_stream)
            t["x"].copy_(t["next_x"])
            t["previous"].copy_(t["x0"])
            if sigma > 0:
                t["x"].add_(shape.noise[fresh], alpha=sigma)
                fresh += 1
        torch.add(t["y_eps"], t["x"], out=shape.restored)
        shape.restored.clamp_(-1, 1)

    def _shape(self, image: Tensor, bucket: int | None = None) -> Shape:
        size = (image.shape[0], image.shape[2], image.shape[3])
        if bucket is None:
            bucket = choose_bucket(self.buckets, *size)
        key = (bucket, *size)
        if key not in self.shapes:
            while len(self.shapes) >= CAPACITY:
                self.shapes.popitem(last=False)
            with suppress(torch.OutOfMemoryError, NoRoom):
                self.shapes[key] = self._new_shape(bucket, size)
            if key not in self.shapes:  # here the error, and the tensors that it kept, are gone
                torch.cuda.synchronize(self.device)
                self.shapes.clear()  # what other sizes hold is worth less than this one
                torch.cuda.empty_cache()  # and TensorRT takes its memory beside PyTorch's
                self.shapes[key] = self._new_shape(bucket, size)
        self.shapes.move_to_end(key)
        return self.shapes[key]

    def _new_shape(self, bucket: int, size: tuple[int, int, int]) -> Shape:
        graphs = self.manifest.graphs
        specs = {spec.name: spec for graph in graphs.values() for spec in (*graph.inputs, *graph.outputs)}
        dtypes = {name: kind for e in self.engines.values() for name, kind in {**e.inputs, **e.outputs}.items()}
        # Buffers that inference mode made could not be written outside of it.
        with torch.inference_mode(False), torch.cuda.device(self.device), self._beside():
            tensors = {
                name: torch.zeros(specs[name].sides(*size), dtype=kind, device=self.device)
                for name, kind in dtypes.items()
            }
            contexts = {}
            for name, engine in self.engines.items():
                shapes = {key: tuple(tensors[key].shape) for key in engine.inputs}
                contexts[name] = Context(engine, bucket, shapes, self.stream.cuda_stream)
                contexts[name].bind(tensors)
            noise = torch.zeros(self.manifest.noise_fields, 3, *size[1:], device=self.device)
            restored = torch.zeros_like(tensors["image"])
            return Shape(contexts["prepare"], contexts["step"], tensors, noise, restored)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stepper's own stream, after what the current one has, and before what it gets next."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)
