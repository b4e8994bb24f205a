from __future__ import annotations

import pytest
from pydantic import ValidationError

from mechmem.data.minimal_pair import MinimalPair


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"flip": "carry_1", "hold": ("carry_2", "carry_1")},
            "'carry_1' cannot both flip and hold",
        ),
        ({"flip": "carry_1", "hold": ("out_0", "out_0")}, "'out_0' is listed twice"),
        ({"flip": ""}, "at least 1 character"),
    ],
)
def test_variables_that_contradict_or_repeat_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        MinimalPair(**fields)


def test_the_block_of_a_pair_is_read_back():
    pair = MinimalPair(flip="carry_1", hold=("carry_2", "out_0"), seed=3)
    assert MinimalPair.model_validate(pair.block()) == pair
