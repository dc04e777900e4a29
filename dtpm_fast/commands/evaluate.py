"""`dtpm-evaluate`: mean figures of the input, the predictor's picture and the result, beside the paper's."""

import argparse
import csv
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dtpm_fast import __version__
from dtpm_fast.atomic import atomic_path
from dtpm_fast.commands.tile import add_tile
from dtpm_fast.cores import cpu_name
from dtpm_fast.data.layouts import SPLITS, find_pairs
from dtpm_fast.data.pictures import check_pairs
from dtpm_fast.exit_code import run
from dtpm_fast.given_path import given_path
from dtpm_fast.images import SUFFIXES
from dtpm_fast.tasks import TASKS

if TYPE_CHECKING:  # they import torch: not for --help or a mistyped path
    import torch

    from dtpm_fast.data.layouts import Pairs
    from dtpm_fast.metrics.evaluation import Method, Row, Scored
    from dtpm_fast.metrics.niqe import Niqe
    from dtpm_fast.metrics.perceptual import Lpips, PatchFid
    from dtpm_fast.metrics.protocols import Protocol
    from dtpm_fast.report import Case
    from dtpm_fast.training.world import World

EXAMPLE = """examples:
  dtpm-evaluate --task derain --data rain100L --split-file split.csv --json result.json --report result.html
  dtpm-evaluate --task deblur --data GoPro --weights runs/deblur/weights.safetensors --steps 4 10 50 --csv images.csv
  dtpm-evaluate --task raindrop --data RainDrop --weights drop.safetensors --protocol weatherdiff --note "test set A"
  dtpm-evaluate --task derain --data rain100L --weights derain-onnx/   # what dtpm-export wrote, as it will run
  torchrun --nproc-per-node 8 -m dtpm_fast.commands.evaluate --task deblur --data GoPro --weights deblur.safetensors
The table goes to standard output as Markdown. Protocols and metrics are described in docs/evaluation.md."""
PREDICTOR = "initial predictor"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 on a failure, 2 on bad usage."""
    parser = argparse.ArgumentParser(
        prog="dtpm-evaluate",
        description="Measure a restorer on a test set, and print the paper's table with our rows beside its own.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", required=True, choices=tuple(TASKS))
    parser.add_argument("--data", required=True, type=given_path, metavar="DIR", help="the data set, in its own layout")
    parser.add_argument("--split", default="test", choices=SPLITS, help="default: test")
    parser.add_argument(
        "--split-file", type=given_path, metavar="FILE", help="CSV (name, split) or list that chooses pictures"
    )
    parser.add_argument(
        "--weights",
        default="light",
        help="weights file, a folder of dtpm-export, or the name of shipped ones (default: light)",
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", metavar="S", help="steps of the sampler (default: 4, or the export's own)"
    )
    parser.add_argument(
        "--protocol",
        choices=("native", "weatherdiff", "gopro", "dpdd"),
        help="default: gopro for deblur, dpdd for defocus, native for the weather tasks",
    )
    parser.add_argument("--json", type=given_path, metavar="FILE", help="everything that was measured, and on what")
    parser.add_argument("--csv", type=given_path, metavar="FILE", help="the figures of every picture")
    parser.add_argument("--report", type=given_path, metavar="FILE", help="an HTML page to look at the pictures")
    parser.add_argument(
        "--curve",
        type=given_path,
        metavar="FILE.svg",
        help="the paper's figure 8: PSNR and LPIPS over the numbers of steps",
    )
    parser.add_argument("--report-images", type=int, default=12, metavar="N", help="pictures in the page (default: 12)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures by name")
    parser.add_argument("--note", default="", help="printed below the table, for instance that the data is synthetic")
    parser.add_argument("--lpips", default="auto", metavar="auto|off|FILE", help="FILE: torchvision's AlexNet")
    parser.add_argument(
        "--fid",
        default="auto",
        metavar="auto|off|FILE",
        help="auto: for deblur only; FILE: torch-fidelity's InceptionV3",
    )
    parser.add_argument(
        "--niqe", default="off", metavar="auto|off|FILE", help="FILE: niqe_pris_params.npz (default: off)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--backend", default="auto", help="as dtpm-restore (default: auto)")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="of the network")
    parser.add_argument("--sampler", default="ddim", choices=("ddim", "dpm++2m"), help="default: ddim, the paper's")
    add_tile(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the same for every picture (default: 0)")
    options = parser.parse_args(arguments)
    for name in ("limit", "report_images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if options.steps and len(set(options.steps)) < len(options.steps):
        parser.error("--steps: a number of steps is given twice")
    if options.curve and len(options.steps or ()) < 2:
        parser.error("--curve: needs two numbers of steps at least, as in --steps 4 10 50")
    taken = {os.path.realpath(options.weights): "--weights"}
    if options.split_file:
        taken[os.path.realpath(options.split_file)] = "--split-file"
    for flag in ("json", "csv", "report", "curve"):
        path = getattr(options, flag)
        if path is None:
            continue
        if path.is_dir():
            parser.error(f"--{flag} {path}: is a folder, give a file name")
        if path.suffix.lower() in SUFFIXES:
            parser.error(f"--{flag} {path}: has the name of a picture")
        if other := taken.get(os.path.realpath(path)):
            parser.error(f"--{flag} {path}: is {other} as well, and would replace it")
        if os.path.realpath(options.weights) in map(str, Path(os.path.realpath(path)).parents):
            parser.error(f"--{flag} {path}: would lie in --weights, a folder whose files go together")
        taken[os.path.realpath(path)] = f"--{flag}"
        folder = next(p for p in path.absolute().parents if p.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            parser.error(f"--{flag} {path}: cannot be written, {folder} is no folder that you may write in")
    command = shlex.join(["dtpm-evaluate", *(sys.argv[1:] if arguments is None else arguments)])
    return run(lambda: _evaluate(options, command))


def _evaluate(options: argparse.Namespace, command: str) -> int:
    found = find_pairs(options.task, options.data, options.split, options.split_file)  # before torch is imported

    import torch

    from dtpm_fast.training.world import World

    world = World.from_environment()
    if world.size > 1:
        options.device = str(world.device(options.device)[0])
    with world.joined(torch.device("cpu")):  # figures are exchanged, and they are on the CPU
        return _measure(options, command, found, world)


def _measure(options: argparse.Namespace, command: str, found: "Pairs", world: "World") -> int:
    """Every process scores its share of the pictures; rank 0 writes."""
    pairs = found.pairs[: options.limit]

    from dtpm_fast.metrics.evaluation import INPUT, check_sizes, mean_figures, score
    from dtpm_fast.metrics.paper_tables import comparison
    from dtpm_fast.metrics.protocols import PROTOCOLS, default_protocol
    from dtpm_fast.report import evenly

    share = pairs[world.rank :: world.size]
    sizes = check_pairs(share) if share else []  # a broken picture at the end would cost all figures
    protocol = PROTOCOLS[options.protocol or default_protocol(options.task)]
    weights = _weights(options)
    options.steps = options.steps or [_default_steps(options.weights)]
    methods, device, restorers = _methods(options)
    logging.basicConfig(format="%(message)s")  # to standard error: where a picture is tiled, its figures are another's
    logging.getLogger("dtpm_fast").setLevel(logging.INFO)
    lpips, fid, niqe, left_out = _perceptual(options, [INPUT, *methods], device)
    check_sizes(share, sizes, protocol, lpips, niqe)
    for line in [*restorers, *left_out] if world.leads else []:
        print(line, file=sys.stderr)

    shown = evenly(len(pairs), options.report_images) if options.report else set()
    own: dict[int, tuple[Row, Case | None]] = {}
    scores = score(pairs, methods, protocol, lpips, fid, niqe, world.rank, world.size)
    numbers = range(world.rank, len(pairs), world.size)
    for number, scored in zip(
        tqdm(numbers, unit="picture", disable=None if world.leads else True), scores, strict=True
    ):
        own[number] = scored.row, _case(scored) if number in shown else None
    distances = fid.compute() if fid else {}
    everything = {number: entry for share in world.gathered(own) for number, entry in share.items()}
    if not world.leads:
        return 0
    rows = [everything[number][0] for number in range(len(pairs))]
    kept = [case for number in range(len(pairs)) if (case := everything[number][1])]
    means = mean_figures(rows)
    for name, distance in distances.items():
        means[name]["fid"] = distance

    table = comparison(options.task, protocol, means, len(rows), str(options.data), options.note)
    facts = _asked(options, command, found, weights, protocol, device) | {
        "processes": world.size,
        "restorers": restorers,
        "versions": _versions(),
        "left_out": left_out,
        "fid_patches": fid.patches if fid else 0,
        "mean": means,
    }
    if options.json:
        per_image = [{"name": r.name, "width": r.width, "height": r.height, "figures": r.figures} for r in rows]
        _write_text(options.json, json.dumps({**facts, "per_image": per_image}, indent=1, allow_nan=False) + "\n")
    if options.csv:
        _write_csv(options.csv, rows)
    if options.curve:
        _write_curve(options, means, protocol.headline)
    if options.report:
        _write_report(options, kept, len(rows), facts, means)
    print(table)  # last: the files are there, whatever becomes of the output
    exported = f", exported ({weights['export']}, {weights['precision']})" if "export" in weights else ""
    print(f"- Weights {weights['file']}{exported}, {facts['device']}, {facts['date'][:10]}: `{command}`", flush=True)
    return 0


def _asked(
    options: argparse.Namespace,
    command: str,
    found: "Pairs",
    weights: dict[str, Any],
    protocol: "Protocol",
    device: "torch.device",
) -> dict[str, Any]:
    """What is measured, and on what."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "task": options.task,
        "data": str(options.data),
        "layout": found.layout,
        "split": options.split,
        "split_file": str(options.split_file) if options.split_file else None,
        "images": len(found.pairs[: options.limit]),
        "protocol": {
            "name": protocol.name,
            "about": protocol.about,
            "psnr": protocol.headline[0],
            "ssim": protocol.headline[1],
        },
        "steps": options.steps,
        "seed": options.seed,
        "tile": options.tile or "none",
        "note": options.note,
        "weights": weights,
        "device": _device_name(device),
    }


