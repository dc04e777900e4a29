"""AOTInductor packages: in Python, and in C++ through the C interface."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtpm_fast.errors import UserError
from dtpm_fast.export.aoti import AotiStepper
from dtpm_fast.export.compare import difference, stepped
from dtpm_fast.export.exporter import export_folder
from dtpm_fast.export.manifest import read_manifest
from dtpm_fast.export.restorer import ExportedRestorer, open_stepper
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.weights_file import load_model, read_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler"),
]
SOURCE = Path(__file__).parents[2] / "csrc" / "runtime"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, random_weights: Callable[..., Path]) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("aoti")
    weights = random_weights(folder / "w.safetensors", eta=0.5)
    export_folder(read_weights(weights), folder / "x", kind="aoti", steps=2)
    return weights, folder / "x"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built; `DTPM_RUNTIME_BUILD` names a build folder to reuse."""
    if shutil.which("cmake") is None:
        pytest.skip("the C++ runtime is built with cmake, which is not here")
    build = Path(os.environ.get("DTPM_RUNTIME_BUILD") or tmp_path_factory.mktemp("build"))
    root = Path(torch.__path__[0])
    options = [f"-DTORCH_ROOT={root}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    subprocess.run(["cmake", "-S", SOURCE, "-B", build, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
    return build / "restore_ppm"


def test_other_sizes_and_batches(package: tuple[Path, Path]) -> None:
    weights, folder = package
    manifest = read_manifest(folder)
    stepper, _, about = open_stepper(folder, manifest)
    assert "AOTInductor" in about
    reference = Reference(load_model(read_weights(weights), 2).requires_grad_(False), manifest.steps)
    for size in ((1, 8, 8), (1, 24, 56), (3, 40, 16), (1, 56, 104)):
        assert difference(stepped(stepper), reference, *size, seed=4).max_abs <= 1e-4


def test_another_device_is_refused(package: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="compiled for cpu and cannot run on cuda"):
        AotiStepper(package[1], read_manifest(package[1]), torch.device("cuda"))


@pytest.mark.parametrize("size", [(37, 51), (8, 8), (3, 17), (1, 1)], ids=str)
def test_cpp_gives_the_pixels_of_python(
    package: tuple[Path, Path], program: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    photo = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "in.ppm")
    command = [program, package[1], tmp_path / "in.ppm", tmp_path / "out.ppm", "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "derain, 2 steps, fp32, AOTInductor on cpu"
    restored = np.asarray(Image.open(tmp_path / "out.ppm")).astype(int)
    expected = ExportedRestorer(package[1], device="cpu", seed=5)(photo).astype(int)
    assert np.abs(restored - expected).max() <= 1
    assert np.abs(restored - photo).mean() > 1


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="Inductor compiles for this CPU's AVX-512, which valgrind does not know",
)
def test_cpp_is_clean_under_valgrind(package: tuple[Path, Path], program: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "DTPM_RUNTIME_BUILD": str(program.parent)}
    script = SOURCE.parents[1] / "scripts" / "valgrind"
    done = subprocess.run([script, package[1]], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with frames of csrc/runtime" in done.stdout


def test_cpp_says_why(package: tuple[Path, Path], program: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 8)).save(tmp_path / "in.ppm")

    def said(folder: Path, picture: Path = tmp_path / "in.ppm") -> str:
        done = subprocess.run([program, folder, picture, tmp_path / "out.ppm"], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert not (tmp_path / "out.ppm").exists()
        return done.stderr

    assert "no such file; is it a folder that dtpm-export wrote?" in said(tmp_path)
    folder = tmp_path / "x"
    shutil.copytree(package[1], folder)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"multiple": 8', '"multiple": 4'))
    assert "manifest.json: was changed after the export" in said(folder)
    manifest.write_text(text)
    (folder / "step.pt2").write_bytes(b"other")
    assert "step.pt2: is not the file that was exported" in said(folder)
    (folder / "step.pt2").unlink()
    assert "step.pt2: is missing from the export" in said(folder)
    (tmp_path / "short.ppm").write_bytes(b"P6\n9 8\n255\nabc")
    assert "ends too early" in said(package[1], tmp_path / "short.ppm")
