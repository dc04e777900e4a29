import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Here and in the processes that a test starts: bits are equal for an equal number of threads, and tiny runs are
    fastest on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def photos(tmp_path):
    """A folder of eight small pictures with edges and texture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:80, :96]
    for i in range(8):
        edges = 127 + 80 * np.sign(np.sin(x / rng.uniform(5, 15) + i) * np.cos(y / rng.uniform(5, 15)))
        weave = 15 * np.sin(1.9 * x + i) * np.sin(1.7 * y)  # a texture that can be learned, as white noise cannot
        picture = edges[..., None] * rng.uniform(0.5, 1, 3) + weave[..., None] + rng.normal(0, 3, (80, 96, 1))
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


TINY = (
    "preset=tiny",
    "semantic_code=none",
    "crop=32",
    "batch_size=2",
    "workers=0",
    "validation_images=2",
    "log_every=2",
)


@pytest.fixture
def tiny():
    """Settings of a run that takes a second."""
    return list(TINY)
