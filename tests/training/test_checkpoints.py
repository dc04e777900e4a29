"""What a run leaves on disk: the last states, the best weights; and a run that survives being killed many times."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dtpm_fast.train import main
from dtpm_fast.training.checkpoints import list_states
from dtpm_fast.weights_file import read_weights


def arguments(photos, output, settings, *more):
    return [
        "--stage", "1", "--data", str(photos), "--output", str(output), "--device", "cpu", *more, "--set", *settings
    ]  # fmt: skip


def scripted(*scores):
    """Stands for `score`; None is Ctrl-C in the middle of a validation."""
    left = iter(scores)

    def score(_):
        if (value := next(left)) is None:
            raise KeyboardInterrupt
        return value

    return score


def test_the_best_validation_keeps_its_weights_over_a_resume(photos, tmp_path, tiny, capsys, monkeypatch):
    settings = [*tiny, "steps=8", "validate_every=2", "checkpoint_every=2", "validation_images=1"]
    monkeypatch.setattr("dtpm_fast.training.loop.score", scripted(-1.0, -0.5, None))
    assert main(arguments(photos, tmp_path / "run", settings)) == 1
    assert "stopped at iteration 6" in capsys.readouterr().err
    monkeypatch.setattr("dtpm_fast.training.loop.score", scripted(-0.9))  # better than the first, not than the best
    assert main(arguments(photos, tmp_path / "run", settings, "--resume")) == 0
    best = read_weights(tmp_path / "run" / "weights-best.safetensors")
    assert best.trained["steps"] == 4
    assert set(best.trained["validation"]) >= {"eps_loss_0", "psnr_texture"}
    assert [path.name for path in list_states(tmp_path / "run")] == ["step-00000008.pt", "step-00000006.pt"]


def test_a_state_of_before_there_were_these_settings_resumes(photos, tmp_path, tiny, capsys):
    """States lack what later versions added: the best validation, the loss scale, and settings of training."""
    settings = [*tiny, "steps=4", "checkpoint_every=2", "validation_images=0"]
    assert main(arguments(photos, tmp_path / "run", settings)) == 0
    wanted = load_file(tmp_path / "run" / "weights.safetensors")
    newest, before = list_states(tmp_path / "run")
    newest.unlink()
    state = torch.load(before, weights_only=True)
    config = json.loads(state["config"])
    for name in ("accumulate", "compile", "activation_checkpointing", "deterministic"):
        del config["train"][name]
    config["train"]["long_gone"] = 1
    del state["best"], state["scaler"]
    torch.save({**state, "config": json.dumps(config)}, before)
    assert main(arguments(photos, tmp_path / "run", settings, "--resume")) == 0
    assert "resumed at iteration 2 of 4" in capsys.readouterr().out
    found = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bits(photos, tmp_path, tiny):
    settings = [*tiny, "crop=16", "batch_size=1", "steps=300", "checkpoint_every=10", "validation_images=0"]
    assert main(arguments(photos, tmp_path / "whole", settings)) == 0
    killed, moments = tmp_path / "killed", random.Random()
    for kill in range(5):
        more = ["--resume"] if kill else []
        process = subprocess.Popen(
            [sys.executable, "-m", "dtpm_fast.train", *arguments(photos, killed, settings, *more)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        known = list_states(killed)
        while list_states(killed) == known:  # so that every process gets on
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))  # anywhere: in a step, in a checkpoint, after the end
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if list_states(killed)[0].name == "step-00000300.pt":
            break
    assert main(arguments(photos, killed, settings, "--resume")) == 0
    whole, resumed = (load_file(run / "weights.safetensors") for run in (tmp_path / "whole", killed))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
