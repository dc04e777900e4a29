"""Small random models, for every test that needs one."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtpm_fast.config import Config
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.weights_file import save_weights

# What torch.compile leaves behind is this run's own: a killed process may have left half a library in the shared cache.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="dtpm-fast-inductor-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def _random_model(seed: int = 0, stage: int = 2, **settings: Any) -> tuple[DTPM, Config]:
    config = Config.of(**{"preset": "tiny", "semantic_code": "none", **settings})
    torch.manual_seed(seed)
    model = DTPM(config.model, stage)
    for name, parameter in model.named_parameters():
        if name.startswith("semantic."):
            continue
        if name.endswith((".beta", ".gamma")):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "modulation" in name or ".ending." in name or ".m_out." in name or "norm" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False), config


@pytest.fixture(scope="session")
def random_model() -> Callable[..., tuple[DTPM, Config]]:
    """`random_model(seed, stage, **settings)`: a model none of whose parts is zero or the identity, in evaluation mode,
    and its config; `tiny` and without a semantic code unless the settings say otherwise."""
    return _random_model


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., Path]:
    """`random_weights(path, task, stage, seed, **settings)`: such a model's weights file."""

    def write(path: Path, task: str = "derain", stage: int = 2, seed: int = 0, **settings: Any) -> Path:
        model, config = _random_model(seed, stage, **settings)
        save_weights(path, model.state_dict(), config, stage, task if stage == 2 else "", {"data": "none, random"})
        return path

    return write


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and said to be, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
