"""`python -m dtpm_fast.training.ablate`: the rows of the paper's table 6, and the choices that the paper leaves open,
trained at one scale and measured on the same pairs."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtpm_fast.atomic import atomic_path
from dtpm_fast.config import Config
from dtpm_fast.device import choose_device
from dtpm_fast.diffusion import restore
from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run as run_command
from dtpm_fast.given_path import given_path
from dtpm_fast.metrics.perceptual import ALEXNET, Lpips
from dtpm_fast.metrics.protocols import PROTOCOLS, default_protocol
from dtpm_fast.tasks import TASKS, check_task
from dtpm_fast.train import start
from dtpm_fast.training.checkpoints import list_states
from dtpm_fast.training.sources import stage2_source
from dtpm_fast.training.world import World
from dtpm_fast.weights_file import load_model, read_weights


@dataclass(frozen=True)
class Row:
    """One ablation: settings of stage II, settings of both stages, and the paper's figures where it has any."""

    name: str
    stage2: tuple[str, ...] = ()
    both: tuple[str, ...] = ()
    stage1: bool = True
    paper_psnr: float | None = None
    paper_lpips: float | None = None


NO_ADAPTERS = "adapter_positions=none"
TABLE_6 = {
    "no-stage1": Row("w/o Stage I Training", ("tune=all",), stage1=False, paper_psnr=28.90, paper_lpips=0.074),
    "no-predictor": Row("w/o Initial Predictor", ("predictor=none",), paper_psnr=26.91, paper_lpips=0.079),
    "no-code": Row("w/o Semantic Code", both=("semantic_code=none",), paper_psnr=29.79, paper_lpips=0.0653),
    "encoder": Row("Fine-tune Enc. w/o Adapters", ("tune=encoder", NO_ADAPTERS), paper_psnr=29.20, paper_lpips=0.0667),
    "decoder": Row("Fine-tune Dec. w/o Adapters", ("tune=decoder", NO_ADAPTERS), paper_psnr=28.91, paper_lpips=0.0691),
    "encoder-decoder": Row(
        "Fine-tune Enc. & Dec. w/o Adapters", ("tune=encoder_decoder", NO_ADAPTERS),
        paper_psnr=29.13, paper_lpips=0.0712,
    ),
    "ours": Row("Ours (DTPM-4S)", paper_psnr=30.99, paper_lpips=0.0635),
}  # fmt: skip
# What the paper leaves open, each against our default, which is the row "ours".
OPEN_CHOICES = {
    "raw-eps": Row("raw ε output", both=("parameterization=eps",)),
    "l2": Row("L2 loss", both=("loss=l2",)),
    "min-snr": Row("min-SNR weighting", both=("loss_weighting=min_snr",)),
    "edm": Row("EDM weighting", both=("loss_weighting=edm",)),
    "discrete-gamma": Row("γ on the schedule", both=("gamma_sampling=discrete",)),
    "condition-predicted": Row("condition y_ε", ("condition=predicted",)),
    "code-degraded": Row("code of y_d", ("code_source=degraded",)),
    "encoder-adapters": Row("adapters in the encoder", ("adapter_positions=encoder",)),
    "decoder-adapters": Row("adapters in the decoder", ("adapter_positions=decoder",)),
    "gated-adapters": Row("gated adapters", ("adapter_kind=gated",)),
    "predictor-loss": Row("a loss on the predictor", ("predictor_loss=1.0",)),
}
ROWS = {**TABLE_6, **OPEN_CHOICES}
EXAMPLE = """example (minutes on a CPU; the paper's scale is preset=base without the other settings):
  python -m dtpm_fast.training.ablate --photos photos --task rainhaze --data Outdoor-Rain --output runs/table6 \\
      --set preset=light crop=96 batch_size=8 steps=2000 --set-prior steps=1000
rows of table 6, the default: """ + ", ".join(TABLE_6) + "\nopen choices: " + ", ".join(OPEN_CHOICES)  # fmt: skip


def ablate(
    rows: Sequence[str],
    output: Path,
    photos: Path,
    task: str,
    data: Path,
    settings: Sequence[str] = (),
    prior_settings: Sequence[str] = (),
    device: str = "auto",
    split_file: Path | None = None,
) -> list[dict[str, Any]]:
    """Train and measure the named rows; returns their figures in order. `output` keeps one folder for each run, and
    what is finished there is not run again. Raises `UserError` when it holds runs of other settings."""
    asked = {
        "photos": str(photos), "task": task, "data": str(data), "split_file": split_file and str(split_file),
        "settings": list(settings), "prior_settings": list(prior_settings),
    }  # fmt: skip
    for folder in (photos, data):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    for row in (ROWS[key] for key in rows):  # an error in any of them comes before the first one trains
        if Config.load(None, [*settings, *row.both, *row.stage2]).train.validation_images == 0:
            raise UserError("validation_images = 0: the rows are compared on validation images; set at least 1")
        Config.load(None, [*settings, *prior_settings, *row.both])
    _keep_to(output / "settings.json", asked)
    results = []
    for key in rows:
        row, folder = ROWS[key], output / key
        finished = folder / "result.json"
        if not finished.is_file():
            command = ["--stage", "2", "--task", task, "--data", str(data), "--device", device]
            command += [] if split_file is None else ["--split-file", str(split_file)]
            if row.stage1:
                name = "-".join(["prior", *row.both]).replace("=", "-")
                prior = ["--stage", "1", "--data", str(photos), "--device", device]
                command += ["--prior", str(_trained(output / name, prior, [*settings, *prior_settings, *row.both]))]
            weights = _trained(folder, command, [*settings, *row.both, *row.stage2])
            figures = measure(weights, task, data, split_file, device)
            paper = {"paper_psnr": row.paper_psnr, "paper_lpips": row.paper_lpips}
            _write(finished, {"row": key, "name": row.name, **figures, **paper})
        results.append(json.loads(finished.read_text(encoding="utf-8")))
    return results