def _weights(options: argparse.Namespace) -> dict[str, Any]:
    """What is told of them."""
    from dtpm_fast.runtime.shipped import find_weights, is_export
    from dtpm_fast.weights_file import sha256

    if is_export(options.weights):
        from dtpm_fast.export.manifest import read_manifest

        manifest = read_manifest(Path(options.weights))
        return {**manifest.weights, "task": manifest.task, "export": manifest.kind, "precision": manifest.precision}
    weights = find_weights(options.weights, options.task)
    return {
        "file": weights.path.name,
        "sha256": sha256(weights.path),
        "task": weights.task,
        "trained": weights.trained,
        "config": json.loads(weights.config.to_json()),
    }


def _default_steps(weights: str) -> int:
    """An export holds its own, as many as it has timesteps."""
    from dtpm_fast.runtime.shipped import is_export

    if not is_export(weights):
        return 4
    from dtpm_fast.export.manifest import read_manifest

    return len(read_manifest(Path(weights)).steps)


def _methods(options: argparse.Namespace) -> tuple[dict[str, "Method"], "torch.device", list[str]]:
    """The predictor alone, and the result for each number of steps; the device; a line about each restorer."""
    from dtpm_fast.runtime.restorer import Restorer

    restorers = {
        _steps_name(steps): Restorer.from_pretrained(
            options.weights,
            options.task,
            steps,
            options.device,
            options.backend,
            options.seed,
            tile=options.tile,
            precision=options.precision,
            sampler=options.sampler,
        )
        for steps in options.steps
    }
    first = next(iter(restorers.values()))
    about = [restorer.about for restorer in restorers.values()]
    return {PREDICTOR: first.predict, **restorers}, first.device, about


