"""What `auto` takes, and that nothing is taken that does not agree with the plain form. The checks run on the CPU here,
where a block switched to the kernels runs their oracle."""

import pytest
import torch
from torch import nn

from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.training import acceleration
from dtpm_fast.training.acceleration import choose_compile, choose_kernels
from dtpm_fast.training.precision import Precision

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return DTPM(Config.of(preset="tiny", semantic_code="none").model, 1)


def no_batch():
    raise AssertionError("no batch is needed to decide this")


def test_on_the_cpu_auto_is_the_plain_form(model):
    assert Config.of().train.kernels == Config.of().train.compile == "auto"
    precision = Precision("auto", CPU)
    on, why = choose_kernels("auto", model, precision)
    assert not on and "for CUDA" in why
    objective, why = choose_compile("auto", model, no_batch, precision)
    assert objective is model and "off" in why


def test_what_was_asked_for_is_taken_unchecked(model):
    precision = Precision("auto", CPU)
    assert choose_kernels("fused", model, precision) == (True, "fused: as asked")
    assert choose_kernels("reference", model, precision) == (False, "reference: as asked")
    assert choose_compile(False, model, no_batch, precision)[0] is model
    assert choose_compile(True, model, no_batch, precision)[0] is not model
    with pytest.raises(UserError, match="choose one of true, false, auto"):
        Config.load(None, ["compile=maybe"])
    assert Config.load(None, ["compile=true"]).train.compile is True


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_kernels_that_agree_are_taken(model, name):
    on, why = acceleration.checked_kernels(model, Precision(name, CPU))
    assert on, why
    assert "agree" in why


def test_kernels_that_fail_or_differ_are_not_taken(model, monkeypatch):
    right = acceleration.DenoisingBlock.body

    def body(wrong):
        return lambda self, x, *rest: wrong(right(self, x, *rest), x) if self.fused else right(self, x, *rest)

    def fails(*_):
        raise RuntimeError("no kernel image is available\nfor this device")

    for wrong, message in (
        (lambda z, x: z * 1.001, "error is"),
        (lambda z, x: z + 0 * x.mean() / 0, "error is nan"),
        (lambda z, x: z.detach() + (z - z.detach()) * 1.001, "error is"),  # the gradient alone is wrong
        (fails, "RuntimeError: no kernel image is available)"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(acceleration.DenoisingBlock, "body", body(wrong))
            on, why = acceleration.checked_kernels(model, Precision("float32", CPU))
        assert not on and message in why, why
        assert "\n" not in why


def test_frozen_blocks_are_tried_as_such(model, monkeypatch):
    """Stage II's denoiser: kernels that are wrong for frozen weights alone are found."""
    right = acceleration.DenoisingBlock.body

    def body(self, x, *rest):
        z = right(self, x, *rest)
        return z + (z - z.detach()) * 0.1 if self.fused and not self.conv1.weight.requires_grad else z

    monkeypatch.setattr(acceleration.DenoisingBlock, "body", body)
    precision = Precision("float32", CPU)
    assert acceleration.checked_kernels(model, precision)[0]
    model.denoiser.requires_grad_(False)
    on, why = acceleration.checked_kernels(model, precision)
    assert not on and "16 channels, frozen the fused kernels' error" in why


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (self.weight * x).sum()


def test_a_compiled_loss_is_held_against_the_plain_one(monkeypatch):
    loss, batch, precision = Loss(), [torch.ones(3)], Precision("float32", CPU)

    class Compiled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            if self.factor is None:
                raise RuntimeError("no compiler\nwas found")
            return loss(x) * self.factor

    for factor, message in ((1.001, "on: "), (1.1, "off: the compiled loss is 3.3"), (None, "no compiler)")):
        monkeypatch.setattr(torch, "compile", lambda _, factor=factor: Compiled(factor))
        found, why = acceleration.checked_compile(loss, batch, precision)
        assert message in why and "\n" not in why
        assert (found is loss) == (factor != 1.001)
        assert loss.weight.grad is None  # nothing is left of the trial
