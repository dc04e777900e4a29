"""Several processes train as one with their batches together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dtpm_fast.errors import UserError
from dtpm_fast.train import main
from dtpm_fast.training.checkpoints import list_states
from dtpm_fast.training.world import World

HANGS = 900  # seconds after which a run counts as hung; half a minute on a machine with nothing else to do
SETTINGS = ("steps=12", "log_every=1", "validation_images=1", "validate_every=6", "checkpoint_every=3", "accumulate=2")


def arguments(photos, output, settings):
    stage = ["--stage", "2", "--task", "derain", "--data", str(photos), "--output", str(output), "--device", "cpu"]
    return [*stage, "--set", *settings, *SETTINGS, "tune=all"]


def losses(output):
    """The loss of every iteration, by TensorBoard's files; what a killed process repeated counts once."""
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def assert_same_curve(output, single):
    found, wanted = losses(output), losses(single)
    assert found.keys() == wanted.keys() == set(range(1, 13))
    for step, value in wanted.items():
        assert found[step] == pytest.approx(value, rel=1e-5), step


@pytest.fixture
def single(photos, tmp_path, tiny):
    """One process with the double batch, for the two processes to be held against."""
    assert main(arguments(photos, tmp_path / "single", [*tiny, "batch_size=4"])) == 0
    return tmp_path / "single"


def test_two_processes_equal_one_with_the_double_batch(photos, tmp_path, tiny, single):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dtpm_fast.train", *arguments(photos, tmp_path / "two", tiny)]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **group, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    try:
        said, complained = zip(*[rank.communicate(timeout=HANGS) for rank in ranks], strict=True)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "2 processes (gloo)" in said[0] and "psnr_result" in said[0] and said[1] == ""
    assert not any("Grad strides do not match" in text for text in complained)
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1  # rank 0 alone writes
    assert_same_curve(tmp_path / "two", single)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_a_killed_process_again(photos, tmp_path, tiny, single, victim):
    """The run goes on from its newest checkpoint without --resume, and ends where an undisturbed one does."""
    output = tmp_path / "killed"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    agent = subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "-m", "dtpm_fast.train", *arguments(photos, output, tiny)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while not list_states(output):
            assert agent.poll() is None
            time.sleep(0.01)
        workers = children(agent.pid)
        os.kill(next(pid for pid in workers if rank_of(pid) == victim), signal.SIGKILL)
        said = agent.communicate(timeout=HANGS)[0]
    finally:
        if agent.poll() is None:
            workers = children(agent.pid)  # each is in a session of its own
            agent.kill()
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
    assert agent.returncode == 0
    resumed = re.search(r"resumed at iteration (3|6|9) of 12", said)
    assert resumed
    curve, undisturbed = losses(output), losses(single)
    assert set(range(int(resumed[1]) + 1, 13)) <= curve.keys()  # what SIGKILL found unwritten is not logged again
    assert all(curve[step] == pytest.approx(undisturbed[step], abs=1e-5) for step in curve)
    found, wanted = (load_file(run / "weights.safetensors") for run in (output, single))
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)


def children(pid):
    """The processes that a process has started (Linux)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid):
    """RANK in a process's environment; None where it has none."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")), None)


def test_the_world_is_read_from_torchruns_variables(monkeypatch):
    assert World.from_environment() == World(0, 1, 0)
    for name, value in {"RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    world = World.from_environment()
    assert world == World(9, 16, 1)
    assert not world.leads and not world.checks_data
    assert world.device("cpu")[0] == torch.device("cpu")
    with pytest.raises(UserError, match="its own device"):
        world.device("cuda:1")
