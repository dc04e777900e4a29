"""The semantic encoders: shipped, downloaded by hash, and what happens offline."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, mobilenet_v3_small, resnet18
from torchvision.transforms.functional import resize

from dtpm_fast.config import Config
from dtpm_fast.errors import UserError
from dtpm_fast.model.dtpm import DTPM, load_semantic_weights
from dtpm_fast.model.semantic import (
    RESNET18,
    compact_encoder,
    load_compact,
    load_resnet18,
    resnet18_encoder,
    resnet18_trunk_state,
)


def test_the_shipped_compact_encoder_loads_and_stays_frozen():
    model = DTPM(Config.of(preset="tiny").model, 1)
    load_semantic_weights(model)
    model.train()
    assert not model.semantic.training and not any(p.requires_grad for p in model.semantic.parameters())
    assert sum(p.numel() for p in model.semantic.parameters()) < 1_000_000
    photo = torch.rand(2, 3, 60, 90) * 2 - 1
    code = model.code(photo)
    assert code.shape == (2, 576) and torch.isfinite(code).all() and not torch.allclose(code[0], code[1])
    assert torch.equal(code, model.code(photo))


def test_compact_is_torchvisions_trunk():
    theirs, ours = mobilenet_v3_small(weights=None).features.eval(), compact_encoder().trunk
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 61, 97)
    assert torch.allclose(ours(image), theirs(image), rtol=1e-5, atol=1e-6)
    assert {f"trunk.{key}" for key in ours.state_dict()} == set(load_compact())


@pytest.mark.parametrize("make", [compact_encoder, resnet18_encoder])
def test_folded_gives_the_same_codes_without_batch_norms(make):
    encoder = make().double()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for statistic, low, high in ((module.running_mean, -1, 1), (module.running_var, 0.5, 2)):
                statistic.uniform_(low, high)
            module.weight.uniform_(0.5, 2), module.bias.uniform_(-1, 1)
    folded, image = encoder.folded(), torch.rand(2, 3, 61, 97, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(folded(image), encoder(image), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    assert not any(p.requires_grad for p in folded.parameters())


def test_restoring_loads_neither_torchvision_nor_the_compiler():
    """They are half of the time from a process's start to its first picture."""
    program = (
        "import sys, torch\nfrom dtpm_fast import Restorer\n"
        "Restorer.from_pretrained('light', 'derain', steps=1, device='cpu')(torch.rand(1, 3, 16, 16))\n"
        "assert not {'torchvision', 'torch._dynamo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_resnet18_pooled_feature_is_torchvisions():
    torch.manual_seed(0)
    resnet, encoder = resnet18(weights=None).eval(), resnet18_encoder()
    encoder.load_state_dict(resnet18_trunk_state(resnet.state_dict()), strict=True)
    image = torch.rand(1, 3, 400, 300) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    resnet.fc = torch.nn.Identity()
    small = resize(image, [224, 224], antialias=True)
    torch.testing.assert_close(encoder(image), resnet((small * 0.5 + 0.5 - mean) / std).detach(), rtol=1e-4, atol=1e-5)


def test_the_address_is_torchvisions():
    assert ResNet18_Weights.IMAGENET1K_V1.url == RESNET18.url


def test_another_file_is_refused_by_its_hash(tmp_path):
    file = tmp_path / "resnet18.pth"
    torch.save(resnet18(weights=None).state_dict(), file)
    with pytest.raises(
        UserError, match=r"resnet18\.pth: is another file .*needs resnet18-f37072fd\.pth .*semantic_code=compact"
    ):
        load_resnet18(file)
    with pytest.raises(
        UserError, match=r"absent\.pth: cannot be read .*needs resnet18-f37072fd\.pth .*semantic_code=compact"
    ):
        load_resnet18(tmp_path / "absent.pth")


def test_offline_the_error_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.delenv("DTPM_RESNET18", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        UserError, match=r"resnet18-f37072fd\.pth .*no network.*set DTPM_RESNET18 .*semantic_code=compact"
    ):
        load_resnet18()
