"""A model repository for NVIDIA's Triton Inference Server: the unrolled network in its ONNX Runtime or its TensorRT
backend, and a model in its Python backend that takes photos of any size."""

import shutil
from pathlib import Path

from dtpm_fast.export.manifest import Manifest, TensorSpec
from dtpm_fast.export.tensorrt_buckets import buckets_of

NETWORK = "dtpm_network/1/model.onnx"
SOURCE = Path(__file__).parent / "server" / "model.py"
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}


def write_repository(folder: Path, manifest: Manifest) -> None:
    """Complete `folder`, in which the network lies already, to a repository of the models "dtpm" and "dtpm_network"."""
    graph = manifest.graphs["restore"]
    inputs = "\n".join(_tensor("input", spec) for spec in graph.inputs)
    outputs = "\n".join(_tensor("output", spec) for spec in graph.outputs)
    buckets = buckets_of(manifest.engine)
    backend = "tensorrt" if buckets else "onnxruntime"
    network = f'name: "dtpm_network"\nbackend: "{backend}"\nmax_batch_size: 0\n{inputs}\n{outputs}\n'
    if buckets:  # without the list the server knows the first profile only
        profiles = ", ".join(f'"{i}"' for i in range(len(buckets)))
        network += f"instance_group {{ kind: KIND_GPU count: 1 profile: [ {profiles} ] }}\n"
    (folder / "dtpm_network" / "config.pbtxt").write_text(network)
    (folder / "dtpm" / "1").mkdir(parents=True)
    shutil.copyfile(SOURCE, folder / "dtpm" / "1" / "model.py")
    parameters = {"multiple": manifest.multiple, "noise_fields": manifest.noise_fields}
    photos = [
        'name: "dtpm"',
        'backend: "python"',
        "max_batch_size: 0",
        'input { name: "photo" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }',
        'input { name: "seed" data_type: TYPE_INT64 dims: [ 1 ] optional: true }',
        'output { name: "restored" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }',
        "instance_group { kind: KIND_CPU count: 2 }",
        *(f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()),
    ]
    (folder / "dtpm" / "config.pbtxt").write_text("\n".join(photos) + "\n")


def _tensor(role: str, spec: TensorSpec) -> str:
    dims = ", ".join("-1" if isinstance(side, str) else str(side) for side in spec.shape)
    return f'{role} {{ name: "{spec.name}" data_type: {TYPES[spec.dtype]} dims: [ {dims} ] }}'
