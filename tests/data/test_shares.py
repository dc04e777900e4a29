from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dtpm_fast.data.crops import SyntheticCrops
from dtpm_fast.data.shares import SomeClean, SomeJpeg, SomeNoisy
from dtpm_fast.errors import UserError


def test_a_share_of_clean_samples() -> None:
    class Pairs(Dataset[tuple[Tensor, Tensor]]):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return torch.full((1,), -float(index)), torch.full((1,), float(index))

    some = SomeClean(Pairs(), 0.25, seed=5)
    drawn = [some[index] for index in range(1, 401)]
    assert all(float(clean) == index for index, (_, clean) in enumerate(drawn, start=1))
    share = sum(float(degraded) > 0 for degraded, _ in drawn) / 400
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    assert all(torch.equal(some[index][0], drawn[index - 1][0]) for index in (7, 300))  # the index alone decides
    with pytest.raises(UserError, match="between 0 and 1"):
        SomeClean(Pairs(), 1.5)


@pytest.mark.parametrize("kind", [SomeNoisy, SomeJpeg])
def test_a_share_of_samples_changed(photos: Path, kind: type[SomeNoisy | SomeJpeg]) -> None:
    plain = SyntheticCrops(photos, "desnow", 32, seed=5)
    some = kind(plain, 0.25, seed=5)
    drawn = [some[index] for index in range(400)]
    changed = [index for index, (degraded, _) in enumerate(drawn) if not torch.equal(degraded, plain[index][0])]
    assert abs(len(changed) / 400 - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    for index in changed[:20]:
        (degraded, clean), (before, target) = drawn[index], plain[index]
        assert torch.equal(clean, target)
        assert degraded.shape == before.shape and degraded.abs().max() <= 1
        levels = (degraded + 1) * 127.5
        assert (levels - levels.round()).abs().max() < 1e-4  # a picture of 8 bits
        assert (degraded.mean() - before.mean()).abs() < 0.05  # the photos are noise, of which both keep the means
        assert torch.equal(some[index][0], degraded)  # the index alone decides
    with pytest.raises(UserError, match="between 0 and 1"):
        kind(plain, 1.5)