def _steps_name(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def _perceptual(
    options: argparse.Namespace, methods: list[str], device: "torch.device"
) -> tuple["Lpips | None", "PatchFid | None", "Niqe | None", list[str]]:
    """The metrics that need a file, and a line for each that was wanted and is left out."""
    from dtpm_fast.metrics.niqe import Niqe
    from dtpm_fast.metrics.perceptual import Lpips, PatchFid
    from dtpm_fast.pretrained import BackboneMissing

    left_out: list[str] = []

    def build(wanted: str, by_default: bool, make: Callable[[str | None], Any]) -> Any:
        if wanted == "off" or (wanted == "auto" and not by_default):
            return None
        try:
            return make(None if wanted == "auto" else wanted)
        except BackboneMissing as error:
            left_out.append(str(error))
            return None

    lpips = build(options.lpips, True, lambda file: Lpips(device, file))
    fid = build(options.fid, options.task == "deblur", lambda file: PatchFid(methods, device, file))
    niqe = build(options.niqe, True, Niqe)
    return lpips, fid, niqe, left_out


def _write_csv(path: Path, rows: Sequence["Row"]) -> None:
    """One line per picture and method."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,  # names that are no UTF-8
    ):
        figures = list(next(iter(rows[0].figures.values())))
        writer = csv.writer(file)
        writer.writerow(["name", "width", "height", "method", *figures])
        for row in rows:
            for method, found in row.figures.items():
                writer.writerow([row.name, row.width, row.height, method, *(f"{found[name]:.6f}" for name in figures)])


def _write_curve(options: argparse.Namespace, means: dict[str, dict[str, float]], headline: tuple[str, str]) -> None:
    """PSNR and LPIPS over the steps; SSIM where LPIPS was left out."""
    from dtpm_fast.metrics.curve import write_curve

    figures = {float(steps): means[_steps_name(steps)] for steps in options.steps}
    distortion, ssim = headline
    perception = "lpips" if all("lpips" in found for found in figures.values()) else ssim
    write_curve(options.curve, figures, distortion, perception, f"{options.task} on {options.data.name}")


def _case(scored: "Scored") -> "Case":
    """A picture of the report, in 8 bits: the tensors behind it need not be kept."""
    from dtpm_fast.report import Case, Picture

    def picture(label: str, image: "torch.Tensor", figures: dict[str, float]) -> Picture:
        rgb = (image[0].permute(1, 2, 0) * 255).round().clamp(0, 255).byte().numpy()
        return Picture(label, rgb, figures)

    versions = [picture(name, image, scored.row.figures[name]) for name, image in scored.images.items()]
    return Case(scored.row.name, versions, picture("ground truth", scored.target, {}))


def _write_report(
    options: argparse.Namespace, cases: Sequence["Case"], total: int, facts: dict[str, Any], means: dict[str, Any]
) -> None:
    from dtpm_fast.report import chosen, write_report

    about = {
        "Data": f"{options.data}, {total} pictures; {chosen(len(cases), total)}",
        "Protocol": f"{facts['protocol']['name']}: {facts['protocol']['about']}",
        "Restorer": " | ".join(facts["restorers"]),
        "Date": facts["date"][:10],
        "Command": facts["command"],
        **({"Note": options.note} if options.note else {}),
        **({"Left out": "; ".join(facts["left_out"])} if facts["left_out"] else {}),
    }
    write_report(cases, options.report, title=f"dtpm-evaluate: {TASKS[options.task]}", about=about, means=means)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _device_name(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    import numpy
    import torch
    import torchmetrics
    import torchvision

    modules = {"torch": torch, "torchvision": torchvision, "torchmetrics": torchmetrics, "numpy": numpy}
    return {
        "dtpm-fast": __version__,
        "python": platform.python_version(),
        **{name: str(module.__version__) for name, module in modules.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
