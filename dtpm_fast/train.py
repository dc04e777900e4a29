"""`python -m dtpm_fast.train`: stage I on a folder of photos, stage II on pairs or on clean photos."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.exit_code import run as run_command
from dtpm_fast.given_path import given_path
from dtpm_fast.model.dtpm import DTPM, load_semantic_weights
from dtpm_fast.runtime.shipped import find_prior
from dtpm_fast.tasks import TASKS, check_task
from dtpm_fast.training.freeze import freeze
from dtpm_fast.training.loop import Run, train
from dtpm_fast.training.sources import stage1_source, stage2_source
from dtpm_fast.training.world import World
from dtpm_fast.weights_file import Weights, fill, fill_start, read_weights

EXAMPLES = """examples:
  python -m dtpm_fast.train --stage 1 --data photos --output runs/prior --set crop=96 batch_size=8 steps=2000
  python -m dtpm_fast.train --stage 2 --task derain --data rain --prior runs/prior/weights.safetensors \\
      --output runs/derain --set crop=96 batch_size=8 steps=6000
  python -m dtpm_fast.train --stage 2 --task dehaze --data photos --prior runs/prior/weights.safetensors \\
      --output runs/dehaze
  torchrun --nproc-per-node 8 -m dtpm_fast.train --stage 1 --data photos --output runs/prior
Every setting (--set, or a TOML file for --config) is described in dtpm_fast/config.py; the defaults are the paper's."""


def main(argv: list[str] | None = None) -> int:
    args = _parsed(argv)

    def work() -> int:
        _train(args)
        return 0

    return run_command(work)


def start(argv: list[str]) -> Path:
    """What the command does with these arguments, for other commands; returns the path of the averaged weights.
    Raises `UserError`."""
    return _train(_parsed(argv))


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dtpm_fast.train",
        description="Train DTPM: stage 1, the texture prior; stage 2, a task's adapters and initial predictor.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--task", choices=tuple(TASKS), help="stage 2 only")
    parser.add_argument(
        "--data", type=given_path, required=True, help="photos (stage 1); pairs or clean photos (stage 2)"
    )
    parser.add_argument(
        "--output", type=given_path, required=True, help="folder of the run: weights, checkpoints, TensorBoard"
    )
    parser.add_argument("--config", type=given_path, help="settings as a TOML file")
    parser.add_argument("--set", dest="settings", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--prior", help="stage 1 weights that stage 2 starts from: a file, or light, the prior that ships"
    )
    parser.add_argument("--init", type=given_path, help="weights that this run starts from (fine-tuning)")
    parser.add_argument(
        "--smoothed", type=given_path, help="stage 1: the photos as dtpm-smooth wrote them (else on the fly)"
    )
    parser.add_argument("--synthetic", type=given_path, help="stage 2: clean photos to degrade, beside the real pairs")
    parser.add_argument(
        "--split-file", type=given_path, help="stage 2: CSV or list that says which pictures train and test"
    )
    parser.add_argument(
        "--validation", type=given_path, help="folder to validate on (else a part of the data is held out)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --output")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; under torchrun auto, cpu or cuda")
    args = parser.parse_args(argv)
    if (args.stage == 2) != (args.task is not None):
        parser.error("--task belongs to --stage 2, and stage 2 needs it")
    if args.stage == 1 and (args.prior or args.synthetic or args.split_file):
        parser.error("--prior, --synthetic and --split-file belong to --stage 2")
    if args.stage == 2 and args.smoothed:
        parser.error("--smoothed belongs to --stage 1")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output}: is a file; a run needs a folder")
    return args


