"""`python -m dtpm_fast.train` as a user runs it: both stages, resume, and what goes wrong."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dtpm_fast.train import main
from dtpm_fast.training.checkpoints import list_states
from dtpm_fast.training.pack import main as pack
from dtpm_fast.weights_file import read_weights


def stage1(photos, output, settings, *more):
    return main(
        ["--stage", "1", "--data", str(photos), "--output", str(output), "--device", "cpu", *more, "--set", *settings]
    )


def stage2(photos, output, settings, *more):
    arguments = ["--stage", "2", "--task", "derain", "--data", str(photos), "--output", str(output), "--device", "cpu"]
    return main([*arguments, *more, "--set", *settings])


def test_both_stages_and_a_frozen_prior(photos, tmp_path, tiny, capsys):
    prior, task = tmp_path / "prior" / "weights.safetensors", tmp_path / "task" / "weights.safetensors"
    assert stage1(photos, tmp_path / "prior", [*tiny, "steps=6"]) == 0
    assert stage2(photos, tmp_path / "task", [*tiny[2:], "steps=6"], "--prior", str(prior)) == 0
    before, after = load_file(prior), load_file(task)
    assert before and all(torch.equal(after[name], value) for name, value in before.items())
    assert any(
        name.startswith("adapters.") and value.abs().max() > 0 for name, value in after.items() if "m_out" in name
    )
    weights = read_weights(task)
    assert (weights.stage, weights.task, weights.trained["steps"]) == (2, "derain", 6)
    assert "psnr_predictor" in capsys.readouterr().out
    assert list((tmp_path / "task" / "tensorboard").iterdir())


def test_the_denoising_loss_falls(photos, tmp_path, tiny, capsys):
    """With raw epsilon, where all is to be learned: the preconditioned model starts as the ideal one of a Gaussian."""
    settings = [*tiny, "parameterization=eps", "steps=60", "lr=2e-3", "validate_every=20", "batch_size=4"]
    assert stage1(photos, tmp_path / "run", settings) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "eps_loss_0" in line]
    first, last = (float(line.split("eps_loss_0 ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert len(lines) == 3 and last < 0.9 * first


ENCODER, DECODER = ("intro.", "encoders.0.", "downs.0.", "middle_blks.0."), ("ups.0.", "decoders.0.", "ending.")


@pytest.mark.parametrize(
    ("tune", "moves", "stays"),
    [("encoder", ENCODER, DECODER), ("decoder", DECODER, ENCODER)],
    ids=["encoder", "decoder"],
)
def test_table_6_fine_tuning_rows(photos, tmp_path, tiny, tune, moves, stays):
    assert stage1(photos, tmp_path / "prior", [*tiny, "steps=2"]) == 0
    prior = tmp_path / "prior" / "weights.safetensors"
    settings = [*tiny[2:], "steps=4", f"tune={tune}", "adapter_positions=none"]
    assert stage2(photos, tmp_path / "task", settings, "--prior", str(prior)) == 0
    before, after = load_file(prior), load_file(tmp_path / "task" / "weights.safetensors")

    def moved(part):
        return any(not torch.equal(after[n], v) for n, v in before.items() if n.startswith(f"denoiser.{part}"))

    assert all(moved(part) for part in moves) and not any(moved(part) for part in (*stays, "time_mlp."))


def psnr_of(name, printed):
    """The validations' figures of one name, in order."""
    return [float(found) for found in re.findall(rf"{name} ([\d.]+)", printed)]


