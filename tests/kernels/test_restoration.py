"""A whole restoration through the kernels: how the runtime hands them blocks, adapters, conditions and samples."""

from collections.abc import Callable

import pytest
import torch

from dtpm_fast.kernels.dispatch import WIDE, Table, table, using_table
from dtpm_fast.runtime.plan import Plan
from dtpm_fast.runtime.sampler import make_steps

TILE = {"BLOCK_P": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
MANY: Table = {name: [{"channels": 4096, "bits": 16, "options": TILE}] for name in WIDE} | {
    name: [] for name in set(WIDE.values())
}


@pytest.mark.parametrize("entries", [{}, MANY], ids=["recorded", "as of many channels"])
@torch.inference_mode()
def test_triton_restores_as_pytorch_does(device: str, random_model: Callable[..., tuple], entries: Table) -> None:
    model, config = random_model()
    steps = make_steps(config, 2)
    y_d, noise = torch.rand(2, 3, 8, 16) * 2 - 1, torch.randn(1, 3, 8, 16)
    exact = Plan(model, steps).restore(y_d, noise.expand(steps.noise_fields, -1, -1, -1))
    with using_table(table() | entries):
        plan = Plan(model.to(device), steps, torch.float16, "kernels")
        restored = plan.restore(y_d.to(device), noise.to(device).expand(steps.noise_fields, -1, -1, -1))
    assert 10 * torch.log10(4 / (restored.cpu().float() - exact).square().mean()) >= 70