def _train(args: argparse.Namespace) -> Path:
    world = World.from_environment()
    device, why = world.device(args.device)
    world.say(f"device: {why}")
    prior = None if args.prior is None else find_prior(args.prior)
    defaults: dict[str, Any] = {}
    if prior is not None:
        defaults = {**asdict(prior.config.model), **asdict(prior.config.diffusion)}
        defaults["prior_sigma_data"] = prior.config.model.sigma_data
    init = None if args.init is None else read_weights(args.init)
    if init is not None:
        defaults |= _settings_of_start(init, prior, args.stage)
    config = Config.load(args.config, args.settings, defaults)
    if config.train.validation_steps > config.diffusion.timesteps:
        raise UserError(
            f"validation_steps = {config.train.validation_steps}: a schedule of timesteps = "
            f"{config.diffusion.timesteps} has no more steps"
        )
    if args.stage == 1 and config.train.tune != "adapters":
        raise UserError(f"tune = {config.train.tune!r}: belongs to stage 2; stage 1 trains the whole denoiser")
    if config.train.tune == "adapters_only" and init is None and not args.resume:
        raise UserError("tune = 'adapters_only': the predictor would stay untrained; --init gives one that is trained")
    model = _build(args, config, prior)
    freeze(model, config.train.tune)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise UserError(
            f"tune = {config.train.tune!r} with predictor = {config.model.predictor!r} and adapter_positions = "
            f"{config.model.adapter_positions!r}: leaves nothing to train"
        )
    if init is not None:
        fill_start(model, init, has_prior=prior is not None)
    if args.stage == 1:
        source = stage1_source(args.data, args.smoothed, args.validation, config.train, world.checks_data)
    else:
        task = check_task(args.task)
        source = stage2_source(
            task, args.data, args.split_file, args.synthetic, args.validation, config.train, world.checks_data
        )
    world.say(f"data: {source.about}; validation on {len(source.validation)} crops")
    world.say(
        f"model: {config.model.preset}, {trained / 1e6:.2f}M parameters train, sigma_data {config.model.sigma_data:g}"
    )
    if config.train.tune == "predictor" and prior is None:
        world.say("no --prior: the denoiser stays untrained; go on with --init on this run's weights")
    about = {"data": source.about, "device": why}
    if prior is not None:
        about["prior"] = prior.path.name
    if init is not None:
        about["started_from"] = args.init.name
    run = Run(model, config, args.task or "", source.data, source.validation, args.output, device, about, world)
    weights = train(run, args.resume)
    world.say(f"written: {weights}")
    return weights


def _settings_of_start(init: Weights, prior: Weights | None, stage: int) -> dict[str, Any]:
    """What of --init's config its tensors were trained for, though no shape shows it. Raises `UserError` for adapters
    that were trained for another kind of output than the prior's."""
    of = init.config.model
    if stage == 1:
        return {"parameterization": of.parameterization, "sigma_data": of.prior_sigma_data or of.sigma_data}
    names = [] if prior is not None else ["parameterization", "sigma_data", "prior_sigma_data"]  # of the denoiser
    if any(t.any() for name, t in init.tensors.items() if name.startswith("adapters.") and ".m_out." in name):
        if prior is not None and of.parameterization != prior.config.model.parameterization:
            raise UserError(
                f"{init.path}: cannot start from it: its adapters were trained for parameterization = "
                f"{of.parameterization!r}, the prior for {prior.config.model.parameterization!r}"
            )
        names += ["sigma_data", "condition", "code_source"]
    return {name: getattr(of, name) for name in names}


def _build(args: argparse.Namespace, config: Config, prior: Weights | None) -> DTPM:
    import torch

    torch.manual_seed(config.train.seed)
    model = DTPM(config.model, args.stage)
    load_semantic_weights(model)
    if prior is not None:
        _check_same_network(prior, config)
        fill(model, prior)
    elif args.stage == 2 and config.train.tune not in ("all", "predictor"):
        raise UserError(
            "stage 2 needs --prior, the weights of stage 1; or --set tune=all to do without stage 1 (table 6, row 1), "
            "or tune=predictor to train the initial predictor alone"
        )
    return model


def _check_same_network(prior: Weights, config: Config) -> None:
    names = (
        "preset",
        "width",
        "encoder_blocks",
        "middle_blocks",
        "decoder_blocks",
        "embedding",
        "semantic_code",
        "parameterization",
    )
    for name in names:
        then, now = getattr(prior.config.model, name), getattr(config.model, name)
        if then != now:
            raise UserError(
                f"{prior.path}: was trained with {name} = {then!r}, the settings say {now!r}; leave that setting out"
            )


if __name__ == "__main__":
    sys.exit(main())
