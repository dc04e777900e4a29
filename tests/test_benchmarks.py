"""`pytest benchmarks/ --benchmark-only` finds its benchmarks; how fast they are is no test's affair."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_benchmarks_are_collected_without_a_warning() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--collect-only", "-q"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in ("bench_cpu.py", "bench_kernels.py"):
        assert f"benchmarks/{file}::" in done.stdout
