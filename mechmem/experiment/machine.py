"""The machine that analyses run on: the device, and everything of it that can change a number."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from mechmem.experiment.spec import Experiment
from mechmem.models.device import resolve_device

LIBRARIES = ("torch", "transformer-lens", "numpy", "scipy", "scikit-learn")
"""Libraries whose versions may change the numbers of an analysis."""


def device_of(experiment: Experiment) -> str:
    """The device of the analyses. Raises InputError for one that this machine does not have."""
    return str(resolve_device(experiment.device))


def session_options(experiment: Experiment) -> dict[str, Any]:
    """The arguments of a Session that an experiment sets."""
    return {
        "device": device_of(experiment),
        "memory": experiment.memory,
        "backend": experiment.backend,
    }


def conditions(experiment: Experiment) -> dict[str, Any]:
    """What of the machine and the settings can change a number of an analysis in its last digits:
    part of the key under which its rows are stored."""
    return {
        "python": platform.python_version_tuple()[:2],
        "libraries": {name: _version(name) for name in LIBRARIES},
        "backend": experiment.backend,
        "device": device_of(experiment),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "memory": experiment.memory,
    }


@cache
def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
