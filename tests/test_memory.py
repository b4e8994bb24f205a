"""A patch grid over 30,000 examples keeps to the default budget, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_thirty_thousand_examples_keep_to_the_budget():
    command = [sys.executable, str(SCRIPT), "--positions", "=", "--draws", "0", "--quick"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert 0 < found["growth_bytes"] <= found["budget_bytes"]
