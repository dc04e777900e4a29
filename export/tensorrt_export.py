"""From a folder's ONNX graphs to engines: built, or taken from another export and given new weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.export.compare import Difference, difference
from dtpm_fast.export.manifest import GraphSpec, Manifest, read_manifest
from dtpm_fast.export.onnx_graph import structure
from dtpm_fast.export.tensorrt_api import check_place, place, require_cuda, tensorrt
from dtpm_fast.export.tensorrt_buckets import Bucket, buckets_of
from dtpm_fast.export.tensorrt_build import BuildSettings, build_engine, default_timing_cache, refit_engine
from dtpm_fast.export.tensorrt_engine import Engine, run_once
from dtpm_fast.export.tensorrt_layers import Layer, compare_layers, write_layers
from dtpm_fast.export.tensorrt_stepper import TensorRTStepper
from dtpm_fast.runtime.reference import Reference


@dataclass(frozen=True)
class EngineOptions:
    """What can be chosen about engines.

    buckets: sizes, as `Bucket.parse` takes them. refit: whether weights can be exchanged later. timing_cache: its file;
    None takes the user's own. layers: also compare layer by layer and keep the report. refit_from: a folder whose
    engines are taken instead of building.
    """

    buckets: Sequence[str] = ("512x512", "1088x1920")
    refit: bool = True
    timing_cache: Path | None = None
    layers: bool = False
    refit_from: Path | None = None

    def check(self, device: torch.device, kind: str) -> None:
        """Everything that can be known before the long work. Raises `UserError`."""
        trt = tensorrt()
        require_cuda(device)
        for text in self.buckets:
            Bucket.parse(text, 1)
        if self.refit_from is not None:
            old = read_manifest(self.refit_from)
            if old.kind != kind or not old.engine.get("refit"):
                raise UserError(
                    f"--refit {self.refit_from}: no engines of --format {kind} whose weights can be exchanged "
                    f"(kind {old.kind!r}, refit {bool(old.engine.get('refit'))})"
                )
            check_place(self.refit_from, old, trt, device)


def replace_graphs(
    folder: Path, manifest: Manifest, options: EngineOptions, device: torch.device, report: Callable[[str], None]
) -> list[Layer]:
    """Put an engine in the place of every ONNX file of `folder`, and what it is tied to in the manifest.

    Returns the comparison of layers, empty unless the options ask for it. Raises `UserError`.
    """
    here = place(tensorrt(), device)
    cache = options.timing_cache or default_timing_cache(here)
    parsed = [Bucket.parse(text, manifest.multiple) for text in options.buckets]
    buckets = list(dict.fromkeys(parsed))
    layers: list[Layer] = []
    with torch.cuda.device(device):
        if options.layers:
            report("layers")
            layers = compare_layers(folder, manifest, cache, device)
            write_layers(folder, layers)
        old = None if options.refit_from is None else read_manifest(options.refit_from)
        if old is not None:
            buckets = buckets_of(old.engine)
        settings = BuildSettings(buckets, options.refit, cache)
        structures = {}
        for name, graph in manifest.graphs.items():
            source = folder / graph.file
            target = source.with_suffix(".plan")
            structures[name] = structure(source)
            report(target.name)
            if old is None:
                plan = build_engine(source.read_bytes(), graph.file, graph, manifest.multiple, settings)
            else:
                assert options.refit_from is not None
                plan = _refitted(options.refit_from, old, name, source, structures[name])
            target.write_bytes(plan)
            source.unlink()
            manifest.graphs[name] = GraphSpec(str(Path(graph.file).with_suffix(".plan")), graph.inputs, graph.outputs)
    manifest.engine = {
        "device": "cuda",
        **here,
        "buckets": [{"batch": b.batch, "height": b.height, "width": b.width} for b in buckets],
        "refit": options.refit,
        "structure": structures,
    }
    manifest.versions["tensorrt"] = here["tensorrt"]
    return layers


def compare_engines(folder: Path, manifest: Manifest, reference: Reference, device: torch.device) -> list[Difference]:
    """Every bucket's profile against the plain model, at a size that the CPU computes in no time."""
    m, found = manifest.multiple, []
    run: Callable[[Tensor, Tensor, int], Tensor]
    if "restore" in manifest.graphs:
        file = folder / manifest.graphs["restore"].file
        with torch.cuda.device(device):
            engine = Engine(file.read_bytes(), str(file))

        def run(image: Tensor, noise: Tensor, bucket: int) -> Tensor:
            return run_once(engine, bucket, {"image": image, "noise": noise}, device)["restored"]
    else:
        stepper = TensorRTStepper(folder, manifest, device)

        def run(image: Tensor, noise: Tensor, bucket: int) -> Tensor:
            stepper.restore(image.to(device), noise.to(device), bucket)
            return stepper.restore(image.to(device), noise.to(device), bucket)  # as the graph that most pictures meet

    for index, bucket in enumerate(buckets_of(manifest.engine)):
        for batch, rows, columns in ((bucket.batch, 5, 7), (1, 2, 1)):
            size = (batch, min(bucket.height, rows * m), min(bucket.width, columns * m))

            def restore(image: Tensor, noise: Tensor, bucket: int = index) -> Tensor:
                return run(image, noise, bucket)

            found.append(difference(restore, reference, *size, seed=index))
    return found


def _refitted(folder: Path, old: Manifest, name: str, source: Path, expected: str) -> bytes:
    if old.engine.get("structure", {}).get(name) != expected:
        raise UserError(
            f"--refit {folder}: its {name} is of another structure (preset, steps, precision or exporter); build anew"
        )
    file = folder / old.graphs[name].file
    engine: Any = Engine(file.read_bytes(), str(file))
    refit_engine(engine.engine, source.read_bytes(), str(file))
    content: bytes = engine.serialize()
    return content
