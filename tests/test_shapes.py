"""The shapes that the package states are checked in every test, also by the name of an alias."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from shapes import checked
from torch import Tensor

from mechmem.analyses.readouts.lens import _probability
from mechmem.models import edits, fast
from mechmem.session import Session

Named = Float[Tensor, "n 3"]


def same(x: Float[Tensor, "n 3"], y: int) -> Float[Tensor, "n 3"]:
    return x[:y]


def aliased(x: Named, y: int) -> Tensor:
    return x[:y]


def without(x: Tensor, y: int) -> Tensor:
    return x[:y]


def test_functions_that_state_shapes_are_wrapped_and_others_left_as_they_are():
    for function, is_wrapped in ((same, True), (aliased, True), (without, False)):
        wrapped = jaxtyping.jaxtyped(typechecker=checked)(function)
        assert (wrapped is not function) == is_wrapped
        assert wrapped(torch.zeros(2, 3), 2).shape == (2, 3)
        if is_wrapped:
            with pytest.raises(jaxtyping.TypeCheckError):
                wrapped(torch.zeros(2, 4), 2)


def test_a_returned_shape_is_checked_against_those_of_the_arguments():
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        jaxtyping.jaxtyped(typechecker=checked)(same)(torch.zeros(2, 3), 1)


def test_the_package_is_checked():
    for function in (fast.plain_logits, Session.unembedded, edits.At.take, _probability):
        assert hasattr(function, "__wrapped__"), function
    assert not hasattr(edits.layer_of, "__wrapped__")
