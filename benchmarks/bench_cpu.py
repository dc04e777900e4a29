"""What everyone meets first, without a GPU: `pytest benchmarks/ --benchmark-only`.

Rows of a group stand side by side in one run; compare their ratios. The scripts beside this file measure more, in
interleaved rounds: bench_restore.py, bench_rtv.py, bench_train.py, bench_export.py.
"""

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from skimage import data

from dtpm_fast import Restorer, rtv_smooth
from dtpm_fast.data.degradations import degrade

PHOTO = data.astronaut()


@pytest.mark.benchmark(group="restore 256x256, light, derain, 4 steps")
@pytest.mark.parametrize(
    ("backend", "precision"), [("reference", "float32"), ("fused", "float32"), ("fused", "bfloat16")]
)
def test_restore(benchmark: BenchmarkFixture, backend: str, precision: str) -> None:
    restorer = Restorer.from_pretrained("light", "derain", device="cpu", backend=backend, precision=precision)
    photo = np.ascontiguousarray(PHOTO[:256, :256])
    assert benchmark.pedantic(restorer, (photo,), rounds=5, warmup_rounds=1).shape == photo.shape
    benchmark.extra_info["threads"] = torch.get_num_threads()


@pytest.mark.benchmark(group="RTV smoothing 512x512")
@pytest.mark.parametrize("threads", [1, 0], ids=["one thread", "all threads"])
def test_smooth(benchmark: BenchmarkFixture, threads: int) -> None:
    photo = PHOTO.astype(np.float32) / 255
    benchmark.pedantic(rtv_smooth, (photo,), {"threads": threads}, rounds=9, warmup_rounds=1)


@pytest.mark.benchmark(group="degrade a 256x256 crop")
@pytest.mark.parametrize("task", ["derain", "dehaze", "rainhaze", "desnow", "raindrop", "deblur", "defocus"])
def test_degrade(benchmark: BenchmarkFixture, task: str) -> None:
    crop = PHOTO[:256, :256].astype(np.float32) / 255
    rng = np.random.default_rng(0)
    benchmark.pedantic(lambda: degrade(task, crop, rng), rounds=20, warmup_rounds=2)


@pytest.mark.benchmark(group="change the task of a Restorer (set_task), light, both tasks known")
def test_change_of_task(benchmark: BenchmarkFixture) -> None:
    restorer = Restorer.from_pretrained("light", "derain", device="cpu", precision="float32")
    tasks = ["desnow", "derain"]
    for task in tasks:
        restorer.set_task(task)

    def there_and_back() -> None:  # two changes
        for task in tasks:
            restorer.set_task(task)

    benchmark.pedantic(there_and_back, rounds=20, warmup_rounds=2)
    benchmark.extra_info["threads"] = torch.get_num_threads()
