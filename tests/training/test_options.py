"""Settings that change how a run computes, not what: held against the plain run."""

import itertools

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dtpm_fast.errors import UserError
from dtpm_fast.train import main
from dtpm_fast.training.checkpoints import list_states
from dtpm_fast.training.meter import Meter
from dtpm_fast.training.precision import Precision
from dtpm_fast.training.recompute import recompute_blocks

SETTINGS = ("steps=6", "log_every=1", "validation_images=1", "validate_every=100")


def losses(photos, output, *settings):
    """Stage II without a prior, everything training; the loss of each iteration."""
    stage = ["--stage", "2", "--task", "derain", "--data", str(photos), "--output", str(output), "--device", "cpu"]
    assert main([*stage, "--set", *settings, *SETTINGS, "tune=all"]) == 0
    return [event.value for event in scalars(output, "loss")]


def scalars(output, name):
    return figures(output, f"train/{name}")


def figures(output, tag):
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return events.Scalars(tag)


@pytest.fixture
def plain(photos, tmp_path, tiny):
    return losses(photos, tmp_path / "plain", *tiny, "batch_size=4")


def test_accumulated_batches_equal_one_large_batch(photos, tmp_path, tiny, plain):
    assert losses(photos, tmp_path / "run", *tiny, "accumulate=2") == pytest.approx(plain, rel=1e-5)


def test_activation_checkpointing_changes_no_bit(photos, tmp_path, tiny, plain):
    assert losses(photos, tmp_path / "run", *tiny, "batch_size=4", "activation_checkpointing=true") == plain


def test_deterministic_mode_trains_and_is_left_again(photos, tmp_path, tiny, plain):
    assert losses(photos, tmp_path / "run", *tiny, "batch_size=4", "deterministic=true") == plain
    assert not torch.are_deterministic_algorithms_enabled()


def test_workers_and_the_log_do_not_change_the_run(photos, tmp_path, tiny, plain, capsys):
    assert losses(photos, tmp_path / "run", *tiny, "batch_size=4", "workers=1") == plain
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("1/6: ", "6/6: "))]
    assert len(shown) == 2  # no terminal here: the first reading and the last, as lines
    assert all(part in shown[1] for part in ("loss ", "images_per_s ", "data_stall ", "memory ", " left"))
    assert all(0 <= event.value <= 1 for event in scalars(tmp_path / "run", "data_stall"))
    assert all(0.05 < event.value < 1000 for event in scalars(tmp_path / "run", "peak_memory_gib"))


def test_a_resumed_run_keeps_the_figures_up_to_its_state_and_no_later_ones(photos, tmp_path, tiny):
    """The state of iteration 4 is saved behind that iteration's reading and validation, which are not made again."""
    settings = [*tiny, "validation_images=1", "validate_every=2", "checkpoint_every=4", "log_every=1", "steps=6"]
    run = ["--stage", "1", "--data", str(photos), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*run, "--set", *settings]) == 0
    list_states(tmp_path / "run")[0].unlink()
    assert main([*run, "--resume", "--set", *settings, "log_every=2"]) == 0
    assert [event.step for event in scalars(tmp_path / "run", "loss")] == [1, 2, 3, 4, 6]
    assert [event.step for event in figures(tmp_path / "run", "validation/psnr_texture")] == [2, 4, 6]


@pytest.mark.slow
def test_compiled_training_follows_the_plain_one(photos, tmp_path, tiny, plain):
    assert losses(photos, tmp_path / "run", *tiny, "batch_size=4", "compile=true") == pytest.approx(plain, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11's
def test_recomputed_blocks_need_less_memory_and_keep_their_names(random_model):
    model, _ = random_model(0)
    model.requires_grad_(True)
    names, before = list(model.state_dict()), peak_of_a_step(model)
    recompute_blocks(model)
    assert peak_of_a_step(model) < 0.5 * before
    assert list(model.state_dict()) == names


def peak_of_a_step(model):
    """The allocator's peak, in bytes above the start, of the predictor's forward and backward pass."""
    x = torch.randn(2, 3, 64, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model.predict(x).sum().backward()
    model.zero_grad(set_to_none=True)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def test_float16_needs_cuda(photos, tmp_path, tiny, capsys):
    stage = ["--stage", "1", "--data", str(photos), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*stage, "--set", *tiny, "precision=float16"]) == 1
    assert "trains on CUDA only" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_precision_by_name():
    cpu = torch.device("cpu")
    for name, dtype in {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        precision = Precision(name, cpu)
        with precision.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert not precision.overflow_is_normal()
    with pytest.raises(UserError):
        Precision("float16", cpu)


def test_the_meter_tells_waiting_training_and_pauses_apart(monkeypatch):
    now = 100.0
    monkeypatch.setattr("dtpm_fast.training.meter.time.perf_counter", lambda: now)
    meter = Meter()
    with meter.waiting():
        now += 1
    now += 3
    with meter.paused():
        now += 50
    meter.count(8)
    assert meter.read() == {"images_per_s": 2.0, "data_stall": 0.25}
    now += 2
    meter.count(4)
    assert meter.read() == {"images_per_s": 2.0, "data_stall": 0.0}
