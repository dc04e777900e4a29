"""What a run leaves on disk: the last states, the best weights; and a run that survives being killed many times."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.train import main
from dtpm_fast.training.checkpoints import list_states, locked, newest_state, save_state
from dtpm_fast.training.ema import EMA
from dtpm_fast.weights_file import read_weights, save_weights

KILLS = int(os.environ.get("DTPM_KILLS", 20))  # random SIGKILLs in a run of 300 iterations


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


@pytest.mark.parametrize("other", ["validation_steps=2", "seed=9"])  # the second makes other crops
def test_a_resume_that_validates_otherwise_has_a_best_of_its_own(photos, tmp_path, tiny, capsys, monkeypatch, other):
    settings = [*tiny, "validate_every=2", "checkpoint_every=2", "validation_images=1", "validation_steps=1"]
    monkeypatch.setattr("dtpm_fast.training.loop.score", scripted(-0.5))
    assert main(arguments(photos, tmp_path / "run", [*settings, "steps=2"])) == 0
    monkeypatch.setattr("dtpm_fast.training.loop.score", scripted(-0.9))  # of another kind than the first
    assert main(arguments(photos, tmp_path / "run", [*settings, "steps=4", other], "--resume")) == 0
    assert "weights-best begins anew" in capsys.readouterr().out
    assert read_weights(tmp_path / "run" / "weights-best.safetensors").trained["steps"] == 4


def test_a_state_with_other_settings_of_training_resumes(photos, tmp_path, tiny, capsys):
    """Some of now are not in it, and one that is in it has gone."""
    settings = [*tiny, "steps=4", "checkpoint_every=2", "validation_images=0"]
    assert main(arguments(photos, tmp_path / "run", settings)) == 0
    wanted = load_file(tmp_path / "run" / "weights.safetensors")
    newest, before = list_states(tmp_path / "run")
    newest.unlink()
    state = torch.load(before, weights_only=True)
    config = json.loads(state["config"])
    for name in ("accumulate", "compile", "activation_checkpointing", "deterministic", "optimizer"):
        del config["train"][name]
    config["train"]["long_gone"] = 1
    torch.save({**state, "config": json.dumps(config)}, before)
    assert main(arguments(photos, tmp_path / "run", settings, "--resume")) == 0
    assert "resumed at iteration 2 of 4" in capsys.readouterr().out
    found = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.fixture
def ctrl_c():
    """Python's own, also where the tests were started with SIGINT ignored, as a shell starts `pytest &`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_update_is_finished_before_it_is_saved(photos, tmp_path, tiny, capsys, monkeypatch, number):
    """Ctrl-C or SIGTERM between the new weights and their averages: what is saved is the state of a whole iteration."""
    settings = [*tiny, "steps=4", "validation_images=0"]
    assert main(arguments(photos, tmp_path / "whole", settings)) == 0
    update = EMA.update

    def interrupted(self, step):
        if step == 2 and not list_states(tmp_path / "run"):
            os.kill(os.getpid(), number)
        update(self, step)

    monkeypatch.setattr(EMA, "update", interrupted)
    assert main(arguments(photos, tmp_path / "run", settings)) == 1
    assert "stopped at iteration 2; the state is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert main(arguments(photos, tmp_path / "run", settings, "--resume")) == 0
    whole, resumed = (load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_while_the_best_weights_are_written_waits(photos, tmp_path, tiny, capsys, monkeypatch):
    """Else their score is in the state, and they are not on disk."""
    settings = [*tiny, "steps=4", "validate_every=2", "validation_images=1"]

    def save(path, *given):
        if path.name == "weights-best.safetensors":
            os.kill(os.getpid(), signal.SIGINT)
        save_weights(path, *given)

    monkeypatch.setattr("dtpm_fast.training.loop.score", scripted(-1.0))
    monkeypatch.setattr("dtpm_fast.training.loop.save_weights", save)
    assert main(arguments(photos, tmp_path / "run", settings)) == 1
    assert "stopped at iteration 2; the state is saved" in capsys.readouterr().err
    state, _ = newest_state(tmp_path / "run")
    assert state["best"] == -1
    assert read_weights(tmp_path / "run" / "weights-best.safetensors").trained["steps"] == 2


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_while_the_weights_return_from_a_validation_waits(photos, tmp_path, tiny, capsys, monkeypatch):
    """Else the averages are saved as the weights that train, and the run goes on from those."""
    settings = [*tiny, "steps=4", "validate_every=2", "validation_images=1"]
    assert main(arguments(photos, tmp_path / "whole", settings)) == 0
    copy, interrupted = EMA._copy, []

    def copied(self, values):
        if values is not self.average and not interrupted:
            interrupted.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        copy(self, values)

    monkeypatch.setattr(EMA, "_copy", copied)
    assert main(arguments(photos, tmp_path / "run", settings)) == 1
    assert "stopped at iteration 2; the state is saved" in capsys.readouterr().err
    assert main(arguments(photos, tmp_path / "run", settings, "--resume")) == 0
    whole, resumed = (load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("first", ["worker", "run"])
def test_a_signal_to_a_whole_group_ends_the_loaders_workers_too(photos, tmp_path, tiny, capsys, monkeypatch, first):
    """As systemd, SLURM and pkill send it: the dead worker is an error neither in an update nor while it is saved."""
    update, save = EMA.update, torch.save

    def end_workers():
        for worker in multiprocessing.active_children():
            subprocess.run(["kill", str(worker.pid)], check=True)  # a parent's own signal would be no fault to it
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie, for the loader to find

    def stopped(self, step):
        if step == 2:
            if first == "worker":
                end_workers()
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, step)

    def saved(*given):
        if first == "run":
            end_workers()
        save(*given)

    monkeypatch.setattr(EMA, "update", stopped)
    monkeypatch.setattr(torch, "save", saved)
    run = tmp_path / "run"
    assert main(arguments(photos, run, [*tiny, "steps=40", "validation_images=0", "workers=1"])) == 1
    assert "stopped at iteration 2; the state is saved" in capsys.readouterr().err
    assert [path.name for path in list_states(run)] == ["step-00000002.pt"]
    assert callable(signal.getsignal(signal.SIGCHLD))  # the loader's own handler is in its place again


def test_weights_without_a_checkpoint_are_not_trained_over(photos, tmp_path, tiny, capsys):
    settings = [*tiny, "steps=1", "validation_images=0"]
    run = tmp_path / "run"
    assert main(arguments(photos, run, settings)) == 0
    shutil.rmtree(run / "checkpoints")
    before = (run / "weights.safetensors").read_bytes()
    assert main(arguments(photos, run, settings)) == 1
    assert "holds an earlier run's weights" in capsys.readouterr().err
    assert (run / "weights.safetensors").read_bytes() == before


def test_states_that_cannot_be_read_do_not_drive_out_new_ones(tmp_path):
    for step in (2000, 3000):
        path = tmp_path / "checkpoints" / f"step-{step:08d}.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"" if step == 3000 else b"junk")
    for step in (900, 1000, 1100):
        save_state(tmp_path, step, {}, keep=2)
    assert [path.name[5:-3] for path in list_states(tmp_path)] == ["00003000", "00002000", "00001100", "00001000"]
    state, broken = newest_state(tmp_path)
    assert state == {"step": 1100}
    assert [line.split(": ", 1)[1][:12] for line in broken] == ["not readable"] * 2


def fill_the_disk(run, found):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    large = {"x": torch.zeros(100_000)}
    for write in (
        lambda: save_state(run, 2, large, keep=2),
        lambda: save_weights(run / "checkpoints" / "w.safetensors", large, Config.of(), 1),
    ):
        try:
            write()
        except UserError as error:
            found.send(str(error))


def test_a_full_disk_is_one_line_and_keeps_the_state_before(tmp_path):
    save_state(tmp_path, 1, {"x": torch.zeros(10)}, keep=2)
    context = multiprocessing.get_context("spawn")
    receives, sends = context.Pipe(duplex=False)
    process = context.Process(target=fill_the_disk, args=(tmp_path, sends))
    process.start()
    process.join(120)
    for name in ("step-00000002.pt", "w.safetensors"):
        assert receives.poll(1)
        message = receives.recv()
        assert f"{name}: could not be written" in message and "\n" not in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


def test_half_a_file_of_a_killed_process_goes(tmp_path):
    save_state(tmp_path, 1, {}, keep=2)
    whole = tmp_path / "weights.safetensors"
    for name in (whole, tmp_path / ".weights.safetensors.ab12.safetensors"):
        name.write_bytes(b"weights")
    half = tmp_path / "checkpoints" / ".step-00000002.pt.ab12.pt"
    half.write_bytes(b"half")
    with locked(tmp_path):
        assert list((tmp_path / "checkpoints").iterdir()) == list_states(tmp_path)
        assert list(tmp_path.glob("*weights*")) == [whole]


def test_a_file_system_without_locks_is_said(tmp_path, caplog, monkeypatch):
    def acquire(lock, timeout):
        raise NotImplementedError  # as filelock does there

    monkeypatch.setattr("dtpm_fast.training.checkpoints.FileLock.acquire", acquire)
    with locked(tmp_path):
        pass
    assert f"{tmp_path}: this file system has no locks" in caplog.text


def hold(folder, ready):
    with locked(folder):
        ready.set()
        time.sleep(600)


def test_a_run_folder_has_one_process_and_a_killed_one_lets_go(photos, tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr("dtpm_fast.training.checkpoints.RELEASE", 0.1)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready))
    other.start()
    assert ready.wait(120)
    settings = [*tiny, "steps=1", "validation_images=0"]
    try:
        assert main(arguments(photos, tmp_path / "run", settings)) == 1
        assert "another process trains there" in capsys.readouterr().err
        assert not list_states(tmp_path / "run")
    finally:
        other.kill()
        other.join()
    assert main(arguments(photos, tmp_path / "run", settings)) == 0


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bits(photos, tmp_path, tiny):
    settings = [*tiny, "crop=16", "batch_size=1", "steps=300", "checkpoint_every=5", "validation_images=0"]
    context = multiprocessing.get_context("forkserver")  # torch is imported once, and a start takes no time
    context.set_forkserver_preload(["dtpm_fast.train"])
    seed = random.randrange(2**32)
    print(f"moments by seed {seed}")  # shown when the test fails
    killed, moments, kills = tmp_path / "killed", random.Random(seed), 0
    while kills < KILLS:
        known = list_states(killed)
        process = context.Process(
            target=main, args=(arguments(photos, killed, settings, *(["--resume"] * bool(known))),)
        )
        process.start()
        if moments.random() < 0.7:  # gets on before it is killed: in a step, in a checkpoint
            while process.is_alive() and list_states(killed) == known:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.1))
        else:  # or while it starts
            time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    print(f"killed {kills} times")
    assert kills > KILLS // 2
    assert main(arguments(photos, killed, settings, *(["--resume"] * bool(list_states(killed))))) == 0
    assert main(arguments(photos, tmp_path / "whole", settings)) == 0
    whole, resumed = (load_file(run / "weights.safetensors") for run in (tmp_path / "whole", killed))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
