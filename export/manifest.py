"""manifest.json: all that a host program needs beside the graphs, and the hashes that tie a folder together.

`manifest.sha256` holds the manifest's own hash (`sha256sum -c manifest.sha256` checks it), the manifest those of every
other file.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.runtime.sampler import Steps
from dtpm_fast.weights_file import sha256

FORMAT = "dtpm-export-1"
NAME = "manifest.json"
COLUMNS = ("c_in", "x0_x", "x0_f", "a", "b", "c", "limit")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output. A side is a number, "batch", "height", "width", or "height/4": a quarter of it."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sides(self, batch: int, height: int, width: int) -> tuple[int, ...]:
        """The shape in numbers."""
        values = {"batch": batch, "height": height, "width": width}
        found = []
        for side in self.shape:
            if isinstance(side, str):
                name, _, divisor = side.partition("/")
                found.append(values[name] // int(divisor or 1))
            else:
                found.append(side)
        return tuple(found)


@dataclass(frozen=True)
class GraphSpec:
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass
class Manifest:
    """The content of manifest.json; docs/export.md explains every field."""

    kind: str  # onnx, aoti, tensorrt
    task: str
    preset: str
    precision: str
    multiple: int  # height and width must be multiples of it
    sampler: dict[str, Any]
    noise_fields: int
    graphs: dict[str, GraphSpec]
    weights: dict[str, Any]
    versions: dict[str, str]
    compared: list[dict[str, Any]] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)  # what a file for one device only was built for
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def steps(self) -> Steps:
        """The sampler's steps, as the runtime holds them."""
        rows = [[math.inf if v is None else v for v in row] for row in self.sampler["table"]]
        gammas = torch.tensor(self.sampler["gammas"], dtype=torch.float64)
        return Steps(gammas, torch.tensor(rows, dtype=torch.float64), tuple(self.sampler["sigmas"]))

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            **dataclasses.asdict(self),
            "image": {
                "layout": "NCHW, RGB, float32",
                "range": [-1.0, 1.0],
                "from_uint8": "v / 127.5 - 1",
                "to_uint8": "round(v * 127.5 + 127.5), clipped to 0..255",
                "padding": f"mirrored at the lower and right border to multiples of {self.multiple}; crop afterwards",
            },
            "noise": {
                "shape": [self.noise_fields, 3, "height", "width"],
                "distribution": "standard normal, float32; the whole batch shares it",
                "use": "field 0 is x at the start; a step with sigma > 0 adds sigma times the next field to its result",
            },
            "result": "clip(y_eps + x after the last step, -1, 1)",
        }
        return json.dumps(content, indent=1) + "\n"


def sampler_of(steps: Steps) -> dict[str, Any]:
    """The sampler as JSON: the graphs hold these numbers too, they are here to be read. A limit of null is none."""
    table = [[None if math.isinf(v) else v for v in row] for row in steps.table.tolist()]
    return {
        "steps": len(steps),
        "gammas": steps.gammas.tolist(),
        "columns": list(COLUMNS),
        "table": table,
        "sigmas": list(steps.sigmas),
    }


def specs(named: dict[str, Tensor], batch: int, height: int, width: int) -> tuple[TensorSpec, ...]:
    """Specs of tensors that were made from an image (batch, 3, height, width)."""
    found = []
    for name, value in named.items():
        shape: list[int | str] = list(value.shape)
        if value.ndim == 4:
            factor = height // value.shape[2]
            shape[2:] = ["height", "width"] if factor == 1 else [f"height/{factor}", f"width/{factor}"]
        if value.ndim in (2, 4) and name != "noise":
            shape[0] = "batch"
        found.append(TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(shape)))
    return tuple(found)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash the folder's files into the manifest and write it, and its own hash beside it."""
    manifest.files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (NAME, "manifest.sha256")
    }
    text = manifest.to_json().encode()
    (folder / NAME).write_bytes(text)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  {NAME}\n")


def read_manifest(folder: Path | str) -> Manifest:
    """Raises `UserError` when the folder is no export of ours, the manifest was changed, or a file is missing or is not
    the one that was exported."""
    folder = Path(folder)
    path = folder / NAME
    try:
        text = path.read_bytes()
        recorded = (folder / "manifest.sha256").read_text().split()
        if not recorded or hashlib.sha256(text).hexdigest() != recorded[0]:
            raise UserError(f"{path}: was changed after the export (manifest.sha256 does not match); export again")
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path}: not an export of dtpm-fast (no {FORMAT!r} in it)")
        graphs = {name: _graph(graph) for name, graph in content["graphs"].items()}
        names = {f.name for f in dataclasses.fields(Manifest)}
        manifest = Manifest(**{**{k: v for k, v in content.items() if k in names}, "graphs": graphs})
        hashes = {name: entry["sha256"] for name, entry in manifest.files.items()}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; is {folder} a folder that dtpm-export wrote?") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable manifest ({error})") from error
    for name in (*manifest.files, *(graph.file for graph in manifest.graphs.values())):
        if name not in manifest.files or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path}: names {name!r}, which is none of the export's files; export again")
    for name, recorded_hash in hashes.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: is missing from the export; export again")
        if sha256(file) != recorded_hash:
            raise UserError(f"{file}: is not the file that was exported (SHA-256 differs); export again")
    return manifest


def _graph(content: dict[str, Any]) -> GraphSpec:
    def tensors(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in items)

    return GraphSpec(content["file"], tensors(content["inputs"]), tensors(content["outputs"]))
