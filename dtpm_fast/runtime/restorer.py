"""A photo in, a better photo out."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtpm_fast.config import Config
from dtpm_fast.device import choose_device, without_tf32
from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.runtime.backends import choose_backend
from dtpm_fast.runtime.graph import Graph
from dtpm_fast.runtime.memory import budget, check_fits, choose_tile, needed
from dtpm_fast.runtime.noise import check_seed, noise_fields
from dtpm_fast.runtime.photo import from_network, open_photo, pad_to, round_up, to_network
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.sampler import Stepper, make_steps
from dtpm_fast.runtime.shipped import find_weights, is_export, locate
from dtpm_fast.runtime.task_swap import TaskSwap
from dtpm_fast.runtime.tiling import SMALLEST, Progress, Tiled
from dtpm_fast.weights_file import Weights, load_model

logger = logging.getLogger("dtpm_fast")
Work = Callable[[Stepper, Tensor, Tensor], Tensor]  # of a backend, y_d and noise


class Restorer:
    """Restores photos of any size with one set of weights.

    `about` says in one line what runs; it is also logged (logger "dtpm_fast", level INFO).

    Args:
        weights: of stage II (`find_weights`).
        steps: S of the sampler.
        device: "auto", "cpu", "cuda" or "cuda:N".
        backend: "auto", "reference", "fused", "compiled" or "graph" (`choose_backend`).
        seed: of the noise.
        tile: side of a tile's core in pixels; None or "none" never tiles, "auto" does where the memory asks for it.
        precision: "auto", "float32" or "bfloat16", of the network's maps.
        sampler: "ddim", the paper's, or "dpm++2m".

    Raises `UserError` for settings out of range and for CUDA where there is none.
    """

    progress: Progress | None = None  # what is told how far a picture is that goes in tiles (`Tiled`)

    def __init__(
        self,
        weights: Weights,
        *,
        steps: int = 4,
        device: str = "auto",
        backend: str = "auto",
        seed: int = 0,
        tile: int | str | None = "auto",
        precision: str = "auto",
        sampler: str = "ddim",
    ) -> None:
        self.device, why_device = choose_device(device)
        self.seed, self.tile = check_seed(seed), _check_tile(tile)
        self.config = weights.config
        self.steps, self._sampler = make_steps(weights.config, steps, sampler), sampler
        self.model = _load(weights, self.device)
        self.multiple = self.model.multiple
        self.backend, why_backend = choose_backend(backend, self.model, self.steps, self.device, precision)
        if isinstance(self.backend, Reference) and isinstance(self.tile, int):
            raise UserError(f"tile {tile}: the reference backend does not tile; use --backend fused")
        self._folded: Plan | None = None  # the plan for tiles, where the backend's own has fused kernels
        self._tasks: TaskSwap | None = None  # from the first change of task on
        self._name: str | Path = weights.path  # what set_task finds tasks by
        self._running = (weights.path.resolve(), weights.path.stat().st_mtime_ns, weights.task)
        self._abouts = {self._running: _describe(weights)}
        self._why = f"{len(self.steps)} steps; device {why_device}; {why_backend}"
        logger.info("%s", self.about)

    @property
    def task(self) -> str:
        """What the weights that run were trained for."""
        return self._running[2]

    @property
    def about(self) -> str:
        """Which weights run and how they were trained; the steps, device, backend and precision, and why."""
        return f"{self._abouts[self._running]}; {self._why}"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "light",
        task: str | None = None,
        steps: int | None = None,
        device: str = "auto",
        backend: str = "auto",
        seed: int = 0,
        **settings: Any,
    ) -> "Restorer":
        """A restorer from shipped weights ("light"), from a file that stage II of the training wrote, or from a folder
        that `dtpm-export` wrote, which runs in its own backend (onnx, aoti, tensorrt).

        Left out, the task is the file's or folder's own, of a name derain; steps are 4, or a folder's own. `settings`
        are the constructor's: tile, precision, sampler.

        Raises `UserError` for an unknown name, task, device or backend, for weights of another task or of stage I, for
        a number of steps outside 1..T, and for settings that differ from a folder's.
        """
        if is_export(name_or_path):
            # Against the direction of imports, for one call that takes all that can restore; only when there is one.
            from dtpm_fast.export.restorer import ExportedRestorer

            return ExportedRestorer(
                name_or_path, task=task, steps=steps, device=device, backend=backend, seed=seed, **settings
            )
        weights = find_weights(name_or_path, task)
        steps = 4 if steps is None else steps
        restorer = cls(weights, steps=steps, device=device, backend=backend, seed=seed, **settings)
        restorer._name = name_or_path
        return restorer

    @torch.inference_mode()
    def __call__(self, photo: Any) -> Any:
        """The restored photo, of the kind and size that came in: a path or a Pillow image gives a Pillow image (RGB),
        an HxWx3 uint8 array an array, a (B, 3, H, W) floating-point tensor in [0, 1] a tensor. Any size, 1x1 included.
        The same photo, seed and machine give the same bytes.

        Raises `UserError` for an unreadable file or too little memory, `TypeError` or `ValueError` for a wrong object.
        """
        batch, back = open_photo(photo)
        return back(self._run(batch, lambda stepper, y_d, noise: stepper.restore(y_d, noise)))

    @torch.inference_mode()
    def predict(self, photo: Any) -> Any:
        """y_eps, the initial predictor's picture of the photo, which the diffusion adds its texture to. Takes, returns
        and raises what a call does."""
        batch, back = open_photo(photo)
        return back(self._run(batch, lambda stepper, y_d, _: stepper.prepare(y_d)["y_eps"]))

    def warmup(self, sizes: Iterable[tuple[int, int]] = ((256, 256),), batch: int = 1) -> float:
        """Restore a grey picture of every (height, width), so that compilers, autotuners and graph captures are done.
        Returns the seconds it took."""
        start = time.perf_counter()
        for height, width in [size for size in sizes for _ in range(2)]:  # graphs are captured the second time
            self(torch.full((batch, 3, height, width), 0.5, device=self.device))
        seconds = time.perf_counter() - start
        logger.info("warm after %.1f s", seconds)
        return seconds

    def set_task(self, task: str, name_or_path: str | Path | None = None) -> None:
        """Take another task's weights in place, by default those of the name that this restorer was made with. Nothing
        is compiled or captured again, and a task that ran before costs a copy of its adapters and predictor: a few
        milliseconds. `about` says what runs now.

        Raises `UserError` for a task without weights and for weights of another network; the task that ran goes on."""
        name = self._name if name_or_path is None else name_or_path
        path = locate(str(name), task)
        key = (path.resolve(), path.stat().st_mtime_ns, task)
        if self._tasks is None:
            self._tasks = TaskSwap(_tensors(self.model, self._running_steppers()), self._running)
        if key not in self._abouts:
            weights = find_weights(path, task)
            if not self._same_network(weights.config):
                raise UserError(f"{path}: is for another network than the one that runs; make a new Restorer")
            model, steps = _load(weights, self.device), make_steps(weights.config, len(self.steps), self._sampler)
            self._tasks.add(key, _tensors(model, [stepper.of(model, steps) for stepper in self._running_steppers()]))
            self._abouts[key] = _describe(weights)
        self._tasks.take(key)
        self._running, self._name = key, name
        logger.info("%s", self.about)

    def _same_network(self, config: Config) -> bool:
        """Whether these weights run in this network and with this sampler's steps. How they were trained does not
        matter, and sigma_data is a task's own: it is in tensors that change with the task."""
        ours = self.config.model
        other = make_steps(replace(config, model=ours), len(self.steps), self._sampler)
        same_model = replace(config.model, sigma_data=ours.sigma_data, prior_sigma_data=ours.prior_sigma_data) == ours
        return same_model and torch.equal(other.table, self.steps.table) and other.sigmas == self.steps.sigmas

    def _running_steppers(self) -> list[Plan | Reference]:
        """All that holds tensors of the weights."""
        own = self.backend.plan if isinstance(self.backend, Graph) else self.backend
        return [stepper for stepper in (own, self._folded) if isinstance(stepper, Plan | Reference)]

    def _plan(self) -> Plan | None:
        backend = self.backend.plan if isinstance(self.backend, Graph) else self.backend
        return backend if isinstance(backend, Plan) else None

    def _run(self, batch: Tensor, what: Work) -> Tensor:
        height, width = batch.shape[-2:]
        check_fits(batch.shape[0], height, width, self.steps.noise_fields, self.device)
        tall, wide = (round_up(side, self.multiple) for side in (height, width))
        noise = pad_to(noise_fields(self.seed, height, width, self.steps.noise_fields), tall, wide).to(self.device)
        plan = self._plan()
        with ExitStack() as settings:
            # A caller's would overrule `precision`.
            settings.enter_context(torch.autocast(self.device.type, enabled=False))
            if self.device.type == "cuda":
                # Triton and graph captures run on the current device, which need not be this one.
                settings.enter_context(torch.cuda.device(self.device))
                if plan is None or plan.dtype == torch.float32:
                    settings.enter_context(without_tf32())
            native = plan is not None and plan.form == "native"  # C++ blocks would copy every picture back
            layout = torch.contiguous_format if native else torch.channels_last
            y_d = to_network(pad_to(batch.to(self.device), tall, wide)).contiguous(memory_format=layout)
            restored = self._in_parts(y_d, noise, what)
            return from_network(restored[..., :height, :width], batch.dtype)

    def _in_parts(self, y_d: Tensor, noise: Tensor, what: Work) -> Tensor:
        """As many pictures of the batch at once as the memory holds: they share the noise, and nothing else."""
        batch, _, height, width = y_d.shape
        plan = self._plan()
        if batch == 1 or plan is None or self.tile != "auto":
            return self._with_memory(y_d, noise, what)
        one = needed(self.config.model, height * width, plan.dtype, plan.form)
        at_once = max(1, budget(self.device) // one)
        if at_once >= batch:
            return self._with_memory(y_d, noise, what)
        logger.info("%d pictures of %dx%d: %d at a time, because the memory asks for it", batch, width, height, at_once)
        return torch.cat([self._with_memory(part, noise, what) for part in y_d.split(at_once)])

    def _with_memory(self, y_d: Tensor, noise: Tensor, what: Work) -> Tensor:
        """The whole picture at once, or in tiles, which are halved for as long as the memory runs out."""
        batch, _, height, width = y_d.shape
        plan, core = self._plan(), self.tile if isinstance(self.tile, int) else None
        if self.tile == "auto" and plan is not None:
            core = choose_tile(self.config.model, batch, height, width, plan.dtype, budget(self.device), plan.form)
            if core is not None:
                logger.info("%dx%d: in tiles of %d pixels, because the memory asks for it", width, height, core)
        cleared = False
        while True:
            try:
                if core is None:
                    return what(self.backend, y_d, noise)
                return what(Tiled(self._tiling_plan(), core, self.multiple, progress=self.progress), y_d, noise)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if isinstance(self.backend, Graph) and self.backend.graphs and not cleared:
                    cleared = True  # they are of other sizes: the picture itself may fit
                    self.backend.clear()
                    torch.cuda.empty_cache()
                    continue
                smaller = (core or round_up(max(height, width), 2)) // 2
                if plan is None or self.tile != "auto" or smaller < SMALLEST:
                    raise UserError(
                        f"a picture of {width}x{height} pixels: not enough memory; {_advice(plan, self.tile)}"
                    ) from error
                core = smaller
            if self.device.type == "cuda":
                if isinstance(self.backend, Graph):
                    self.backend.clear()
                torch.cuda.empty_cache()
            logger.warning("%dx%d: out of memory; goes on in tiles of %d pixels", width, height, core)

    def _tiling_plan(self) -> Plan:
        plan = self._plan()
        assert plan is not None  # the reference backend does not tile
        if plan.form != "kernels":
            return plan
        if self._folded is None:
            with torch.inference_mode(False):  # a picture is under way; set_task writes into these tensors later
                self._folded = Plan(self.model, self.steps, plan.dtype)
                self._folded.table.copy_(plan.table)  # of the task that runs: its sigma_data may be its own
                self._folded.time_rows.copy_(plan.time_rows)
            self._tasks, self._abouts = None, {self._running: self._abouts[self._running]}  # they lack this plan
        return self._folded


def _load(weights: Weights, device: torch.device) -> Any:
    model = load_model(weights, stage=2).requires_grad_(False)
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _tensors(model: DTPM, steppers: Sequence[Plan | Reference]) -> dict[str, Tensor]:
    found = dict(model.state_dict())
    for number, stepper in enumerate(steppers):
        found.update({f"stepper{number}.{name}": value for name, value in stepper.tensors().items()})
    return found


def _check_tile(tile: int | str | None) -> int | str | None:
    if tile is None or tile in ("auto", "none"):
        return None if tile == "none" else tile
    if isinstance(tile, bool) or not isinstance(tile, Integral) or int(tile) < SMALLEST:
        raise UserError(f"tile {tile}: use auto, none, or a number of pixels from {SMALLEST} on")
    return int(tile)


def _out_of_memory(error: BaseException | None) -> bool:
    """Also where a failing graph capture was the answer to it."""
    if error is None:
        return False
    # The system's, CUDA's and Triton's, cuBLAS's, and cuDNN's where no convolution found room for its workspace.
    said = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED", "unable to find an engine")
    here = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in said)
    return here or _out_of_memory(error.__context__)


def _advice(plan: Plan | None, tile: int | str | None) -> str:
    if plan is None:
        return "restore from the weights with --backend fused, which tiles"
    return "make it smaller or cut it" if tile == "auto" else "use --tile auto"


def _describe(weights: Weights) -> str:
    brief = {key: value for key, value in weights.trained.items() if not isinstance(value, (dict, list))}
    trained = ", ".join(f"{key} {value}" for key, value in brief.items())
    trained = f"trained: {trained}" if trained else ""
    what = f"{weights.task}, {weights.config.model.preset}" + (f"; {trained}" if trained else "")
    return f"weights {weights.path.name} ({what})"
