"""A sample of the cases of stored files and of kills; `python tests/faults` runs all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import kills
import stored
from campaign import outcomes, sample


@pytest.mark.parametrize(("module", "n"), [(stored, 12), (kills, 3)], ids=["stored", "kills"])
def test_a_sample_of_the_campaign(module, n, tmp_path):
    for case, outcome in outcomes(sample(list(module.cases(0)), n), tmp_path):
        assert outcome.is_good, (case.name, outcome)


def test_there_are_enough_cases():
    assert len(list(stored.cases(0))) >= 300
    assert len(list(kills.cases(0))) == 100
