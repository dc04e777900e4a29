"""The parts of the C++ runtime that run without libtorch and TensorRT, and its TensorRT backend as far as a compiler
can judge it."""

import dataclasses
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from dtpm_fast.export.manifest import read_manifest, write_manifest
from dtpm_fast.runtime.noise import noise_fields

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SOURCE = Path(__file__).parents[2] / "csrc" / "runtime"
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "manifest.hpp"
#include "noise.hpp"
int main(int count, char** given) {
  if (count == 5) {
    dtpm::Noise noise(std::strtoull(given[1], nullptr, 10));
    std::vector<float> field(3 * std::atoi(given[2]) * std::atoi(given[3]));
    for (int i = 0; i < std::atoi(given[4]); ++i) {
      noise.fill(field.data(), field.size());
      std::fwrite(field.data(), sizeof(float), field.size(), stdout);
    }
    return 0;
  }
  const dtpm::Manifest m = dtpm::read_manifest(given[1]);
  std::printf("%s %s %s %s %s %s:", m.kind.c_str(), m.prepare.c_str(), m.step.c_str(), m.tensorrt.c_str(),
              m.compute_capability.c_str(), m.gpu.c_str());
  const int sizes[][2] = {{8, 8}, {40, 56}, {16, 104}, {48, 8}, {40, 104}};
  for (const auto& size : sizes) std::printf(" %d", m.bucket(size[0], size[1]));
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "parts.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCE}"]
    subprocess.run(["g++", *flags, folder / "parts.cpp", "-o", folder / "parts"], check=True)
    return folder / "parts"


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (8, 8), (3, 17), (37, 51)], ids=str)
def test_noise_is_that_of_the_restorer(program: Path, size: tuple[int, int]) -> None:
    for seed in (0, 5, 2**40 + 3):
        drawn = subprocess.run([program, str(seed), *map(str, size), "3"], check=True, capture_output=True).stdout
        found = torch.from_numpy(np.frombuffer(drawn, np.float32).copy()).view(3, 3, *size)
        assert (found - noise_fields(seed, *size, fields=3)).abs().max() <= 1e-6


def test_the_manifest_of_engines(program: Path, full_export: Path, tmp_path: Path) -> None:
    shutil.copytree(full_export, tmp_path / "x")
    buckets = [{"batch": 2, "height": 40, "width": 56}, {"batch": 1, "height": 24, "width": 104}]
    engine = {"tensorrt": "11.4.0.106", "compute_capability": "9.0", "gpu": "H", "buckets": buckets}
    write_manifest(tmp_path / "x", dataclasses.replace(read_manifest(full_export), kind="tensorrt", engine=engine))
    said = subprocess.run([program, tmp_path / "x"], check=True, capture_output=True, text=True).stdout
    assert said == "tensorrt prepare.onnx step.onnx 11.4.0.106 9.0 H: 1 0 1 -1 -1"


def _folder_of(header: str, candidates: list[Path | str]) -> Path | None:
    return next((Path(folder) for folder in candidates if folder and (Path(folder) / header).is_file()), None)


def test_the_tensorrt_backend_compiles() -> None:
    """Against TensorRT's public headers, which `DTPM_TENSORRT_INCLUDE` can name; linking needs the library."""
    system = ["/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/local/tensorrt/include"]
    tensorrt = _folder_of("NvInferRuntime.h", [os.environ.get("DTPM_TENSORRT_INCLUDE", ""), *system])
    packages = sysconfig.get_paths()["purelib"]
    cuda = _folder_of("cuda_runtime_api.h", ["/usr/local/cuda/include", f"{packages}/nvidia/cu13/include"])
    if tensorrt is None or cuda is None:
        pytest.skip("no NvInferRuntime.h (DTPM_TENSORRT_INCLUDE names its folder) or no cuda_runtime_api.h")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-isystem", tensorrt, "-isystem", cuda]
    done = subprocess.run(["g++", *flags, SOURCE / "tensorrt.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
