"""Patch grids keep to the budget, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "memory.py"


MIB = 2**20
FORMS = {
    "30,000 examples": ["--positions", "=", "--draws", "0", "--quick"],
    "a small budget, decoded, with a control": [
        *("--positions", "=", "s4", "--draws", "1"),
        *("--examples", "6000", "--memory", str(400 * MIB)),
    ],
}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_a_grid_keeps_to_the_budget(options):
    command = [sys.executable, str(SCRIPT), *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert 0 < found["growth_bytes"] <= found["budget_bytes"]
