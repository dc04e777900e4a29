"""Miniatures of the data sets' layouts, made of random pictures."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


def write_picture(path: Path, width: int = 24, height: int = 16, seed: int = 0) -> Path:
    """A smooth random picture, so that JPEG keeps it too."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


@dataclass(frozen=True)
class Miniature:
    """A layout by example: files of a split as (degraded, target) below the root."""

    task: str
    layout: str
    split: str
    pairs: tuple[tuple[str, str], ...]

    def write(self, root: Path) -> list[tuple[Path, Path]]:
        for seed, pair in enumerate(self.pairs):
            for name in pair:
                write_picture(root / name, seed=seed)
        return [(root / degraded, root / target) for degraded, target in self.pairs]


def _same(degraded: str, target: str, *names: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{degraded}/{name}", f"{target}/{name}") for name in names)


MINIATURES = {
    "gopro": Miniature("deblur", "input+target", "train", _same("train/input", "train/target", "a.png", "b.png")),
    "gopro_original": Miniature(
        "deblur",
        "GoPro",
        "test",
        _same("test/GOPR0384/blur", "test/GOPR0384/sharp", "000001.png", "000002.png")
        + _same("test/GOPR0385/blur", "test/GOPR0385/sharp", "000001.png"),
    ),
    "dpdd": Miniature("defocus", "DPDD", "train", _same("train/inputC", "train/target", "1P0A1.png", "1P0A2.png")),
    "dpdd_original": Miniature(
        "defocus",
        "DPDD",
        "test",
        (
            ("test_c/source/1P0A1.png", "test_c/target/1P0A2.png"),
            ("test_c/source/1P0A3.png", "test_c/target/1P0A4.png"),
        ),
    ),
    "snow100k": Miniature("desnow", "Snow100K", "train", _same("train/input", "train/gt", "city_1.jpg", "city_2.jpg")),
    "snow100k_flat": Miniature("desnow", "Snow100K", "test", _same("input", "gt", "city_1.jpg", "city_2.jpg")),
    "snow100k_train": Miniature(
        "desnow",
        "Snow100K",
        "train",
        _same("Snow100K-training/all/synthetic", "Snow100K-training/all/gt", "a.jpg", "b.jpg"),
    ),
    "snow100k_test": Miniature(
        "desnow",
        "Snow100K",
        "test",
        _same("Snow100K-testset/Snow100K-L/synthetic", "Snow100K-testset/Snow100K-L/gt", "a.jpg")
        + _same("Snow100K-testset/Snow100K-S/synthetic", "Snow100K-testset/Snow100K-S/gt", "a.jpg"),
    ),
    "outdoor_rain": Miniature(
        "rainhaze",
        "Outdoor-Rain",
        "test",
        (
            ("test/in/im_0301_s80_a04.png", "test/gt/im_0301.png"),
            ("test/in/im_0301_s80_a05.png", "test/gt/im_0301.png"),
            ("test/in/im_0302_s85_a04.png", "test/gt/im_0302.png"),
        ),
    ),
    "rainhaze_alias": Miniature("dehaze", "Outdoor-Rain", "train", (("in/im_0001_s80_a04.png", "gt/im_0001.png"),)),
    "raindrop": Miniature(
        "raindrop",
        "RainDrop",
        "train",
        (("train/data/0_rain.png", "train/gt/0_clean.png"), ("train/data/1_rain.png", "train/gt/1_clean.png")),
    ),
    "raindrop_test_a": Miniature(
        "raindrop", "RainDrop", "test", (("test_a/data/0_rain.png", "test_a/gt/0_clean.png"),)
    ),
    "generic": Miniature("derain", "input+target", "test", _same("test/input", "test/target", "1.webp", "2.webp")),
    "generic_flat": Miniature("derain", "input+target", "train", _same("input", "target", "1.png", "2.png")),
}
