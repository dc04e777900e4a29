import pytest

from dtpm_fast.config import PRESETS, Config
from dtpm_fast.errors import UserError


def test_the_papers_training_is_the_default():
    train = Config.of(preset="base").train
    assert (train.steps, train.batch_size, train.crop, train.lr) == (800_000, 32, 256, 1.5e-4)


def test_later_sources_override_earlier_ones(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "tiny"\n[train]\nlr = 1e-3\ncrop = 64\n')
    config = Config.load(file, ["lr=0.002", "semantic_code=none"], {"steps": 7})
    assert config.model.width == PRESETS["tiny"]["width"] and config.model.semantic_code == "none"
    assert (config.train.lr, config.train.crop, config.train.steps) == (0.002, 64, 7)


def test_json_round_trip():
    config = Config.of(preset="tiny", lr=1e-3, encoder_blocks=[1, 2, 3], eta=0.5)
    assert Config.from_json(config.to_json()) == config


def test_weights_outlive_settings_of_training():
    config = Config.of(preset="tiny")
    text = config.to_json().replace('"train": {', '"train": {"setting_of_old": 3, ')
    assert Config.from_json(text) == config
    for other in ("[]", "{}", "no json", '{"model": {"width": "wide"}, "diffusion": {}, "train": {}}'):
        with pytest.raises(UserError):
            Config.from_json(other)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "key=value"), ("stpes=3", "unknown setting 'stpes'"), ("steps=0", "at least 1"),
        ("lr=-1", "greater than 0"), ("lr=inf", "must be finite"), ("clip_grad=nan", "must be finite"),
        ("strength=-1", "must not be negative"),
        ("preset=huge", "choose one of tiny, light, base"), ("loss=l3", "choose one of l1, l2"),
        ("steps=many", "expected int"),
        ("steps=1.5", "expected int"), ("encoder_blocks=3", "list of positive whole numbers"),
        ("crop=100", "multiple of 16"),
        ("beta_start=0.5", "beta_start <= beta_end"), ("eta=2", "between 0 and 1"), ("clip=1", "expected bool"),
        ("decoder_blocks=[1,1]", "equally many levels"), ("adapter_ratio=0.001", "leaves no channel"),
        ("predictor_decoder_blocks=[1,1]", "predictor_encoder_blocks and predictor_decoder_blocks: need equally many"),
        ("encoder_blocks=[1,1] decoder_blocks=[1,1] crop=24", "crop = 24: must be a multiple of 16"),  # the predictor's
        ("loss_weighting=edm parameterization=eps", "set parameterization=preconditioned"),
        ("embedding=63", "embedding = 63: must be even"),
        ("beta_end=1.0", "beta_end < 1"), ("ema=1.5", "ema = 1.5: must lie between 0 and 1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(UserError, match=message):
        Config.load(None, setting.split())


def test_a_broken_toml_file_is_named(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text("lr = = 3")
    with pytest.raises(UserError, match=r"broken\.toml"):
        Config.load(file)
    with pytest.raises(UserError, match="no such file"):
        Config.load(tmp_path / "absent.toml")
