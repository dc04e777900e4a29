"""What the system says about its processor."""

import os
import platform
from pathlib import Path

import pytest

from dtpm_fast.cores import cpu_name, usable_cores


def test_some_of_the_machines_cores_are_usable() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_the_processors_name_is_the_systems_or_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def says(text: str) -> None:
        monkeypatch.setattr(Path, "read_text", lambda path, encoding: text)

    says("processor\t: 0\nmodel name\t: A CPU: 2 GHz \nprocessor\t: 1\nmodel name\t: Another\n")
    assert cpu_name() == "A CPU: 2 GHz"
    says("processor\t: 0\n")  # as on ARM
    assert cpu_name() == platform.machine()

    def absent(path: Path, encoding: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    assert cpu_name() == platform.machine()
