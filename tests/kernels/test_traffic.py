"""What the block moves and keeps, by count: no timing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dtpm_fast.kernels.traffic as module
from dtpm_fast.errors import UserError
from dtpm_fast.kernels.block import _block_train
from dtpm_fast.kernels.document import write_table
from dtpm_fast.kernels.traffic import (
    BACKWARD,
    FORWARD,
    STEPS,
    TRAINING_FORWARD,
    block_inputs,
    eager,
    launch,
    markdown,
    read_counters,
    total,
)


def test_the_fused_block_moves_a_fraction() -> None:
    counted = eager(64, 64, 2)
    assert total(FORWARD) == 9
    assert total(FORWARD) < counted.forward / 4
    # z read and its rank of a quarter written, the condition added, back to z's channels, and z added
    assert counted.adapter == pytest.approx(1.25 + 0.75 + 1.25 + 3, rel=0.01)
    assert total(TRAINING_FORWARD) + total(BACKWARD) < (counted.forward + counted.backward) / 4


def test_training_keeps_three_maps() -> None:
    inputs = [tensor.requires_grad_() for tensor in block_inputs(2, 8, 16, 16, torch.float32, "cpu")]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _block_train(inputs[0], inputs[1:5], inputs[5:], 1e-6)
    maps = [tensor for tensor in kept if tensor.shape == inputs[0].shape]
    assert len(maps) == 3  # x, which the layer before made anyway, y and g
    small = sum(tensor.numel() for tensor in kept) - sum(tensor.numel() for tensor in maps)
    assert small <= sum(tensor.numel() for tensor in inputs[1:]) + 2 * 8
    assert len(maps) <= 0.4 * eager(8, 16, 2).kept


def test_triton_launches_are_the_steps_in_their_order(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which the counters' reader tells a kernel's launches apart; none of them runs here."""
    from dtpm_fast.kernels.adaln_triton import adaln_forward_kernel

    launched: list[str] = []

    def record(kernel: Any, *_: Any, **__: Any) -> None:
        launched.append(kernel.fn.__name__.removesuffix("_kernel"))

    def inputs(*arguments: Any) -> list[Tensor]:
        return block_inputs(*arguments[:4], torch.float16, device)

    monkeypatch.setattr(type(adaln_forward_kernel), "run", record)
    monkeypatch.setattr(module, "block_inputs", inputs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    launch(16, 3, 2)
    steps = [name for kernels in STEPS.values() for name in kernels]
    assert [name for name in launched if name in steps] == 2 * steps


def test_a_gpus_counters_stand_beside_the_prediction(tmp_path: Path) -> None:
    file = tmp_path / "ncu.csv"
    head = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = ["==PROF== Connected to process 7", head]
    for place, (name, read, written) in enumerate(
        [
            ("ffn_backward_kernel", 9, 9),
            ("attention_ffn_forward_kernel", 150e6, 50e6),  # in inference,
            ("attention_ffn_forward_kernel", 140e6, 130e6),  # and in training, where it writes y
            ("ffn_backward_kernel", "120,000,000", 70e6),
            ("attention_ffn_forward_kernel", 152e6, 50e6),
            ("attention_ffn_forward_kernel", 140e6, 132e6),
            ("ffn_backward_kernel", 1e12, 0),
            ("another_kernel", 1, 1),
        ]
    ):
        for metric, value in (("read", read), ("write", written)):
            lines.append(f'"{place}","7","{name}","dram__bytes_{metric}.sum","byte","{value}"')
    file.write_text("\n".join(lines))
    assert read_counters(file) == {
        ("backward", "ffn_backward"): 190e6,
        ("inference", "attention_ffn_forward"): 201e6,
        ("training", "attention_ffn_forward"): 271e6,
    }
    table = markdown(64, 256, 8, read_counters(file))
    assert "| backward | ffn_backward | 2 | 1 | 201 | 190 |" in table
    assert "| inference | attention_ffn_forward | 2 | 1 | 201 | 201 |" in table
    assert "| training | attention_ffn_forward | 2 | 2 | 268 | 271 |" in table
    assert "| backward | gate_backward | 3 | 2 | 336 | not run |" in table
    file.write_text("\n".join(lines[:6]))
    with pytest.raises(UserError, match=r"ncu\.csv: holds 1 launches of attention_ffn_forward, and a pass has 2"):
        read_counters(file)
    file.write_text(head)
    with pytest.raises(UserError, match=r"ncu\.csv: holds no dram__bytes"):
        read_counters(file)


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
