"""Exports that several tests read: made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("onnxruntime", reason="the export extra is not installed")

from dtpm_fast.export.exporter import export_folder
from dtpm_fast.weights_file import Weights, read_weights


@pytest.fixture(scope="session")
def full_weights(tmp_path_factory: pytest.TempPathFactory, random_weights: Callable[..., Path]) -> Weights:
    """With everything that a model can have: predictor, adapters, semantic code, fresh noise (eta > 0)."""
    folder = tmp_path_factory.mktemp("weights")
    return read_weights(random_weights(folder / "full.safetensors", semantic_code="compact", eta=0.5))


@pytest.fixture(scope="session")
def plain_weights(tmp_path_factory: pytest.TempPathFactory, random_weights: Callable[..., Path]) -> Weights:
    return read_weights(random_weights(tmp_path_factory.mktemp("weights") / "plain.safetensors", seed=3))


@pytest.fixture(scope="session")
def full_export(tmp_path_factory: pytest.TempPathFactory, full_weights: Weights) -> Path:
    folder = tmp_path_factory.mktemp("export") / "full"
    export_folder(full_weights, folder, steps=4)
    return folder
