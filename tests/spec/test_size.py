from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from mechmem.spec.size import Size

SIZE = TypeAdapter(Size)


@pytest.mark.parametrize(
    ("written", "n_bytes"),
    [
        ("2 GiB", 2 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("3 GB", 3_000_000_000),
        ("100 kb", 100_000),
        ("7", 7),
        ("7 B", 7),
        (4096, 4096),
    ],
)
def test_a_size_in_bytes(written, n_bytes):
    assert SIZE.validate_python(written) == n_bytes
    assert SIZE.validate_python(n_bytes) == n_bytes  # as it is written back


@pytest.mark.parametrize("written", ["", "GiB", "2 Gi", "two GiB", "-1 GiB", "1 GiB 2", "1e9 B"])
def test_what_is_no_size_is_refused_with_an_example(written):
    with pytest.raises(ValidationError, match="is not a size; write 2 GiB, 512 MiB or a number"):
        SIZE.validate_python(written)


@pytest.mark.parametrize("written", [0, -1, "0 GiB"])
def test_a_size_is_larger_than_zero(written):
    with pytest.raises(ValidationError, match="greater than 0"):
        SIZE.validate_python(written)


def test_the_schema_takes_text_and_numbers():
    types = {part["type"] for part in SIZE.json_schema()["anyOf"]}
    assert types == {"integer", "string"}
