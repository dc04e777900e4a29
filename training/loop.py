"""The training loop of both stages, on one device or as one of several processes (`torchrun`). Every random number of
iteration i is a function of the seed and i alone: a run that was killed and resumed ends in the same bits on the CPU,
and N processes train as one with N times the batch."""

import inspect
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, default_collate

from dtpm_fast import __version__
from dtpm_fast.atomic import atomic_path
from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.model.block import use_kernels
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.training.acceleration import choose_compile, choose_kernels
from dtpm_fast.training.batches import Batch, Noisy, Pair, batches
from dtpm_fast.training.checkpoints import locked, newest_state, save_state
from dtpm_fast.training.determinism import determinism
from dtpm_fast.training.ema import EMA
from dtpm_fast.training.interrupt import interrupts_wait, sigterm_as_ctrl_c
from dtpm_fast.training.log import Log
from dtpm_fast.training.meter import Meter, peak_memory
from dtpm_fast.training.objective import Objective
from dtpm_fast.training.optimizers import make_optimizers
from dtpm_fast.training.precision import Precision
from dtpm_fast.training.recompute import recompute_blocks
from dtpm_fast.training.validation import score, validate
from dtpm_fast.training.world import World
from dtpm_fast.weights_file import save_weights


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
    world: World = field(default_factory=World)


def train(run: Run, resume: bool = False) -> Path:
    """Train to `config.train.steps` and return the path of the averaged weights. `weights-best.safetensors` beside them
    are those of the best validation.

    Processes that torchrun has started again resume what there is, whatever `resume` says.

    Raises `UserError` when the run folder already holds a run, or its weights, and `resume` is off, when it holds one
    of another config, when there is nothing to resume, when another process trains there, and when the loss is no
    longer a number (the batch is saved).
    """
    with determinism(run.config.train.deterministic), run.world.joined(run.device) as again:
        trainer = Trainer(run)
        # torchrun sends SIGTERM of its own, to the processes beside one that died.
        stops = sigterm_as_ctrl_c() if run.world.size == 1 else nullcontext()
        with stops, locked(run.folder) if run.world.leads else nullcontext():
            trainer.resume(None if again else resume)
            with Log(run.folder, run.model.stage, trainer.step, run.config.train.steps, not run.world.leads) as log:
                try:
                    trainer.run_to_the_end(log)
                except KeyboardInterrupt:
                    trainer.save()  # rank 0's task; the others only stop
                    raise UserError(
                        f"stopped at iteration {trainer.step}; the state is saved, --resume goes on"
                    ) from None
            return trainer.save()


