import pytest
import torch
from torch import nn


@pytest.fixture
def randomized():
    """Fresh blocks and adapters are the identity: this gives every parameter a value."""

    def randomize(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return module

    return randomize
