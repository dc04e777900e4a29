"""The evaluation protocols of the field by name: how pictures are prepared, rounded and compared."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.metrics.distortion import luma, mae, psnr, ssim, ssim_uniform

FIGURES = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "mae")


def _own_size(width: int, height: int) -> tuple[int, int]:
    return width, height


@dataclass(frozen=True)
class Protocol:
    """`size` gives the width and height that pictures of a width and height are restored and compared at; `headline`
    names the figures that stand in a paper's table as PSNR and SSIM."""

    name: str
    about: str
    headline: tuple[str, str]
    quantised: bool = True  # compare what an 8-bit file would hold
    rgb_ssim: Callable[[Tensor, Tensor], Tensor] = ssim
    size: Callable[[int, int], tuple[int, int]] = _own_size

    def prepare(self, picture: np.ndarray) -> np.ndarray:
        """HxWx3 uint8 at the size that it is restored and compared at (Lanczos)."""
        own = picture.shape[1], picture.shape[0]
        size = self.size(*own)
        if size == own:
            return picture
        return np.array(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))

    def compare(self, image: Tensor, target: Tensor) -> dict[str, float]:
        """The figures of one picture against its target, both (1, 3, H, W) in [0, 1]: `FIGURES` in their order.

        PSNR in dB (at most 100), SSIM up to 1, MAE on the scale 0..1. Raises `UserError` when the sizes differ or
        the picture is smaller than SSIM's window.
        """
        if image.shape != target.shape:
            raise UserError(f"sizes differ: {tuple(image.shape[-2:])} against the target's {tuple(target.shape[-2:])}")
        image, target = self.on_255(image), self.on_255(target)
        y, y_target = luma(image), luma(target)
        found = (
            psnr(y, y_target), ssim(y, y_target),
            psnr(image, target), self.rgb_ssim(image, target), mae(image, target),
        )  # fmt: skip
        return dict(zip(FIGURES, torch.cat(found).tolist(), strict=True))

    def rounded(self, image: Tensor) -> Tensor:
        """The picture in [0, 1] as this protocol compares it, float32."""
        return (self.on_255(image) / 255).float()

    def on_255(self, image: Tensor) -> Tensor:
        """[0, 1] to float64 on 0..255, rounded when the protocol compares 8-bit files."""
        scaled = image.double().clamp(0, 1) * 255
        return scaled.round() if self.quantised else scaled


def weatherdiff_size(width: int, height: int) -> tuple[int, int]:
    """WeatherDiffusion's size for whole pictures: a long side above 1024 becomes 1024, then both sides go up to
    multiples of 16."""
    longest = max(width, height)
    if longest > 1024:
        width, height = math.ceil(width * 1024 / longest), math.ceil(height * 1024 / longest)
    return 16 * math.ceil(width / 16), 16 * math.ceil(height / 16)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("native", "own size, 8 bits, PSNR and SSIM on Y (BT.601, 16..235)", ("psnr_y", "ssim_y")),
        Protocol(
            "weatherdiff",
            "long side at most 1024, sides to multiples of 16 (Lanczos), 8 bits, PSNR and SSIM on Y (BT.601, 16..235)",
            ("psnr_y", "ssim_y"),
            size=weatherdiff_size,
        ),
        Protocol("gopro", "own size, 8 bits, PSNR over RGB, SSIM per channel", ("psnr_rgb", "ssim_rgb")),
        Protocol(
            "dpdd",
            "own size, unrounded, PSNR over RGB, SSIM by skimage's defaults (uniform 7x7)",
            ("psnr_rgb", "ssim_rgb"),
            quantised=False,
            rgb_ssim=ssim_uniform,
        ),
    )
}
# What the paper's table of each task follows.
PAPER_PROTOCOL = {
    "deblur": "gopro",
    "defocus": "dpdd",
    "desnow": "weatherdiff",
    "raindrop": "weatherdiff",
    "rainhaze": "weatherdiff",
    "derain": "weatherdiff",
    "dehaze": "weatherdiff",
}


def default_protocol(task: str) -> str:
    """The paper's for the two deblurring tasks; for the weather tasks `native`, which resizes nothing."""
    return PAPER_PROTOCOL[task] if task in ("deblur", "defocus") else "native"
