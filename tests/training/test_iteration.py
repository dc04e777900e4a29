"""What one iteration does to the weights: noise, learning rate, clipped gradient, Adam, averages."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from dtpm_fast.config import Config
from dtpm_fast.diffusion import stage1_loss
from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM
from dtpm_fast.training.batches import Batch, Noisy
from dtpm_fast.training.checkpoints import newest_state
from dtpm_fast.training.freeze import freeze
from dtpm_fast.training.loop import Run, Trainer, learning_rate, train


def random_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x_g, y_s, eps = (torch.randn(2, 3, 16, 16, generator=generator).double() for _ in range(3))
    return [x_g, y_s, eps, torch.rand(2, generator=generator).double()]


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_half_cosine() -> None:
    config = Config.of(steps=10, warmup=4, lr=1.0, lr_min=0.1)
    expected = [0.25, 0.5, 0.75, 1.0] + [0.1 + 0.45 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert [learning_rate(step, config) for step in range(10)] == pytest.approx(expected)
    assert learning_rate(10, config) == pytest.approx(0.1)  # where the schedule would go on
    assert learning_rate(0, Config.of(lr=2e-4)) == 2e-4  # the paper has no warm-up


@pytest.mark.parametrize(("clip", "ema"), [(1e-3, 0.2), (0.0, 0.9999)])
def test_iterations_written_out(random_model: Callable[..., tuple], tmp_path: Path, clip: float, ema: float) -> None:
    settings = {"steps": 5, "warmup": 2, "lr": 1e-2, "lr_min": 1e-3, "clip_grad": clip, "ema": ema}
    model, config = random_model(0, 1, **settings)
    freeze(model.double(), "adapters")
    plain = copy.deepcopy(model)
    trainer = Trainer(Run(model, config, "", [], [], tmp_path, torch.device("cpu"), {}))

    parameters = list(plain.denoiser.parameters())
    adam = torch.optim.Adam(parameters, betas=(0.9, 0.999))
    averages = [p.detach().clone() for p in parameters]
    norms: list[Tensor] = []
    for step in range(4):
        batch = random_batch(step)
        loss, norm = trainer.iterate([batch])
        norms.append(norm)

        adam.zero_grad()
        wanted = stage1_loss(plain, config.diffusion, *batch)
        wanted.backward()
        length = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
        assert (loss.item(), norm.item()) == pytest.approx((wanted.item(), length.item()))
        for p in parameters:
            if clip and p.grad is not None:
                p.grad *= min(1.0, clip / length.item())
        adam.param_groups[0]["lr"] = learning_rate(step, config)
        adam.step()
        decay = min(ema, (2 + step) / (11 + step))
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, parameters, strict=True)]
    assert min(norms) > 10 * clip  # every gradient was clipped, or none
    # Clipping adds 1e-6 to the norm, and Adam its 1e-8 to what a clipped gradient leaves.
    for ours, theirs in zip(model.denoiser.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(trainer.ema.average.values(), averages, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "with a loss scale"])
def test_gradients_that_are_no_numbers_change_no_weight(
    random_model: Callable[..., tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    """The loss is one all the same: they stop the run, or cost a float16 run one update."""
    model, config = random_model(0, 1)
    freeze(model.double(), "adapters")
    trainer = Trainer(Run(model, config, "", [], [], tmp_path, torch.device("cpu"), {}))
    before = copy.deepcopy(model.state_dict())
    model.denoiser.intro.weight.register_hook(lambda gradient: gradient * math.nan)
    monkeypatch.setattr(trainer.precision, "overflow_is_normal", lambda: scaled)
    if scaled:
        loss, norm = trainer.iterate([random_batch(0)])
        assert torch.isfinite(loss) and torch.isnan(norm)
    else:
        with pytest.raises(UserError, match="the gradient's norm nan; the batch is in"):
            trainer.iterate([random_batch(0)])
        assert list(tmp_path.glob("bad-batch-00000000.safetensors"))
    assert trainer.step == scaled
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 16, 16, generator=generator), torch.rand(3, 16, 16, generator=generator)


def test_the_noise_of_a_sample_follows_from_the_seed_and_its_index() -> None:
    def noise(seed: int, index: int) -> bytes:
        _, _, eps, gamma = Noisy(Pairs(), Config.of(seed=seed))[index]
        return eps.numpy().tobytes() + gamma.numpy().tobytes()

    assert noise(1, 7) == noise(1, 7)
    assert len({noise(seed, index) for seed in (1, 2) for index in (7, 8)}) == 4


def test_what_is_validated_and_written_are_the_averages(
    random_model: Callable[..., tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 3, "batch_size": 1, "crop": 16, "workers": 0, "lr": 1e-2, "validate_every": 1}
    model, config = random_model(0, 1, **settings)
    freeze(model, "adapters")
    seen: list[dict[str, Tensor]] = []

    def validate(model: DTPM, *_: object) -> tuple[dict[str, float], Tensor]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"psnr_result": float(len(seen))}, torch.zeros(3, 4, 4)

    monkeypatch.setattr("dtpm_fast.training.loop.validate", validate)
    data = Pairs()
    written = load_file(train(Run(model, config, "", data, [data[0]], tmp_path, torch.device("cpu"), {})))
    best = load_file(tmp_path / "weights-best.safetensors")
    state, _ = newest_state(tmp_path)
    assert state is not None and len(seen) == 3
    for name, average in state["ema"].items():
        assert torch.equal(written[name], average) and torch.equal(best[name], average), name
        assert torch.equal(seen[-1][name], average), name
    assert not torch.equal(state["model"]["denoiser.intro.weight"], state["ema"]["denoiser.intro.weight"])
