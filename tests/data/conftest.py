"""Fixtures of the data tests: pictures and miniatures of the data sets' layouts, written to a temporary folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
from miniatures import MINIATURES, Miniature, write_picture


@pytest.fixture(params=list(MINIATURES))
def miniature(request: pytest.FixtureRequest) -> Miniature:
    return MINIATURES[request.param]


@pytest.fixture
def picture() -> Callable[..., Path]:
    return write_picture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five photos of different sizes, one in a subfolder, two smaller than the crops of the tests."""
    folder = tmp_path / "photos"
    for seed, (name, width, height) in enumerate(
        [("a.png", 40, 33), ("b.jpg", 33, 61), ("c.webp", 64, 48), ("small.png", 9, 50), ("deep/tiny.png", 5, 3)]
    ):
        write_picture(folder / name, width, height, seed)
    return folder
