import pytest
import torch
from safetensors.torch import save_file

from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.training.freeze import freeze
from dtpm_fast.training.pack import pack
from dtpm_fast.weights_file import fill, fill_start, load_model, read_weights, save_weights, sha256


def make(preset="tiny", stage=2, **settings):
    config = Config.of(**{"preset": preset, "semantic_code": "none", **settings})
    return DTPM(config.model, stage), config


def test_round_trip_with_config_inside(tmp_path):
    model, config = make(adapter_ratio=0.5)
    save_weights(tmp_path / "w.safetensors", model.state_dict(), config, 2, "derain", {"minutes": 3})
    weights = read_weights(tmp_path / "w.safetensors")
    assert (weights.config, weights.stage, weights.task, weights.trained) == (config, 2, "derain", {"minutes": 3})
    again = load_model(weights, stage=2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_half_precision_storage_loads_as_float32(tmp_path):
    model, config = make()
    save_weights(tmp_path / "w.safetensors", model.state_dict(), config, 2, "derain", dtype=torch.float16)
    again = load_model(read_weights(tmp_path / "w.safetensors"))
    for name, value in again.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_a_published_encoder_is_not_stored(tmp_path):
    model, config = make(semantic_code="resnet18")
    save_weights(tmp_path / "w.safetensors", model.state_dict(), config, 2, "derain")
    weights = read_weights(tmp_path / "w.safetensors")
    names = {name for name in model.state_dict() if not name.startswith("semantic.")}
    assert weights.tensors.keys() == names != model.state_dict().keys()
    fill(model, weights)  # and none of it is missing


def test_stage_1_given_where_stage_2_is_needed(tmp_path):
    model, config = make(stage=1)
    save_weights(tmp_path / "w.safetensors", model.state_dict(), config, 1)
    with pytest.raises(UserError, match=r"w\.safetensors: holds stage 1 weights, stage 2 is needed"):
        load_model(read_weights(tmp_path / "w.safetensors"), stage=2)


def test_another_presets_weights_do_not_fit(tmp_path):
    model, config = make(stage=1)
    save_weights(tmp_path / "w.safetensors", model.state_dict(), config, 1)
    other, _ = make("light")
    with pytest.raises(UserError, match=r"does not fit this model: .* preset is tiny"):
        fill(other, read_weights(tmp_path / "w.safetensors"))


def test_a_task_beside_its_prior(tmp_path):
    model, config = make()
    prior, task = tmp_path / "light-prior.safetensors", tmp_path / "task.safetensors"
    of_task = {k: v for k, v in model.state_dict().items() if k.startswith(("adapters.", "predictor."))}
    of_prior = {k: v for k, v in model.state_dict().items() if k not in of_task}
    save_weights(prior, of_prior, config, 1)
    save_weights(task, of_task, config, 2, "derain", prior={"file": prior.name, "sha256": sha256(prior)})
    again = load_model(read_weights(task)).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    save_weights(prior, {k: v + 1 for k, v in of_prior.items()}, config, 1)
    with pytest.raises(UserError, match=r"is not the prior that task\.safetensors was trained with"):
        read_weights(task)
    prior.unlink()
    with pytest.raises(UserError, match=r"its prior light-prior\.safetensors is not beside it"):
        read_weights(task)
    save_weights(task, of_task, config, 2, "derain", prior={"file": "../prior.safetensors", "sha256": ""})
    with pytest.raises(UserError, match="no plain file name"):
        read_weights(task)


def test_packing_splits_a_task_from_its_prior(tmp_path):
    model, config = make()
    of_prior = {k: v for k, v in model.state_dict().items() if not k.startswith(("adapters.", "predictor."))}
    save_weights(tmp_path / "prior.safetensors", of_prior, config, 1)
    save_weights(tmp_path / "task.safetensors", model.state_dict(), config, 2, "derain", {"steps": 3})
    shipped = tmp_path / "shipped"
    pack(tmp_path / "prior.safetensors", shipped / "tiny-prior.safetensors")
    pack(tmp_path / "task.safetensors", shipped / "tiny-derain.safetensors", shipped / "tiny-prior.safetensors")
    packed = read_weights(shipped / "tiny-derain.safetensors")
    assert (packed.task, packed.stage, packed.trained) == ("derain", 2, {"steps": 3})
    again = load_model(packed).state_dict()
    assert all(torch.equal(again[name], value.half().float()) for name, value in model.state_dict().items())
    assert (shipped / "tiny-derain.safetensors").stat().st_size < (shipped / "tiny-prior.safetensors").stat().st_size
    save_weights(tmp_path / "other.safetensors", {k: v + 1 for k, v in of_prior.items()}, config, 1)
    pack(tmp_path / "other.safetensors", shipped / "other-prior.safetensors")
    for prior, message in (
        (shipped / "other-prior.safetensors", "was not trained on"),
        (tmp_path / "prior.safetensors", "must lie beside"),
    ):
        with pytest.raises(UserError, match=message):
            pack(tmp_path / "task.safetensors", shipped / "again.safetensors", prior)
    assert not (shipped / "again.safetensors").exists()


@pytest.mark.parametrize("tune", ["adapters", "adapters_only", "predictor"])
def test_fine_tuning_starts_from_adapters_and_predictor_whichever_trains(tmp_path, tune):
    torch.manual_seed(0)
    first, config = make()
    second, _ = make()
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter)
    save_weights(tmp_path / "w.safetensors", first.state_dict(), config, 2, "derain")
    freeze(second, tune)
    fill_start(second, read_weights(tmp_path / "w.safetensors"))
    own, given = second.state_dict(), first.state_dict()
    for name, value in own.items():
        assert torch.equal(value, given[name]) == name.startswith(("adapters.", "predictor."))
    trained = {name.split(".")[0] for name, p in second.named_parameters() if p.requires_grad}
    assert trained == {"adapters": {"adapters", "predictor"}, "adapters_only": {"adapters"}}.get(tune, {tune})
    prior, _ = make(stage=1)
    save_weights(tmp_path / "prior.safetensors", prior.state_dict(), config, 1)
    with pytest.raises(UserError, match=r"cannot start from it: (adapters|predictor)\..* the file has no such tensor"):
        fill_start(second, read_weights(tmp_path / "prior.safetensors"))


