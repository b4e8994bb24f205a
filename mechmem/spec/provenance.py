"""The provenance of a result: versions, commit, hardware, time."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("mechmem", "torch", "transformer-lens", "numpy", "pandas", "plotly", "pydantic")


def provenance() -> dict[str, Any]:
    """Time, commit, versions and hardware, which a reader needs to reproduce a result."""
    import torch

    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def commit() -> str | None:
    """The git commit of this package, followed by `+changes` if files were changed since; None if
    it is not in a git checkout."""
    here = Path(__file__).parents[1]
    try:
        found = [
            subprocess.run(
                ["git", "-C", here, *arguments],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout
            for arguments in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--", "."),
            )
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0].strip() + ("+changes" if found[1].strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
