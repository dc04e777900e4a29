"""Adam and Muon: which parameter goes to which, what an orthogonal update is, and runs that stop and go on."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dtpm_fast.train import main
from dtpm_fast.training.optimizers import BETAS, Muon, make_optimizers, mixes_channels, orthogonal


def test_every_parameter_has_one_optimiser(random_model):
    model, _ = random_model(0, 2)
    parameters = dict(model.named_parameters())
    muon, adam = make_optimizers("muon", parameters.values(), 1e-3)
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    by_adam = {id(p) for group in adam.param_groups for p in group["params"]}
    assert by_muon | by_adam == {id(p) for p in parameters.values()} and not by_muon & by_adam
    names = {name for name, p in parameters.items() if id(p) in by_muon}
    assert {"predictor.encoders.0.0.conv1.weight", "predictor.downs.0.weight", "predictor.ups.0.0.weight"} <= names
    assert not any(name.endswith((".bias", "beta", "gamma", "conv2.weight")) for name in names)
    reads_or_writes_a_picture = {"predictor.intro.weight", "predictor.ending.weight", "denoiser.intro.weight"}
    assert reads_or_writes_a_picture <= set(parameters) and not reads_or_writes_a_picture & names


def test_adam_alone_is_the_papers():
    weight = nn.Parameter(torch.randn(8, 8, 1, 1))
    (adam,) = make_optimizers("adam", [weight], 2e-4)
    assert type(adam) is torch.optim.Adam
    assert adam.defaults["lr"] == 2e-4 and adam.defaults["betas"] == BETAS == (0.9, 0.999)


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (5, 130)])
def test_an_orthogonal_matrix_keeps_the_directions_and_evens_the_singular_values(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    strengths = torch.linspace(1, 0.05, len(vh), dtype=torch.float64)
    found = orthogonal((u * strengths @ vh).float()).double()
    assert found.shape == shape
    values = (u.T @ found @ vh.T).diagonal()
    assert values.min() > 0.6 and values.max() < 1.25  # Jordan's quintic does not converge to 1
    assert torch.allclose(u * values @ vh, found, atol=1e-3)
    assert orthogonal(torch.zeros(shape)).equal(torch.zeros(shape))


def test_muon_is_torchs_on_a_convolutions_rows():
    """PyTorch's own takes matrices only and multiplies in bfloat16: equal to that precision."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 8, 2, 2, generator=generator)
    ours = nn.Parameter(weight.clone(memory_format=torch.channels_last))
    theirs = nn.Parameter(weight.flatten(1).clone())
    muon = Muon([ours], lr=0.05)
    reference = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(weight.shape, generator=generator)
        ours.grad, theirs.grad = gradient, gradient.flatten(1).clone()
        muon.step()
        reference.step()
    moved, wanted = ours.detach().flatten(1) - weight.flatten(1), theirs.detach() - weight.flatten(1)
    assert (moved - wanted).norm() < 0.02 * wanted.norm()
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_mixing_is_told_by_shape():
    shapes = {(64, 32, 1, 1): True, (64, 32, 2, 2): True, (64, 32): True, (64, 1, 3, 3): False, (32, 3, 3, 3): False,
              (3, 32, 3, 3): False, (1, 32, 1, 1): False, (64,): False}  # fmt: skip
    assert {shape: mixes_channels(torch.zeros(shape)) for shape in shapes} == shapes


def arguments(photos, output, settings, *more):
    stage = ["--stage", "2", "--task", "deblur", "--data", str(photos), "--output", str(output), "--device", "cpu"]
    return [*stage, *more, "--set", *settings, "tune=all", "validation_images=0"]


def test_a_stopped_run_with_muon_goes_on_to_the_same_bits(photos, tmp_path, tiny, capsys):
    settings = [*tiny, "optimizer=muon", "predictor_loss=1", "predictor_norm=psnr", "checkpoint_every=2"]
    assert main(arguments(photos, tmp_path / "whole", [*settings, "steps=4"])) == 0
    (tmp_path / "whole" / "checkpoints" / "step-00000004.pt").unlink()
    wanted = load_file(tmp_path / "whole" / "weights.safetensors")
    assert main(arguments(photos, tmp_path / "whole", [*settings, "steps=4"], "--resume")) == 0
    found = load_file(tmp_path / "whole" / "weights.safetensors")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    other = [*settings, "steps=6", "optimizer=adam"]
    assert main(arguments(photos, tmp_path / "whole", other, "--resume")) == 1
    assert "optimizer" in capsys.readouterr().err
