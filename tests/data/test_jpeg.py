import numpy as np
import pytest

from dtpm_fast.data.jpeg import through_any_jpeg


def test_a_jpegs_blocks_lie_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """JPEG's worst quality makes flat blocks of a slope, and their seams are at every place in turn."""
    monkeypatch.setattr("dtpm_fast.data.jpeg.QUALITIES", (1, 1))
    smooth = np.add.outer(np.arange(48), np.arange(48)).astype(np.uint8)[..., None].repeat(3, axis=2)
    seams = set()
    for seed in range(60):
        found = through_any_jpeg(smooth, np.random.default_rng(seed))
        assert found.shape == smooth.shape and found.dtype == np.uint8
        steps = np.abs(np.diff(found[..., 1].astype(int), axis=1)).sum(axis=0)  # blocks are flat: steps at seams only
        seams.add(int(np.argmax([steps[phase::8].sum() for phase in range(8)])))
    assert seams == set(range(8))
