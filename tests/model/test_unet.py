"""The U-Net and NAFNet's parameter names."""

import pytest
import torch

from dtpm_fast.config import Config
from dtpm_fast.model.dtpm import DTPM, Predictor, load_semantic_weights


def nafnet_names(encoder, middle, decoder):
    """The state dict names of a published NAFNet."""
    leaves = [
        f"{conv}.{part}"
        for conv in ("conv1", "conv2", "conv3", "sca.1", "conv4", "conv5", "norm1", "norm2")
        for part in ("weight", "bias")
    ]
    blocks = [f"encoders.{i}.{j}" for i, n in enumerate(encoder) for j in range(n)]
    blocks += [f"middle_blks.{j}" for j in range(middle)] + [
        f"decoders.{i}.{j}" for i, n in enumerate(decoder) for j in range(n)
    ]
    names = {f"{block}.{leaf}" for block in blocks for leaf in [*leaves, "beta", "gamma"]}
    names |= {f"{conv}.{part}" for conv in ("intro", "ending") for part in ("weight", "bias")}
    names |= {f"downs.{i}.{part}" for i in range(len(encoder)) for part in ("weight", "bias")}
    return names | {f"ups.{i}.0.weight" for i in range(len(decoder))}


def test_predictor_has_exactly_nafnets_names():
    predictor = Predictor(8, (1, 2), 3, (2, 1))
    assert set(predictor.state_dict()) == nafnet_names((1, 2), 3, (2, 1))


def test_a_nafnet_state_dict_loads_and_runs():
    predictor = Predictor(8, (1, 2), 1, (1, 1))
    state = {name: torch.randn(value.shape) * 0.1 for name, value in predictor.state_dict().items()}
    predictor.load_state_dict(state, strict=True)
    assert predictor(torch.randn(1, 3, 16, 24)).shape == (1, 3, 16, 24)


def test_fresh_networks_change_nothing():
    """Training starts from y_eps = y_d, and from the preconditioned estimate of a Gaussian prior."""
    model = DTPM(Config.of(preset="tiny", semantic_code="none").model, 2)
    y_d, gamma = torch.rand(2, 3, 16, 24) * 2 - 1, torch.tensor([0.3, 0.9])
    assert torch.equal(model.predict(y_d), y_d)
    assert not model.denoise(y_d, y_d, gamma, None).any()


def test_what_conditions_stage_2_is_a_setting():
    y_d, y_eps = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    for condition, code_source in (("degraded", "predicted"), ("predicted", "degraded")):
        settings = {"condition": condition, "code_source": code_source, "semantic_code": "compact"}
        model = DTPM(Config.of(preset="tiny", **settings).model, 2).eval()
        load_semantic_weights(model)
        pictures = {"degraded": y_d, "predicted": y_eps}
        assert model.condition_of(y_d, y_eps) is pictures[condition]
        assert torch.equal(model.code_of(y_d, y_eps), model.code(pictures[code_source]))
    assert not torch.equal(model.code(y_d), model.code(y_eps))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiples of 8, got 12x16"):
        Predictor(8, (1, 1, 1), 1, (1, 1, 1))(torch.zeros(1, 3, 12, 16))


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 0.5), ("light", 9.6), ("base", 76.7)])
def test_presets_have_their_documented_size(preset, millions):
    with torch.device("meta"):
        model = DTPM(Config.of(preset=preset).model, 2)
    assert sum(p.numel() for p in model.denoiser.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


def test_every_block_is_followed_by_an_adapter():
    model = DTPM(Config.of(preset="tiny", semantic_code="none").model, 2)
    assert len(model.adapters) == len(model.denoiser.positions()) == 7
    for positions, count in (("encoder", 4), ("decoder", 3), ("none", 0)):
        config = Config.of(preset="tiny", semantic_code="none", adapter_positions=positions)
        assert len(DTPM(config.model, 2).adapters) == count


def test_fresh_adapters_leave_the_denoiser_as_it_was():
    torch.manual_seed(0)
    model = DTPM(Config.of(preset="tiny", semantic_code="none").model, 2)
    torch.nn.init.normal_(model.denoiser.ending.weight)
    x, y, gamma = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24), torch.tensor([0.3, 0.9])
    assert torch.equal(model.denoise(x, y, gamma, None, y_eps=y), model.denoise(x, y, gamma, None))


def test_guidance_and_code_reach_the_output():
    torch.manual_seed(0)
    model = DTPM(Config.of(preset="tiny").model, 2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, gamma, code = torch.randn(1, 3, 16, 16), torch.tensor([0.5]), torch.randn(1, 576)
    base = model.denoise(x, x, gamma, code, x)
    assert not torch.equal(base, model.denoise(x, x, gamma, code, -x))
    assert not torch.equal(base, model.denoise(x, x, gamma, -code, x))
    assert not torch.equal(base, model.denoise(x, x, gamma * 0.5, code, x))
    with pytest.raises(ValueError, match="semantic code"):
        model.denoise(x, x, gamma, None, x)
