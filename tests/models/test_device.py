from __future__ import annotations

import pytest
import torch

from mechmem.models.device import resolve_device
from mechmem.spec.errors import InputError


@pytest.fixture
def machine(monkeypatch):
    """A function that pretends that this machine has, or lacks, CUDA and MPS."""

    def pretend(cuda: bool, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_is_the_fastest_device_of_the_machine(cuda, mps, expected, machine):
    machine(cuda, mps)
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("choice", ["cpu", "cuda", "mps"])
def test_a_device_of_the_machine_is_taken_as_asked(choice, machine):
    machine(cuda=True, mps=True)
    assert resolve_device(choice) == torch.device(choice)


@pytest.mark.parametrize("choice", ["cuda", "mps"])
def test_a_device_that_the_machine_lacks_is_refused_in_one_line(choice, machine):
    machine(cuda=False, mps=False)
    with pytest.raises(InputError) as error:
        resolve_device(choice)
    assert str(error.value) == (
        f"device {choice!r} is not available on this machine; choose from: auto, cpu"
    )


def test_an_unknown_device_is_refused_with_the_known_ones(machine):
    machine(cuda=True, mps=False)
    with pytest.raises(InputError, match="'gpu' is unknown; choose from: auto, cuda, cpu"):
        resolve_device("gpu")
