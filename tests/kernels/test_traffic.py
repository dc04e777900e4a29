"""What the block moves and keeps, by count: no timing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.kernels.block import _block_train
from dtpm_fast.kernels.document import write_table
from dtpm_fast.kernels.traffic import BACKWARD, FORWARD, TRAINING_FORWARD, block_inputs, eager, markdown, total


def test_the_fused_block_moves_a_fraction() -> None:
    counted = eager(64, 64, 2)
    assert total(FORWARD) == 9
    assert total(FORWARD) < counted.forward / 4
    assert total(TRAINING_FORWARD) + total(BACKWARD) < (counted.forward + counted.backward) / 3


def test_training_keeps_two_maps() -> None:
    inputs = [tensor.requires_grad_() for tensor in block_inputs(2, 8, 16, 16, torch.float32, "cpu")]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _block_train(inputs[0], inputs[1:5], inputs[5:], 1e-6)
    maps = [tensor for tensor in kept if tensor.shape == inputs[0].shape]
    assert len(maps) == 2  # x, which the layer before made anyway, and y
    small = sum(tensor.numel() for tensor in kept) - sum(tensor.numel() for tensor in maps)
    assert small <= sum(tensor.numel() for tensor in inputs[1:]) + 2 * 8
    assert len(maps) <= 0.4 * eager(8, 16, 2).kept


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- traffic: begin -->\nold\n<!-- traffic: end -->\nafter\n")
    write_table(file, "traffic", markdown(16, 8, 1))
    text = file.read_text()
    assert text.startswith("before\n<!-- traffic: begin -->\nC = 16")
    assert text.endswith("<!-- traffic: end -->\nafter\n")
    assert "old" not in text
    with pytest.raises(UserError, match=r"page\.md: lacks the lines <!-- other: begin -->"):
        write_table(file, "other", "")
    with pytest.raises(UserError, match=r"absent\.md: cannot be read"):
        write_table(tmp_path / "absent.md", "traffic", "")