class Trainer:
    """The state of a run, and what one iteration does to it."""

    def __init__(self, run: Run) -> None:
        self.run, settings = run, run.config.train
        self.precision = Precision(settings.precision, run.device)
        self.model = run.model.to(run.device).train()
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):  # beta and gamma stay as their gradients come, which DDP copies otherwise
                module.to(memory_format=torch.channels_last)
        fused, why = run.world.agreed(choose_kernels(settings.kernels, self.model, self.precision))
        use_kernels(self.model, fused)
        run.world.say(f"kernels: {why}")
        if settings.activation_checkpointing:
            recompute_blocks(self.model)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(settings.optimizer, self.trained.values(), settings.lr)
        self.ema = EMA(self.trained, settings.ema)
        self.objective: nn.Module = Objective(self.model, run.config)
        self.layout = torch.channels_last
        self.meter = Meter()
        self.step = 0
        self.best = -math.inf

    def run_to_the_end(self, log: Log) -> None:
        settings, world = self.run.config.train, self.run.world
        self.parallelise(self.first_batch)
        losses: list[Tensor] = []  # one batch says little: its noise levels are drawn at random
        loader = batches(self.run.data, self.run.config, self.step, world, self.run.device.type == "cuda")
        while self.step < settings.steps:
            with self.meter.waiting():
                share = list(islice(loader, settings.accumulate))
            loss, gradient = self.iterate(share)
            losses.append(loss)
            self.meter.count(settings.batch_size * settings.accumulate * world.size)
            log.bar.update()
            last = self.step == settings.steps
            if last or self.step % settings.log_every == 0:
                mean = world.mean(torch.stack(losses).mean())
                losses.clear()
                figures = {"loss": mean, "gradient_norm": gradient.item(), **self.meter.read()}
                figures["lr"] = self.optimizers[0].param_groups[0]["lr"]
                log.training(self.step, {**figures, "peak_memory_gib": peak_memory(self.run.device)})
            with self.meter.paused():
                if last or self.step % settings.validate_every == 0:
                    self._validate(log)
                if self.step % settings.checkpoint_every == 0:
                    log.flush()  # figures up to a state belong to it
                    self.save()

    def iterate(self, share: list[Batch]) -> tuple[Tensor, Tensor]:
        """One step of the optimiser over this process's batches; returns their mean loss and the gradient's norm, which
        is of all processes."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.run.config)
        total = torch.zeros((), device=self.run.device)
        for number, batch in enumerate(share):
            with self._exchanging(number == len(share) - 1):
                with self.precision.autocast():
                    loss = self.objective(*self._on_device(batch)) / len(share)
                self.precision.scaler.scale(loss).backward()
            total += loss.detach()
        for optimizer in self.optimizers:
            self.precision.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.run.config.train.clip_grad or math.inf)
        self._stop_unless_finite(total, norm, share)
        finite = bool(torch.isfinite(norm))
        with interrupts_wait():  # half an update must not be saved
            if finite:  # else all optimisers skip: the scaler would hold back those alone that overflowed
                for optimizer in self.optimizers:
                    self.precision.scaler.step(optimizer)
            self.precision.scaler.update()
            self.step += 1
            self.ema.update(self.step)
        return total, norm

    def save(self) -> Path:
        """The state and the averaged weights, by rank 0; returns the path of the weights."""
        run = self.run
        if run.world.leads:
            state = {
                "config": run.config.to_json(), "stage": self.model.stage, "task": run.task, "best": self.best,
                "validation": _fingerprint(run),
                "model": self.model.state_dict(), "ema": self.ema.average,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.precision.scaler.state_dict(),
            }  # fmt: skip
            save_state(run.folder, self.step, state, run.config.train.keep_checkpoints)
            with self.ema.applied():
                self._save_weights("weights.safetensors")
        return run.folder / "weights.safetensors"

    def resume(self, resume: bool | None) -> None:
        """Go on from the newest state that can be read: True, there must be one; False, there must be none; None, if
        there is one."""
        run = self.run
        state = _resumable(run, resume) if run.world.leads else None
        state = run.world.from_rank_0(state)  # the folder may be on the first machine alone
        if state is None:
            return
        if "prior" in run.about:
            given = self.model.state_dict()
            frozen = [name for name in given if name.startswith("denoiser.") and name not in self.trained]
            if any(not torch.equal(given[name].cpu(), state["model"][name]) for name in frozen):
                raise UserError(f"{run.folder}: was started with another --prior; resume with the same one")
        self.model.load_state_dict(state["model"])
        self.ema.load(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if state["scaler"]:  # empty, where the run before had none
            self.precision.scaler.load_state_dict(state["scaler"])
        if state.get("validation", mine := _fingerprint(run)) == mine:
            self.best = state["best"]
        elif run.validation:
            run.world.say("validates otherwise than before: weights-best begins anew")
        self.step = int(state["step"])
        run.world.say(f"resumed at iteration {self.step} of {run.config.train.steps}")

    def first_batch(self) -> Batch:
        """The run's first batch, of rank 0."""
        noisy = Noisy(self.run.data, self.run.config)
        return default_collate([noisy[i] for i in range(self.run.config.train.batch_size)])

    def parallelise(self, batch: Callable[[], Batch]) -> None:
        """Once the state is the one to go on from: the processes start from rank 0's. `batch` makes one of the run's,
        where the form of the loss is to be tried out first."""
        run, plain = self.run, self.objective
        compiled, why = choose_compile(
            run.config.train.compile, plain, lambda: list(self._on_device(batch())), self.precision
        )
        on, why = run.world.agreed((compiled is not plain, why))
        self.objective = compiled if on else plain
        run.world.say(f"compile: {why}")
        if run.world.size > 1:
            devices = [run.device] if run.device.type == "cuda" else None
            # Buffers never change: those of the semantic encoder are frozen with it.
            known = inspect.signature(DistributedDataParallel.__init__).parameters  # renamed in torch 2.15
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            options: dict[str, Any] = {name: False}
            self.objective = DistributedDataParallel(self.objective, devices, **options)

    def _exchanging(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged over the processes with the last of an iteration's batches."""
        return nullcontext() if last or self.run.world.size == 1 else self.objective.no_sync()  # type: ignore[operator]

    def _on_device(self, batch: Batch) -> Iterator[Tensor]:
        for x in batch:
            layout = self.layout if x.ndim == 4 else torch.preserve_format
            yield x.to(self.run.device, non_blocking=True, memory_format=layout)

    def _validate(self, log: Log) -> None:
        run = self.run
        if not run.world.leads or not run.validation:
            return
        with self.ema.applied():
            results, picture = validate(self.model.eval(), run.config, run.validation, run.device)
            reached = score(results)
            if reached > self.best:
                with interrupts_wait():  # a score without its weights would keep later ones out
                    self._save_weights("weights-best.safetensors", validation=results)
                    self.best = reached
        self.model.train()
        log.validation(self.step, results, picture)

    def _save_weights(self, name: str, **more: Any) -> None:
        run = self.run
        about = {**run.about, "steps": self.step, "version": __version__, "train": vars(run.config.train), **more}
        save_weights(run.folder / name, self.model.state_dict(), run.config, self.model.stage, run.task, about)

    def _stop_unless_finite(self, loss: Tensor, norm: Tensor, share: list[Batch]) -> None:
        if torch.isfinite(loss) and (torch.isfinite(norm) or self.precision.overflow_is_normal()):
            return
        rank = f"-rank{self.run.world.rank}" if self.run.world.size > 1 else ""
        saved = self.run.folder / f"bad-batch-{self.step:08d}{rank}.safetensors"
        names = ("first", "second", "eps", "gamma")
        batch = {name: torch.cat(parts) for name, parts in zip(names, zip(*share, strict=True), strict=True)}
        with atomic_path(saved) as temporary:
            save_file(batch, temporary)
        raise UserError(
            f"iteration {self.step}: the loss is {loss.item()}, the gradient's norm {norm.item()}; the batch is in "
            f"{saved}. Lower lr, or use --set precision=float32, and --resume from the last checkpoint"
        )


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then cosine from lr to lr_min."""
    train = config.train
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.lr_min + 0.5 * (train.lr - train.lr_min) * (1 + math.cos(math.pi * done))


def _fingerprint(run: Run) -> int:
    """Of what a validation's score depends on beside the weights: scores of another one cannot be compared."""
    number = run.config.train.validation_steps
    for image in (image for pair in run.validation for image in pair):
        number = zlib.crc32(image.numpy().tobytes(), number)
    return number


def _resumable(run: Run, resume: bool | None) -> dict[str, Any] | None:
    state, broken = newest_state(run.folder)
    for line in broken:
        print(line)
    if state is None:
        if resume:
            raise UserError(f"{run.folder}: nothing to resume, no readable checkpoint in it")
        if resume is False and (broken or any(run.folder.glob("weights*.safetensors"))):
            raise UserError(
                f"{run.folder}: holds an earlier run's weights and no checkpoint to go on from; choose another folder"
            )
        return None
    if resume is False:
        raise UserError(
            f"{run.folder}: already holds a run at iteration {state['step']}; add --resume or choose another folder"
        )
    then, now = Config.from_json(state["config"]), run.config
    before = then.model, then.diffusion, then.train.optimizer, then.train.tune, state["stage"], state["task"]
    if before != (now.model, now.diffusion, now.train.optimizer, now.train.tune, run.model.stage, run.task):
        raise UserError(
            f"{run.folder}: was started with another model, diffusion, optimizer, tune, stage or task; resume with the "
            "same settings"
        )
    return state
