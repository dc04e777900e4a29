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
from PIL import Image

from dtpm_fast.export.manifest import read_manifest, write_manifest
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.photo import from_network, to_network

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


BACKEND = """
#include "backend.hpp"
struct Mix : dtpm::Backend {
  int fields;
  void restore(const float* image, const float* noise, int64_t height, int64_t width, float* restored) override {
    const int64_t size = 3 * height * width;
    for (int64_t i = 0; i < size; ++i) restored[i] = image[i] + 0.2f * noise[(fields - 1) * size + i];
  }
};
std::unique_ptr<dtpm::Backend> dtpm::open_aoti(const std::string&, const Manifest& manifest) {
  auto mix = std::make_unique<Mix>();
  mix->fields = manifest.noise_fields;
  return mix;
}
"""


@pytest.fixture(scope="module")
def mixer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example over a backend that mixes the picture with its last noise field."""
    folder = tmp_path_factory.mktemp("mixer")
    (folder / "backend.cpp").write_text(BACKEND)
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-DDTPM_AOTI", f"-I{SOURCE}"]
    subprocess.run(["gcc", *flags, "-c", SOURCE / "example" / "restore_ppm.c", "-o", folder / "example.o"], check=True)
    sources = [SOURCE / "dtpm.cpp", folder / "backend.cpp", folder / "example.o"]
    subprocess.run(["g++", "-std=c++20", *flags, *sources, "-o", folder / "mixer"], check=True)
    return folder / "mixer"


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (8, 16), (37, 51)], ids=str)
def test_pictures_are_padded_and_cropped_as_in_python(
    mixer: Path, full_export: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    shutil.copytree(full_export, tmp_path / "x")
    manifest = read_manifest(full_export)
    write_manifest(tmp_path / "x", dataclasses.replace(manifest, kind="aoti", engine={"device": "cpu"}))
    photo = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "in.ppm")
    done = subprocess.run([mixer, tmp_path / "x", tmp_path / "in.ppm", tmp_path / "out.ppm", "5"], capture_output=True)
    assert done.returncode == 0, done.stderr
    noise = noise_fields(5, *size, fields=manifest.noise_fields)[-1]
    expected = from_network(to_network(torch.from_numpy(photo).permute(2, 0, 1)) + 0.2 * noise, torch.uint8)
    restored = torch.from_numpy(np.array(Image.open(tmp_path / "out.ppm"))).permute(2, 0, 1)
    assert (restored.int() - expected.int()).abs().max() <= 1
    assert (restored != expected).float().mean() < 0.01  # an ulp of the noise, at a half


def test_a_kind_that_was_not_built_in(mixer: Path, full_export: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 8)).save(tmp_path / "in.ppm")
    command = [mixer, full_export, tmp_path / "in.ppm", tmp_path / "out.ppm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "out.ppm").exists()
    assert 'an export of kind "onnx"; this build runs: aoti (dtpm-export --format)' in done.stderr


@pytest.mark.parametrize(
    ("number", "value", "why"),
    [
        # The backends read a field for every sigma > 0, in TensorRT's from memory of this many.
        *(("noise_fields", fields, "noise_fields: its sigmas take 4") for fields in (1, 3, 5)),
        *(("noise_fields", fields, "bad numbers") for fields in (0, 2**31)),
        *(("multiple", multiple, "bad numbers") for multiple in (-8, 2**20, 2**31, 2**80)),
    ],
)
def test_numbers_that_the_graphs_cannot_have(
    mixer: Path, full_export: Path, tmp_path: Path, number: str, value: int, why: str
) -> None:
    shutil.copytree(full_export, tmp_path / "x")
    changed = dataclasses.replace(read_manifest(full_export), kind="aoti", **{number: value})
    write_manifest(tmp_path / "x", changed)
    Image.new("RGB", (9, 8)).save(tmp_path / "in.ppm")
    command = [mixer, tmp_path / "x", tmp_path / "in.ppm", tmp_path / "out.ppm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "out.ppm").exists()
    assert f"not a readable manifest ({why})" in done.stderr


def test_a_ppm_with_comments_and_a_seed_that_is_no_number(mixer: Path, full_export: Path, tmp_path: Path) -> None:
    shutil.copytree(full_export, tmp_path / "x")
    write_manifest(
        tmp_path / "x", dataclasses.replace(read_manifest(full_export), kind="aoti", engine={"device": "cpu"})
    )
    (tmp_path / "plain.ppm").write_bytes(b"P6 9 8 255\n" + bytes(range(216)))
    (tmp_path / "gimp.ppm").write_bytes(b"P6\n# GIMP 3 # wrote this\n9 8\n#\n255\n" + bytes(range(216)))
    for name in ("plain", "gimp"):
        command = [mixer, tmp_path / "x", tmp_path / f"{name}.ppm", tmp_path / f"{name}-out.ppm", "7"]
        subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "gimp-out.ppm").read_bytes() == (tmp_path / "plain-out.ppm").read_bytes()
    for seed in ("", "7x"):
        done = subprocess.run([*command[:-2], tmp_path / "new.ppm", seed], capture_output=True, text=True)
        assert done.returncode == 1 and "the seed must be a whole number" in done.stderr
    (tmp_path / "gimp.ppm").write_bytes(b"P6\n# no end")
    done = subprocess.run([*command[:-2], tmp_path / "new.ppm"], capture_output=True, text=True)
    assert done.returncode == 1 and "not a binary PPM" in done.stderr and not (tmp_path / "new.ppm").exists()


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
