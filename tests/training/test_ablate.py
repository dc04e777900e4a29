"""Table 6 in one command, at the smallest scale."""

import json

import pytest

from dtpm_fast.training import ablate
from dtpm_fast.weights_file import read_weights

PAPER = {  # table 6, p. 2531
    "w/o Stage I Training": ("28.90", "0.0740"),
    "w/o Initial Predictor": ("26.91", "0.0790"),
    "w/o Semantic Code": ("29.79", "0.0653"),
    "Fine-tune Enc. w/o Adapters": ("29.20", "0.0667"),
    "Fine-tune Dec. w/o Adapters": ("28.91", "0.0691"),
    "Fine-tune Enc. & Dec. w/o Adapters": ("29.13", "0.0712"),
    "Ours (DTPM-4S)": ("30.99", "0.0635"),
}
SETTINGS = ("preset=tiny", "crop=16", "batch_size=1", "workers=0", "validation_images=2", "steps=2", "lr=1e-3")


def run(photos, output, *more, settings=SETTINGS):
    arguments = ["--photos", str(photos), "--task", "rainhaze", "--data", str(photos), "--output", str(output)]
    return ablate.main([*arguments, "--device", "cpu", *more, "--set", *settings, "--set-prior", "steps=1"])


def cells(markdown):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_seven_rows_are_trained_measured_and_kept(photos, tmp_path, capsys, monkeypatch):
    output = tmp_path / "table6"
    assert run(photos, output) == 0
    printed = capsys.readouterr().out
    rows = cells((output / "table.md").read_text(encoding="utf-8"))
    assert (output / "table.md").read_text(encoding="utf-8") in printed
    assert {name: tuple(row[3:]) for name, row in rows.items()} == PAPER
    results = {r["row"]: r for r in json.loads((output / "table.json").read_text(encoding="utf-8"))}
    assert all(f"{r['psnr']:.2f}" == rows[r["name"]][0] and 5 < r["psnr"] < 60 for r in results.values())
    assert results["no-predictor"]["psnr_predictor"] == results["no-predictor"]["psnr_input"]
    assert len({r["psnr"] for r in results.values()}) == 7  # no setting is without effect

    trained = {key: read_weights(output / key / "weights.safetensors") for key in ablate.TABLE_6}
    assert trained["no-code"].config.model.semantic_code == "none"
    assert trained["encoder"].config.train.tune == "encoder"
    assert not any(name.startswith("adapters.") for name in trained["decoder"].tensors)
    assert sorted(p.name for p in output.glob("prior*")) == ["prior", "prior-semantic_code-none"]

    def fails(command):
        raise AssertionError(f"trained again: {command}")

    monkeypatch.setattr(ablate, "start", fails)
    assert run(photos, output) == 0
    assert cells((output / "table.md").read_text(encoding="utf-8")) == rows
    assert run(photos, output, settings=[*SETTINGS, "lr=1e-2"]) == 1
    assert "choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "settings", "message"),
    [
        (["--photos", "absent"], SETTINGS, "absent: no such folder"),
        (["--data", "absent"], SETTINGS, "absent: no such folder"),
        (["--set-prior", "stepz=1"], SETTINGS, "unknown setting 'stepz'"),
        ([], (*SETTINGS, "validation_images=0"), "validation_images = 0"),
    ],
)
def test_an_error_in_any_row_comes_before_the_first_one_trains(photos, tmp_path, capsys, more, settings, message):
    assert run(photos, tmp_path / "out", *more, settings=settings) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_measured_again_has_the_same_figures(photos, tmp_path, random_weights):
    """Fresh noise of the sampler (eta) included."""
    settings = {"eta": 0.5, "crop": 16, "validation_images": 2, "validation_steps": 2}
    weights = random_weights(tmp_path / "weights.safetensors", "rainhaze", **settings)
    first, second = (ablate.measure(weights, "rainhaze", photos, None, "cpu") for _ in range(2))
    assert first == second


def test_an_interrupted_row_goes_on_from_its_checkpoint(photos, tmp_path, capsys):
    settings = [*SETTINGS, "checkpoint_every=1"]
    assert run(photos, tmp_path, "--rows", "no-stage1", settings=settings) == 0
    before = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    folder = tmp_path / "no-stage1"
    for path in (folder / "result.json", folder / "weights.safetensors", max((folder / "checkpoints").iterdir())):
        path.unlink()
    assert run(photos, tmp_path, "--rows", "no-stage1", settings=settings) == 0
    assert "resumed at iteration 1 of 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text(encoding="utf-8")) == before


def test_every_open_choice_is_a_valid_setting():
    for row in ablate.OPEN_CHOICES.values():
        assert row.paper_psnr is None
        changed = ablate.Config.load(None, [*row.both, *row.stage2])
        assert changed != ablate.Config.of()
    with pytest.raises(SystemExit) as usage:
        ablate.main(["--photos", "x", "--task", "derain", "--data", "x", "--output", "y", "--rows", "nonsense"])
    assert usage.value.code == 2
