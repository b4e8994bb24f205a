"""The device that a model runs on."""

from __future__ import annotations

from typing import Literal

import torch

from mechmem.spec.errors import InputError

Device = Literal["auto", "cpu", "cuda", "mps"]


def resolve_device(choice: str) -> torch.device:
    """The device of a choice: `auto` is CUDA if there is one, else MPS, else the CPU.

    Raises InputError for a device that is unknown, or that this machine or this torch lacks.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    usable = [name for name, is_there in available.items() if is_there]
    if choice == "auto":
        return torch.device(usable[0])
    if choice not in usable:
        problem = "is not available on this machine" if choice in available else "is unknown"
        raise InputError(f"device {choice!r} {problem}; choose from: auto, {', '.join(usable)}")
    return torch.device(choice)
