"""The training loop of both stages. Every random number of iteration i is a function of the seed and i alone: the batch
(by sample index), gamma and eps. A run that was killed and resumed therefore ends in the same bits on the CPU."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dtpm_fast import __version__
from dtpm_fast.atomic import atomic_path
from dtpm_fast.config import Config
from dtpm_fast.diffusion import sample_gamma, stage1_loss, stage2_loss
from dtpm_fast.errors import UserError
from dtpm_fast.model.block import use_kernels
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.training.checkpoints import newest_state, save_state
from dtpm_fast.training.ema import EMA
from dtpm_fast.training.validation import validate
from dtpm_fast.weights_file import save_weights

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """What to train, on what, and where to put it. A pair of stage I is (x_g, y_s), of stage II (y_d, y_g)."""

    model: DTPM
    config: Config
    task: str  # "" for stage I
    data: Dataset[Pair]
    validation: list[Pair]
    folder: Path
    device: torch.device
    about: dict[str, Any]  # goes into the weights file: data, device


def train(run: Run, resume: bool = False) -> Path:
    """Train to `config.train.steps` and return the path of the averaged weights.

    Raises `UserError` when the run folder already holds a run and `resume` is off, when it holds one of another config,
    when there is nothing to resume, and when the loss is no longer a number (the batch is saved).
    """
    settings = run.config.train
    model = run.model.to(run.device).to(memory_format=torch.channels_last)
    use_kernels(model, settings.kernels == "fused")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=settings.lr, betas=(0.9, 0.999))
    ema = EMA(trained, settings.ema)
    state = _resumed(run, resume)
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        ema.load(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["step"])
        print(f"resumed at iteration {first} of {settings.steps}")
    model.train()

    def checkpoint(step: int) -> Path:
        save_state(
            run.folder,
            step,
            {
                "config": run.config.to_json(), "stage": model.stage, "task": run.task,
                "model": model.state_dict(), "ema": ema.average, "optimizer": optimizer.state_dict(),
            },
            settings.keep_checkpoints,
        )  # fmt: skip
        weights = run.folder / "weights.safetensors"
        about = {**run.about, "steps": step, "version": __version__, "train": vars(settings)}
        with ema.applied():
            save_weights(weights, model.state_dict(), run.config, model.stage, run.task, about)
        return weights

    with SummaryWriter(str(run.folder / "tensorboard"), purge_step=first) as board:
        step = first
        progress = tqdm(total=settings.steps, initial=first, desc=f"stage {model.stage}", unit="it", disable=None)
        try:
            seen, since = 0, time.perf_counter()
            for pair in _batches(run, first):
                lr = learning_rate(step, run.config)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss, gradient = _iteration(run, model, trained, optimizer, pair, step)
                step += 1
                ema.update(step)
                progress.update()
                seen += pair[0].shape[0]
                if step % settings.log_every == 0 or step == settings.steps:
                    rate = seen / (time.perf_counter() - since)
                    seen, since = 0, time.perf_counter()
                    progress.set_postfix(loss=f"{loss.item():.4f}", images_per_s=f"{rate:.1f}")
                    scalars = {"loss": loss.item(), "lr": lr, "images_per_s": rate, "gradient_norm": gradient.item()}
                    for name, value in scalars.items():
                        board.add_scalar(f"train/{name}", value, step)
                if run.validation and (step % settings.validate_every == 0 or step == settings.steps):
                    with ema.applied():
                        results, picture = validate(model.eval(), run.config, run.validation, run.device)
                    model.train()
                    for name, value in results.items():
                        board.add_scalar(f"validation/{name}", value, step)
                    board.add_image("validation/input_predictor_result_target", picture, step)
                    progress.write(f"{step}: " + ", ".join(f"{name} {value:.4g}" for name, value in results.items()))
                    since = time.perf_counter()
                if step % settings.checkpoint_every == 0:
                    checkpoint(step)
        except KeyboardInterrupt:
            checkpoint(step)
            raise UserError(f"stopped at iteration {step}; the state is saved, go on with --resume") from None
        finally:
            progress.close()
    return checkpoint(step)


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then cosine from lr to lr_min."""
    train = config.train
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.lr_min + 0.5 * (train.lr - train.lr_min) * (1 + math.cos(math.pi * done))


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """`precision`: auto is bfloat16 on CUDA and float32 on the CPU."""
    name = config.train.precision
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16")


def _iteration(
    run: Run,
    model: DTPM,
    trained: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    pair: Pair,
    step: int,
) -> tuple[Tensor, Tensor]:
    """One optimiser step; returns the loss and the gradient's norm."""
    settings, diffusion = run.config.train, run.config.diffusion
    a, b = (x.to(run.device, non_blocking=True, memory_format=torch.channels_last) for x in pair)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    gamma = sample_gamma(a.shape[0], diffusion, generator).to(run.device)
    eps = torch.randn(a.shape, generator=generator).to(run.device, memory_format=torch.channels_last)
    with autocast(run.config, run.device):
        if model.stage == 1:
            loss = stage1_loss(model, diffusion, a, b, eps, gamma)
        else:
            loss, y_eps = stage2_loss(model, diffusion, b, a, eps, gamma)
            if settings.predictor_loss:
                loss = loss + settings.predictor_loss * (y_eps - b).abs().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip_grad or math.inf)
    if not torch.isfinite(loss) or not torch.isfinite(norm):
        saved = run.folder / f"bad-batch-{step:08d}.safetensors"
        with atomic_path(saved) as temporary:
            save_file({"first": a.cpu().contiguous(), "second": b.cpu().contiguous(), "gamma": gamma.cpu()}, temporary)
        raise UserError(
            f"iteration {step}: the loss is {loss.item()}, the gradient's norm {norm.item()}; the batch is in {saved}. "
            f"Lower lr, or use --set precision=float32, and --resume from the last checkpoint"
        )
    optimizer.step()
    return loss.detach(), norm


def _batches(run: Run, first: int) -> Iterator[Pair]:
    """Batches from iteration `first` to the last: sample indices go on where they stopped."""
    settings = run.config.train
    loader = DataLoader(
        run.data,
        settings.batch_size,
        sampler=range(first * settings.batch_size, settings.steps * settings.batch_size),
        num_workers=min(settings.workers, usable_cores()),
        pin_memory=run.device.type == "cuda",
        persistent_workers=False,
    )
    yield from loader


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resumed(run: Run, resume: bool) -> dict[str, Any] | None:
    state, broken = newest_state(run.folder)
    for line in broken:
        print(line)
    if not resume:
        if state is not None:
            raise UserError(
                f"{run.folder}: already holds a run at iteration {state['step']}; add --resume or choose another folder"
            )
        return None
    if state is None:
        raise UserError(f"{run.folder}: nothing to resume, no readable checkpoint in it")
    then, now = Config.from_json(state["config"]), run.config
    if (then.model, then.diffusion, state["stage"], state["task"]) != (
        now.model,
        now.diffusion,
        run.model.stage,
        run.task,
    ):
        raise UserError(
            f"{run.folder}: was started with another model, diffusion, stage or task; resume with the same settings"
        )
    return state
