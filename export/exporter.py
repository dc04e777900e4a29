"""From weights to a folder: graphs, comparison, manifest, and only then the folder's name."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from dtpm_fast.atomic import whole_folder
from dtpm_fast.device import without_tf32
from dtpm_fast.errors import UserError
from dtpm_fast.export.aoti import AotiStepper, compute_capability, write_aoti
from dtpm_fast.export.compare import Difference, ExportedStepper, check, difference, stepped
from dtpm_fast.export.graph import PrepareGraph, StepGraph, UnrolledGraph
from dtpm_fast.export.manifest import (
    PRECISIONS,
    GraphSpec,
    Manifest,
    sampler_of,
    specs,
    write_manifest,
)
from dtpm_fast.export.onnx_graph import in_float32, write_onnx
from dtpm_fast.export.ort import OrtStepper, bound_run, open_session
from dtpm_fast.export.tensorrt_buckets import buckets_of
from dtpm_fast.export.tensorrt_export import EngineOptions, compare_engines, replace_graphs
from dtpm_fast.export.tensorrt_layers import Layer
from dtpm_fast.export.triton_server import NETWORK, write_repository
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.sampler import Steps, make_steps
from dtpm_fast.weights_file import Weights, load_model, sha256

CPU = torch.device("cpu")
MOST_UNROLLED = 4  # steps: the file grows with them, not only with the model


@dataclass
class Graphs:
    """The modules of one export, with an example call each: name, module, inputs, outputs, dynamic sides."""

    multiple: int
    parts: dict[str, tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], Any]]


@without_tf32()  # of what is compared
def export_folder(
    weights: Weights,
    target: Path | str,
    *,
    kind: str = "onnx",
    steps: int = 4,
    precision: str = "fp32",
    unrolled: bool = False,
    device: torch.device = CPU,
    engines: EngineOptions | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write `prepare` and `step` ("onnx": restore.onnx as well with `unrolled`; "triton": a model repository around it)
    and the manifest to the folder `target`.

    The result of the files is compared with the plain float32 model before the folder gets its name. `device` is what
    "aoti" and "tensorrt" build for; `engines` holds the choices for "tensorrt", and makes the network of "triton" an
    engine. `report` is told what is being done. Raises `UserError`: weights of stage I, steps outside 1..T, gated
    adapters, a target that exists, a full disk, and a graph that differs from the model.
    """
    if kind == "tensorrt" and engines is None:
        engines = EngineOptions()
    if engines is not None:
        engines.check(device, kind)
    if unrolled and (steps > MOST_UNROLLED or kind != "onnx"):
        raise UserError(
            f"--unrolled with {steps} steps as {kind}: offered for onnx and up to {MOST_UNROLLED} steps; use prepare "
            "and step"
        )
    if kind == "triton" and steps > MOST_UNROLLED:
        raise UserError(f"--format triton with {steps} steps: its network is unrolled, for up to {MOST_UNROLLED} steps")
    with whole_folder(target) as folder:
        report("merging")
        sampler = make_steps(weights.config, steps)
        graphs = make_graphs(*merged(weights, sampler, precision), unrolled or kind == "triton")
        if kind == "triton":
            graphs.parts = {"restore": graphs.parts["restore"]}
        manifest = manifest_of(kind, weights, sampler, precision, graphs)
        if kind == "aoti":
            manifest.engine = {"device": device.type, "compute_capability": compute_capability(device)}
        for name in list(graphs.parts):
            module, inputs, _, dynamic = graphs.parts.pop(name)  # written and let go: a part at a time is in memory
            spec = manifest.graphs[name]
            report(spec.file)
            (folder / spec.file).parent.mkdir(parents=True, exist_ok=True)
            if kind != "aoti":
                write_onnx(module, inputs, spec.inputs, spec.outputs, folder / spec.file)
            else:
                write_aoti(module, list(inputs.values()), dynamic, folder / spec.file, device)
        report("comparing")
        del graphs, module, inputs
        reference = Reference(load_model(weights, stage=2).requires_grad_(False), sampler)
        m, found = manifest.multiple, []
        if "step" in manifest.graphs:
            stepper: ExportedStepper
            stepper = AotiStepper(folder, manifest, device) if kind == "aoti" else OrtStepper(folder, manifest, CPU)
            sizes = ((2, 3 * m, 5 * m), (1, m, 2 * m))
            found += [difference(stepped(stepper), reference, *size, seed=1) for size in sizes]
        if "restore" in manifest.graphs:
            found.append(difference(whole(folder, manifest), reference, 2, 5 * m, 3 * m, seed=2))
        accept(found, manifest)
        if engines is not None:
            layers = replace_graphs(folder, manifest, engines, device, report)
            report("comparing engines")
            manifest.compared.clear()  # the engines are what runs
            accept(compare_engines(folder, manifest, reference, device), manifest, layers)
        if kind == "triton":
            write_repository(folder, manifest)
        write_manifest(folder, manifest)
    return manifest


