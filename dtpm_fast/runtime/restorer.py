"""A photo in, a better photo out."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtpm_fast.device import choose_device
from dtpm_fast.errors import UserError
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.photo import from_network, open_photo, pad_to, round_up, to_network
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.sampler import make_steps, sample
from dtpm_fast.runtime.shipped import find_weights
from dtpm_fast.weights_file import Weights, load_model

logger = logging.getLogger("dtpm_fast")


class Restorer:
    """Restores photos of any size with one set of weights.

    `about` says in one line which weights run, how they were trained, and on which device and backend and why; it is
    also logged (logger "dtpm_fast", level INFO).
    """

    def __init__(
        self, weights: Weights, *, steps: int = 4, device: str = "auto", backend: str = "auto", seed: int = 0
    ) -> None:
        self.device, why_device = choose_device(device)
        self.seed = seed
        self.config = weights.config
        self.steps = make_steps(weights.config, steps)
        if backend not in ("auto", "reference"):
            raise UserError(f"unknown backend {backend!r}; choose one of auto, reference")
        model = load_model(weights, stage=2).requires_grad_(False)
        self.model = model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.backend = Reference(self.model, self.steps)
        self.about = f"{_describe(weights)}; {len(self.steps)} steps; device {why_device}; backend reference"
        logger.info("%s", self.about)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "light",
        task: str = "derain",
        steps: int = 4,
        device: str = "auto",
        backend: str = "auto",
        seed: int = 0,
    ) -> "Restorer":
        """A restorer from shipped weights ("light"), or from a file that stage II of the training wrote.

        Raises `UserError` for an unknown name, task, device or backend, for weights of another task or of stage I, and
        for a number of steps outside 1..T.
        """
        return cls(find_weights(name_or_path, task), steps=steps, device=device, backend=backend, seed=seed)

    @torch.inference_mode()
    def __call__(self, photo: Any) -> Any:
        """The restored photo, of the kind and size that came in: a path or a Pillow image gives a Pillow image (RGB),
        an HxWx3 uint8 array an array, a (B, 3, H, W) floating-point tensor in [0, 1] a tensor. Any size, 1x1 included.
        The same photo, seed and machine give the same bytes.

        Raises `UserError` for an unreadable file or too little memory, `TypeError` or `ValueError` for a wrong object.
        """
        batch, back = open_photo(photo)
        return back(self._restore(batch))

    def _restore(self, batch: Tensor) -> Tensor:
        height, width = batch.shape[-2:]
        size = [round_up(side, self.model.multiple) for side in (height, width)]
        noise = pad_to(noise_fields(self.seed, height, width, self.steps.noise_fields), *size)
        y_d = to_network(pad_to(batch.to(self.device), *size)).contiguous(memory_format=torch.channels_last)
        restored = sample(self.backend, self.backend.prepare(y_d), noise.to(self.device))
        return from_network(restored[..., :height, :width], batch.dtype)


def _describe(weights: Weights) -> str:
    trained = ", ".join(f"{key} {value}" for key, value in weights.trained.items())
    what = f"{weights.task}, {weights.config.model.preset}" + (f"; {trained}" if trained else "")
    return f"weights {weights.path.name} ({what})"