def measure(weights: Path, task: str, data: Path, split_file: Path | None, device: str) -> dict[str, Any]:
    """Mean PSNR (dB, by the task's protocol) of input, predictor and result over the validation crops of a run, and
    LPIPS of the result where its backbone is on this machine and the crops are large enough, else None."""
    found = read_weights(weights)
    where, _ = choose_device(device)
    model, config = load_model(found, stage=2).to(where), found.config
    pairs = stage2_source(task, data, split_file, None, None, config.train, check=False).validation
    protocol = PROTOCOLS[default_protocol(task)]
    lpips = _lpips(where) if config.train.crop >= 64 else None
    generator = torch.Generator().manual_seed(0)
    sums = dict.fromkeys(("psnr_input", "psnr_predictor", "psnr", "lpips"), 0.0)
    for pair in pairs:
        y_d, y_g = (x[None].to(where) for x in pair)
        noise = torch.randn(y_d.shape, generator=generator).to(where)
        with torch.no_grad():
            result, y_eps = restore(model, y_d, noise, config.train.validation_steps, config.diffusion, generator)
        target = _from_model(y_g)
        for name, image in {"psnr_input": y_d, "psnr_predictor": y_eps, "psnr": result}.items():
            sums[name] += protocol.compare(_from_model(image), target)[protocol.headline[0]]
        if lpips is not None:
            sums["lpips"] += lpips(protocol.rounded(_from_model(result)), target)
    means: dict[str, Any] = {name: value / len(pairs) for name, value in sums.items()}
    about = {"images": len(pairs), "protocol": protocol.name, "sampler_steps": config.train.validation_steps}
    return {**means, **about, "training_steps": config.train.steps, "lpips": means["lpips"] if lpips else None}


def table(results: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, the paper's figures beside ours."""
    first = results[0]
    lines = [
        f"{first['images']} validation crops, {first['training_steps']} iterations of stage II, "
        f"{first['sampler_steps']} sampler steps, protocol {first['protocol']}; input {first['psnr_input']:.2f} dB",
        "",
        "| model | PSNR | predictor alone | LPIPS | paper: PSNR | paper: LPIPS |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = [r["name"], _cell(r["psnr"], 2), _cell(r["psnr_predictor"], 2), _cell(r["lpips"], 4)]
        lines.append("| " + " | ".join([*cells, _cell(r["paper_psnr"], 2), _cell(r["paper_lpips"], 4)]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.training.ablate",
        description="Train and measure the rows of the paper's table 6 at a given scale; finished rows are kept.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--photos", type=given_path, required=True, help="photos for stage I")
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    parser.add_argument("--data", type=given_path, required=True, help="pairs, or clean photos, for stage II")
    parser.add_argument("--split-file", type=given_path, help="CSV or list that says which pictures train and test")
    parser.add_argument("--output", type=given_path, required=True, help="folder of the runs and of the table")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(TABLE_6), metavar="ROW")
    parser.add_argument("--set", dest="settings", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--set-prior", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="settings of stage I alone"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)

    def work() -> int:
        if World.from_environment().size > 1:
            raise UserError("the ablations run as one process; without torchrun, give parts of --rows to each GPU")
        results = ablate(
            args.rows, args.output, args.photos, check_task(args.task), args.data,
            args.settings, args.set_prior, args.device, args.split_file,
        )  # fmt: skip
        _write(args.output / "table.json", results)
        with atomic_path(args.output / "table.md") as temporary:
            temporary.write_text(table(results) + "\n", encoding="utf-8")
        print(table(results))
        return 0

    return run_command(work)


def _trained(folder: Path, command: list[str], settings: list[str]) -> Path:
    """The averaged weights of a run, begun, gone on with or long finished."""
    weights = folder / "weights.safetensors"
    if weights.is_file() and read_weights(weights).trained.get("steps") == Config.load(None, settings).train.steps:
        return weights
    command = [*command, "--output", str(folder), *(["--resume"] if list_states(folder) else [])]
    command += ["--set", *settings] if settings else []
    print("python -m dtpm_fast.train " + " ".join(command), flush=True)
    return start(command)


def _keep_to(file: Path, asked: dict[str, Any]) -> None:
    if not file.is_file():
        _write(file, asked)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in asked.items():
        if before.get(name) != value:
            raise UserError(
                f"{file.parent}: holds rows of {name} = {before.get(name)}, not {value}; choose another --output"
            )


def _lpips(device: torch.device) -> Lpips | None:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET.file_name
    if ALEXNET.variable in os.environ or cached.is_file():
        return Lpips(device)
    print(f"LPIPS is left out: set {ALEXNET.variable} to the file {ALEXNET.file_name}")
    return None


def _from_model(image: Tensor) -> Tensor:
    return (image.float().cpu() * 0.5 + 0.5).clamp(0, 1)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _write(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