@without_tf32()
def verify(folder: Path, manifest: Manifest, weights: Weights, stepper: ExportedStepper) -> list[Difference]:
    """The folder's graphs against the plain model at six sizes, batches 1, 2 and 3. Raises `UserError` when one is
    outside its bound."""
    model = load_model(weights, stage=2).requires_grad_(False)
    reference = Reference(model, manifest.steps)
    m, buckets = manifest.multiple, buckets_of(manifest.engine)
    found = []
    for batch, h, w in ((1, 1, 1), (1, 3, 7), (3, 5, 2), (1, 8, 8), (2, 4, 11), (1, 9, 16)):
        if buckets and not any(bucket.holds(batch, h * m, w * m) for bucket in buckets):
            continue
        found.append(difference(stepped(stepper), reference, batch, h * m, w * m, seed=h))
        if "restore" in manifest.graphs:
            found.append(difference(whole(folder, manifest), reference, batch, h * m, w * m, seed=h))
    for one in found:
        check(one, manifest.precision, so=f"do not use {folder}")
    return found


def merged(weights: Weights, sampler: Steps, precision: str) -> tuple[Plan, int]:
    """The plan, with everything merged that can be, proved equal to the model on random input; and the multiple of its
    sides. Raises `UserError` when the two differ."""
    model = load_model(weights, stage=2).requires_grad_(False)
    plan = Plan(model, sampler, PRECISIONS[precision])
    found = difference(plan.restore, Reference(model, sampler), 1, 2 * model.multiple, 3 * model.multiple)
    check(found, precision, "the merged model")
    return plan, model.multiple


def make_graphs(plan: Plan, multiple: int, unrolled: bool = False) -> Graphs:
    """The modules and one example call of each, at batch 2 and sides that no constant can be mistaken for."""
    prepare = PrepareGraph(plan).eval()
    step = StepGraph(plan, prepare.names).eval()
    height, width = 3 * multiple, 5 * multiple
    image, x, previous = (torch.zeros(2, 3, height, width) for _ in range(3))  # torch.export merges inputs that are one
    batch = Dim("batch", min=1, max=4096)
    sides = {2: multiple * Dim("rows", min=1, max=4096), 3: multiple * Dim("columns", min=1, max=4096)}
    with torch.no_grad():
        conditions = dict(zip(prepare.names, prepare(image), strict=True))
        given = {"x": x, "previous": previous, "index": torch.zeros(1, dtype=torch.int64), **conditions}
        next_x, x0 = step(*given.values())
    free = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    free_conditions = tuple({0: Dim.AUTO} if value.ndim == 2 else free for value in conditions.values())
    parts: dict[str, tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], Any]] = {
        "prepare": (prepare, {"image": image}, conditions, ({0: batch, **sides},)),
        "step": (step, given, {"next_x": next_x, "x0": x0}, (free, free, {}, free_conditions)),
    }
    if unrolled:
        noise = torch.zeros(plan.steps.noise_fields, 3, height, width)
        restore = UnrolledGraph(prepare, step, plan.steps).eval()
        dynamic = ({0: batch, **sides}, sides)
        parts["restore"] = (restore, {"image": image, "noise": noise}, {"restored": image}, dynamic)
    return Graphs(multiple, parts)


def manifest_of(kind: str, weights: Weights, sampler: Steps, precision: str, graphs: Graphs) -> Manifest:
    """All but the comparison and the hashes, which come last."""
    size = (2, 3 * graphs.multiple, 5 * graphs.multiple)
    return Manifest(
        kind=kind,
        task=weights.task,
        preset=weights.config.model.preset,
        precision=precision,
        multiple=graphs.multiple,
        sampler=sampler_of(sampler),
        noise_fields=sampler.noise_fields,
        graphs={
            name: GraphSpec(_file(kind, name), specs(inputs, *size), specs(outputs, *size))
            for name, (_, inputs, outputs, _) in graphs.parts.items()
        },
        weights={
            "file": weights.path.name,
            "sha256": sha256(weights.path),
            "prior": weights.prior,
            "trained": weights.trained,
        },
        versions={"python": platform.python_version(), **_versions(kind)},
    )


def accept(found: list[Difference], manifest: Manifest, layers: Sequence[Layer] = ()) -> None:
    """Enter the comparison into the manifest. Raises `UserError` when one is outside its bound, with the worst of the
    layers if they were compared."""
    for one in found:
        try:
            check(one, manifest.precision)
        except UserError as error:
            worst = min(layers, key=lambda layer: layer.rank, default=None)
            raise UserError(f"{error}; worst layer: {worst}" if worst else str(error)) from error
        manifest.compared.append(
            {
                "size": [one.batch, 3, one.height, one.width],
                "max_abs": one.max_abs,
                "psnr_db": round(one.psnr_db, 2),
            }
        )


def whole(folder: Path, manifest: Manifest) -> Callable[[Tensor, Tensor], Tensor]:
    """restore.onnx as a function of image and noise, on the CPU."""
    graph = manifest.graphs["restore"]
    file = folder / graph.file
    widened = manifest.precision == "bf16"
    session = open_session(in_float32(file) if widened else str(file), CPU)

    def restore(image: Tensor, noise: Tensor) -> Tensor:
        size = (image.shape[0], image.shape[2], image.shape[3])
        return bound_run(session, graph, {"image": image, "noise": noise}, size, CPU, widened)["restored"]

    return restore


def _file(kind: str, name: str) -> str:
    return {"onnx": f"{name}.onnx", "tensorrt": f"{name}.onnx", "aoti": f"{name}.pt2", "triton": NETWORK}[kind]


def _versions(kind: str) -> dict[str, str]:
    packages = ["dtpm-fast", "torch"]
    if kind != "aoti":
        packages += ["onnx", "onnxruntime-gpu"]
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "onnxruntime-gpu":
                found["onnxruntime"] = metadata.version("onnxruntime")
    return found