def test_clean_photos_alone_train_a_task(photos, tmp_path, tiny, capsys):
    """Stage II on synthetic haze: its validation PSNR rises."""
    assert stage1(photos, tmp_path / "prior", [*tiny, "steps=2", "validation_images=0"]) == 0
    prior = str(tmp_path / "prior" / "weights.safetensors")
    settings = [*tiny[2:], "steps=240", "lr=1e-3", "ema=0.9", "batch_size=4", "validate_every=16"]
    settings += ["predictor_loss=1", "validation_images=8"]
    arguments = ["--stage", "2", "--task", "dehaze", "--data", str(photos), "--prior", prior, "--device", "cpu"]
    arguments += ["--validation", str(photos)]  # one photo held out would say little
    capsys.readouterr()
    assert main([*arguments, "--output", str(tmp_path / "task"), "--set", *settings]) == 0
    printed = capsys.readouterr().out
    assert "synthetic dehaze" in printed
    for name in ("psnr_result", "psnr_predictor"):
        psnr = psnr_of(name, printed)
        last = sum(psnr[-5:]) / 5
        assert last > psnr[0] + 0.5, printed
        assert last > psnr_of("psnr_input", printed)[-1] + 0.5, printed


def test_the_predictor_trains_alone_and_another_run_starts_from_it(photos, tmp_path, tiny, capsys):
    """The cheap start of a small budget: the predictor alone, then everything from it; a finished run is tuned on."""
    assert stage1(photos, tmp_path / "prior", [*tiny, "steps=2", "validation_images=0"]) == 0
    prior, first, second = (tmp_path / run / "weights.safetensors" for run in ("prior", "first", "second"))
    settings = [*tiny[2:], "steps=240", "lr=1e-3", "ema=0.9", "batch_size=4", "validate_every=16"]
    settings += ["tune=predictor", "validation_images=8"]
    task = ["--stage", "2", "--task", "dehaze", "--data", str(photos), "--prior", str(prior), "--device", "cpu"]
    task += ["--validation", str(photos)]
    capsys.readouterr()
    assert main([*task, "--output", str(tmp_path / "first"), "--set", *settings]) == 0
    printed = capsys.readouterr().out
    assert "psnr_result" not in printed  # nothing else has been trained that could be shown
    psnr = psnr_of("psnr_predictor", printed)
    assert sum(psnr[-5:]) / 5 > psnr[0] + 0.5, psnr
    before, after = load_file(prior), load_file(first)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    fresh = {name: value for name, value in after.items() if ".m_out." in name}
    assert fresh and not any(value.any() for value in fresh.values())  # the adapters are still the identity
    assert (tmp_path / "first" / "weights-best.safetensors").is_file()
    other = [*settings, "tune=adapters"]
    assert main([*task, "--output", str(tmp_path / "first"), "--resume", "--set", *other]) == 1
    assert "was started with another model, diffusion, optimizer, tune, stage or task" in capsys.readouterr().err

    settings = [*tiny[2:], "steps=1", "lr=1e-9", "lr_min=1e-9", "validation_images=0"]
    assert main([*task, "--output", str(tmp_path / "second"), "--init", str(first), "--set", *settings]) == 0
    started = load_file(second)
    assert all(torch.allclose(started[name], value, atol=1e-6) for name, value in after.items())
    # A prior is tuned on too, and from a file of stage II as well: its denoiser is there.
    assert stage1(photos, tmp_path / "third", [*settings, *tiny[:2]], "--init", str(second)) == 0
    third = load_file(tmp_path / "third" / "weights.safetensors")
    assert all(torch.allclose(third[name], value, atol=1e-6) for name, value in before.items())


def test_a_task_goes_on_with_its_own_sigma_data(photos, tmp_path, tiny):
    """It is in no tensor's shape, so a run that fell back to the prior's would spoil the adapters silently."""
    settings = [*tiny, "steps=1", "validation_images=0"]
    assert stage1(photos, tmp_path / "prior", settings) == 0
    prior = ["--prior", str(tmp_path / "prior" / "weights.safetensors")]
    own = [*settings, "sigma_data=0.03", "condition=predicted"]
    assert stage2(photos, tmp_path / "first", own, *prior) == 0
    init = ["--init", str(tmp_path / "first" / "weights.safetensors")]
    assert stage2(photos, tmp_path / "second", settings, *prior, *init) == 0
    assert stage2(photos, tmp_path / "third", [*settings, "sigma_data=0.05"], *prior, *init) == 0
    models = [read_weights(tmp_path / run / "weights.safetensors").config.model for run in ("prior", "second", "third")]
    assert [model.sigma_data for model in models] == [0.1, 0.03, 0.05]
    assert [model.condition for model in models] == ["degraded", "predicted", "predicted"]


