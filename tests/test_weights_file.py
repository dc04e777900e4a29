import pytest
import torch
from safetensors.torch import save_file

from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.weights_file import fill, load_model, read_weights, save_weights


def make(preset="tiny", stage=2, **settings):
    config = Config.of(preset=preset, semantic_code="none", **settings)
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


def test_missing_tensors_are_named(tmp_path):
    model, config = make()
    state = model.state_dict()
    del state["denoiser.intro.weight"]
    save_weights(tmp_path / "w.safetensors", state, config, 2, "derain")
    with pytest.raises(UserError, match=r"lacks 1 tensors of this model, the first is denoiser\.intro\.weight"):
        load_model(read_weights(tmp_path / "w.safetensors"))
