"""What the events hold is the GPU's time alone, without a wait for the host: in which order a measurement goes."""

from types import SimpleNamespace

import pytest
import torch

from dtpm_fast.kernels.timer import Timer


def test_the_gpu_is_busy_while_the_host_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 3.0

    timer = Timer("cpu")
    timer.device, timer.cache = "cuda", SimpleNamespace(sum=lambda: order.append("read"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    milliseconds, launched = timer.time(lambda: order.append("step"))
    assert milliseconds == 3.0 and launched >= 0
    assert order == ["read", "sleep", "event", "step", "event", "wait"]
