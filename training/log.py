"""What a run says while it trains: a progress bar, or plain lines where there is no terminal, and TensorBoard."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

PLAIN_LINE_EVERY = 10  # readings


class Log:
    """Of rank 0; the other processes' logs are `silent`. Use it as a context manager."""

    def __init__(self, folder: Path, stage: int, first: int, steps: int, silent: bool = False) -> None:
        self.steps, self.silent = steps, silent
        # What a killed run logged behind the state it resumes from is hidden; `first` itself belongs to that state.
        self.board = None if silent else SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        self.bar = tqdm(
            total=steps, initial=first, desc=f"stage {stage}", unit="it", disable=True if silent else None
        )  # None: off where standard error is no terminal
        self._plain = not silent and not sys.stderr.isatty()
        self._first, self._since, self._readings = first, time.perf_counter(), 0

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def training(self, step: int, figures: Mapping[str, float]) -> None:
        """`loss`, `images_per_s`, `data_stall` (0..1), `peak_memory_gib` and others at an iteration."""
        if self.board is None:
            return
        for name, value in figures.items():
            self.board.add_scalar(f"train/{name}", value, step)
        shown = {
            "loss": f"{figures['loss']:.4f}",
            "images_per_s": f"{figures['images_per_s']:.1f}",
            "data_stall": f"{figures['data_stall']:.0%}",
            "memory": f"{figures['peak_memory_gib']:.1f}GiB",
        }
        self.bar.set_postfix(shown)
        self._readings += 1
        if self._plain and (self._readings % PLAIN_LINE_EVERY == 1 or step == self.steps):
            left = (time.perf_counter() - self._since) / max(1, step - self._first) * (self.steps - step)
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.write(f"{step}/{self.steps}: {values}, {tqdm.format_interval(left)} left")

    def validation(self, step: int, figures: Mapping[str, float], picture: Tensor) -> None:
        """Mean figures, and pictures side by side (3, H, W) in [0, 1]."""
        if self.board is None:
            return
        for name, value in figures.items():
            self.board.add_scalar(f"validation/{name}", value, step)
        self.board.add_image("validation/input_predictor_result_target", picture, step)
        self.write(f"{step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    def flush(self) -> None:
        """What TensorBoard holds back for up to two minutes goes to disk."""
        if self.board is not None:
            self.board.flush()

    def write(self, line: str) -> None:
        """A line on standard output, above the bar."""
        if not self.silent:
            tqdm.write(line)
            sys.stdout.flush()