@pytest.mark.parametrize("tune", ["all", "encoder"])
def test_a_prior_is_not_overwritten_by_a_start(tmp_path, tune):
    first, config = make()
    save_weights(tmp_path / "w.safetensors", first.state_dict(), config, 2, "derain")
    for has_prior in (True, False):
        model, _ = make()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        freeze(model, tune)
        fill_start(model, read_weights(tmp_path / "w.safetensors"), has_prior)
        kept = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
        denoiser = {name for name, p in model.named_parameters() if name.startswith("denoiser.")}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert kept & denoiser == (denoiser if has_prior else denoiser - trained)


def test_damaged_and_foreign_files(tmp_path):
    text = tmp_path / "text.safetensors"
    text.write_text("this is no safetensors file at all")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    model, config = make(stage=1)
    cut = tmp_path / "cut.safetensors"
    save_weights(cut, model.state_dict(), config, 1)
    cut.write_bytes(cut.read_bytes()[:-1000])
    for path, message in (
        (text, "not a readable safetensors"),
        (foreign, "not weights of dtpm-fast"),
        (cut, "not a readable"),
        (tmp_path / "no", "no such weights"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_weights(path)
        assert str(path) in str(caught.value)


def test_values_that_are_no_numbers_and_odd_headers(tmp_path):
    model, config = make()
    state = model.state_dict()
    state["denoiser.intro.weight"][0, 0, 0, 0] = torch.nan
    save_weights(tmp_path / "w.safetensors", state, config, 2, "derain")
    with pytest.raises(UserError, match=r"w\.safetensors: is damaged: denoiser\.intro\.weight"):
        load_model(read_weights(tmp_path / "w.safetensors"))
    for key in ("prior", "trained"):
        header = {"format": "dtpm-fast-1", "stage": "2", "task": "derain", "config": config.to_json(), key: "[1]"}
        save_file({"a": torch.zeros(2)}, tmp_path / "odd.safetensors", header)
        with pytest.raises(UserError, match=r"odd\.safetensors: not a readable"):
            read_weights(tmp_path / "odd.safetensors")


def test_missing_tensors_are_named(tmp_path):
    model, config = make()
    state = model.state_dict()
    del state["denoiser.intro.weight"]
    save_weights(tmp_path / "w.safetensors", state, config, 2, "derain")
    with pytest.raises(UserError, match=r"lacks 1 tensors of this model, the first is denoiser\.intro\.weight"):
        load_model(read_weights(tmp_path / "w.safetensors"))