def test_a_resumed_run_does_not_start_from_its_init_again(photos, tmp_path, tiny):
    """The state of the run goes first, so that the same command with --resume goes on."""
    settings = [*tiny, "validation_images=0", "checkpoint_every=2", "seed=1"]
    assert stage1(photos, tmp_path / "first", [*tiny, "steps=2", "validation_images=0"]) == 0
    init = ["--init", str(tmp_path / "first" / "weights.safetensors")]
    assert stage1(photos, tmp_path / "whole", [*settings, "steps=4"], *init) == 0
    assert stage1(photos, tmp_path / "plain", [*settings, "steps=4"]) == 0
    list_states(tmp_path / "whole")[0].rename(tmp_path / "newest")
    wanted = load_file(tmp_path / "whole" / "weights.safetensors")
    assert stage1(photos, tmp_path / "whole", [*settings, "steps=4"], *init, "--resume") == 0
    found, plain = (load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "plain"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not all(torch.equal(found[name], value) for name, value in plain.items())


def test_a_killed_run_resumes_to_the_same_bits(photos, tmp_path, tiny):
    settings = [*tiny, "steps=40", "checkpoint_every=4", "validation_images=0"]
    assert stage1(photos, tmp_path / "whole", settings) == 0
    command = [
        sys.executable,
        "-m",
        "dtpm_fast.train",
        "--stage",
        "1",
        "--data",
        str(photos),
        "--output",
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--set", *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list_states(tmp_path / "killed") and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert stage1(photos, tmp_path / "killed", settings, "--resume") == 0
    whole, resumed = (load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(photos, tmp_path, tiny, capsys):
    settings = [*tiny, "steps=8", "accumulate=2", "checkpoint_every=4", "validation_images=0"]
    assert stage1(photos, tmp_path / "run", settings) == 0
    wanted = load_file(tmp_path / "run" / "weights.safetensors")
    newest = list_states(tmp_path / "run")[0]
    newest.write_bytes(newest.read_bytes()[:5000])
    assert stage1(photos, tmp_path / "run", settings, "--resume") == 0
    out = capsys.readouterr().out
    assert "not readable" in out and "resumed at iteration 4" in out
    again = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)


def test_a_pickle_in_the_place_of_a_checkpoint_is_not_executed(photos, tmp_path, tiny):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    torch.save(Bomb(), folder / "step-00000002.pt")
    assert stage1(photos, tmp_path / "run", [*tiny, "steps=2"], "--resume") == 1
    assert not marker.exists()


def test_a_resume_with_another_prior_is_refused(photos, tmp_path, tiny, capsys):
    """The state's own denoiser would replace it without a word."""
    for number, run in enumerate(("prior", "other")):
        assert stage1(photos, tmp_path / run, [*tiny, "steps=1", "validation_images=0", f"seed={number}"]) == 0
    prior, other = (["--prior", str(tmp_path / run / "weights.safetensors")] for run in ("prior", "other"))
    settings = [*tiny[2:], "validation_images=0"]
    assert stage2(photos, tmp_path / "task", [*settings, "steps=1"], *prior) == 0
    assert stage2(photos, tmp_path / "task", [*settings, "steps=2"], *other, "--resume") == 1
    assert "was started with another --prior" in capsys.readouterr().err
    assert stage2(photos, tmp_path / "task", [*settings, "steps=2"], *prior, "--resume") == 0
    assert read_weights(tmp_path / "task" / "weights.safetensors").trained["prior"] == "weights.safetensors"


def test_a_predictor_trained_before_there_is_a_prior(photos, tmp_path, tiny, capsys):
    first, prior = tmp_path / "first", tmp_path / "prior"
    assert stage2(photos, first, [*tiny, "steps=3", "tune=predictor", "validation_images=0"]) == 0
    assert "the denoiser stays untrained" in capsys.readouterr().out
    assert stage1(photos, prior, [*tiny, "steps=2", "validation_images=0"]) == 0
    settings = [*tiny, "steps=1", "lr=1e-30", "lr_min=1e-30", "validation_images=0"]
    begun = ["--prior", str(prior / "weights.safetensors"), "--init", str(first / "weights.safetensors")]
    assert stage2(photos, tmp_path / "second", settings, *begun) == 0
    files = {run: load_file(tmp_path / run / "weights.safetensors") for run in ("first", "prior", "second")}
    for name, value in files["second"].items():
        source = "prior" if name.startswith("denoiser.") else "first"
        torch.testing.assert_close(value, files[source][name], rtol=0, atol=1e-20)


def test_what_does_not_train_stays_as_init_gave_it(photos, tmp_path, tiny):
    settings = [*tiny, "steps=2", "lr=1e-2", "validation_images=0"]
    assert stage1(photos, tmp_path / "prior", settings) == 0
    prior = ["--prior", str(tmp_path / "prior" / "weights.safetensors")]
    runs: dict[str, dict[str, torch.Tensor]] = {}
    init: list[str] = []
    for tune in ("adapters", "adapters_only", "predictor"):
        assert stage2(photos, tmp_path / tune, [*settings, f"tune={tune}"], *prior, *init) == 0
        file = tmp_path / tune / "weights.safetensors"
        runs[tune], init = load_file(file), ["--init", str(file)]
    for earlier, later, moved in [
        ("adapters", "adapters_only", "adapters."),
        ("adapters_only", "predictor", "predictor."),
    ]:
        for name, value in runs[earlier].items():
            assert name.startswith(moved) or torch.equal(runs[later][name], value), name
        of = [name for name in runs[earlier] if name.startswith(moved) and name.endswith("weight")]
        assert of and not any(torch.equal(runs[later][name], runs[earlier][name]) for name in of)


def test_what_no_shape_shows_comes_from_what_the_tensors_were_trained_for(photos, tmp_path, tiny, capsys):
    settings = [*tiny, "steps=1", "validation_images=0"]

    def model(run):
        return read_weights(tmp_path / run / "weights.safetensors").config.model

    assert stage1(photos, tmp_path / "prior", [*settings, "sigma_data=0.3", "parameterization=eps"]) == 0
    start = ["--init", str(tmp_path / "prior" / "weights.safetensors")]
    assert stage1(photos, tmp_path / "further", settings, *start) == 0
    assert model("further").sigma_data == 0.3 and model("further").parameterization == "eps"
    # A predictor trained alone has adapters too, but they do nothing: the prior's sigma_data is the one that counts.
    assert stage2(photos, tmp_path / "predictor", [*settings, "tune=predictor"]) == 0
    start = ["--init", str(tmp_path / "predictor" / "weights.safetensors")]
    prior = ["--prior", str(tmp_path / "further" / "weights.safetensors")]
    assert stage2(photos, tmp_path / "task", settings, *prior, *start) == 0
    assert model("predictor").sigma_data == 0.1 and model("task").sigma_data == 0.3
    # Adapters that were trained for another kind of output are refused.
    assert stage1(photos, tmp_path / "other", settings) == 0
    prior = ["--prior", str(tmp_path / "other" / "weights.safetensors")]
    start = ["--init", str(tmp_path / "task" / "weights.safetensors")]
    assert stage2(photos, tmp_path / "x", settings, *prior, *start) == 1
    assert "its adapters were trained for parameterization = 'eps'" in capsys.readouterr().err


def test_wrong_uses_are_one_line_each(photos, tmp_path, tiny, capsys):
    prior = tmp_path / "prior" / "weights.safetensors"
    assert stage1(photos, tmp_path / "prior", [*tiny, "steps=2", "validation_images=0"]) == 0
    capsys.readouterr()

    def fails(message, call):
        assert call() == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error

    fails("already holds a run", lambda: stage1(photos, tmp_path / "prior", [*tiny, "steps=2"]))
    fails("nothing to resume", lambda: stage1(photos, tmp_path / "none", [*tiny, "steps=2"], "--resume"))
    fails("stage 2 needs --prior", lambda: stage2(photos, tmp_path / "x", [*tiny, "steps=2"]))
    fails("no such weights file", lambda: stage2(photos, tmp_path / "x", tiny, "--prior", str(tmp_path / "absent")))
    fails(
        "preset = 'tiny', the settings say 'light'",
        lambda: stage2(photos, tmp_path / "x", ["preset=light"], "--prior", str(prior)),
    )
    fails(
        "cannot start from it",
        lambda: stage2(photos, tmp_path / "x", tiny, "--prior", str(prior), "--init", str(prior)),
    )
    fails("has shape", lambda: stage1(photos, tmp_path / "x", [*tiny, "embedding=32"], "--init", str(prior)))
    fails("belongs to stage 2", lambda: stage1(photos, tmp_path / "x", [*tiny, "tune=predictor"]))
    given = ["--prior", str(prior)]
    fails("--init gives one", lambda: stage2(photos, tmp_path / "x", [*tiny, "tune=adapters_only"], *given))
    nothing = [*tiny, "adapter_positions=none", "predictor=none"]
    fails("leaves nothing to train", lambda: stage2(photos, tmp_path / "x", nothing, *given))
    long = [*tiny, "timesteps=20", "validation_steps=50"]
    fails("has no more steps", lambda: stage2(photos, tmp_path / "x", long, *given))
    split = ["--split-file", str(tmp_path / "absent.csv")]
    fails("chooses among pairs", lambda: stage2(photos, tmp_path / "x", tiny, *given, *split))
    fails("no such folder", lambda: stage1(tmp_path / "absent", tmp_path / "x", tiny))
    fails("another model", lambda: stage1(photos, tmp_path / "prior", [*tiny, "steps=2", "embedding=32"], "--resume"))
    (tmp_path / "empty").mkdir()
    fails("no pictures in it", lambda: stage1(tmp_path / "empty", tmp_path / "x", tiny))
    (photos / "0.png").write_text("broken")
    fails("0.png", lambda: stage1(photos, tmp_path / "x", tiny))
    assert not (tmp_path / "x").exists()
    common = ["--data", str(photos), "--output", str(tmp_path / "x")]
    for flags in (
        ["--stage", "2"],
        ["--stage", "1", "--prior", "light"],
        ["--stage", "1", "--synthetic", str(photos)],
        ["--stage", "1", "--split-file", "split.csv"],
        ["--stage", "2", "--task", "derain", "--smoothed", str(photos)],
    ):
        with pytest.raises(SystemExit) as usage:
            main([*flags, *common])
        assert usage.value.code == 2


def test_a_loss_that_is_no_number_stops_with_the_batch_saved(photos, tmp_path, tiny, capsys):
    assert stage1(photos, tmp_path / "run", [*tiny, "steps=50", "lr=1e30", "clip_grad=0"]) == 1
    assert "the batch is in" in capsys.readouterr().err
    assert list((tmp_path / "run").glob("bad-batch-*.safetensors"))


def test_pack_halves_the_file(photos, tmp_path, tiny):
    assert stage1(photos, tmp_path / "run", [*tiny, "steps=2", "validation_images=0"]) == 0
    whole, half = tmp_path / "run" / "weights.safetensors", tmp_path / "half.safetensors"
    assert pack([str(whole), str(half)]) == 0
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    assert read_weights(half).trained == read_weights(whole).trained
    assert pack([str(tmp_path / "absent"), str(half)]) == 1
