from __future__ import annotations

import re

import pandas as pd
import pytest
from pydantic import ValidationError

import mechmem.experiment.spec  # noqa: F401  imports the base class of every registry
from mechmem.experiment.quantities import Quantity
from mechmem.report.figures.bars import Bars
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.registry import Component, load_all
from mechmem.spec.retired import RETIRED, VALUES, replaced_value, replacement

load_all()
KINDS = {"twin", "distributed", "scramble", "neither"}


@pytest.mark.parametrize("old", RETIRED)
def test_a_retired_name_is_answered_with_the_new_one_where_that_is_known(old):
    for new in RETIRED[old]:
        assert suggest(old, ["else", new]) == f"{old!r} is now {new!r}"
        assert replacement(old, ["else"]) is None
        assert "is now" not in suggest(old, ["else"])


@pytest.mark.parametrize("old", sorted(KINDS))
def test_a_retired_kind_is_refused_with_the_new_one(old):
    (new,) = RETIRED[old]
    (registry,) = [name for name, kinds in Component.registries.items() if new in kinds]
    (base,) = [
        cls for cls in Component.__subclasses__() if cls.__dict__.get("registry") == registry
    ]
    with pytest.raises(ValidationError, match=re.escape(f"{old!r} is now {new!r}")):
        base.model_validate({"kind": old})


@pytest.mark.parametrize("old", RETIRED)
def test_no_kind_or_field_has_a_retired_name_and_every_new_name_is_one(old):
    kinds = {kind for members in Component.registries.values() for kind in members}
    assert old not in kinds
    if old not in VALUES:
        classes = [cls for members in Component.registries.values() for cls in members.values()]
        fields = {name for cls in classes for name in cls.model_fields} | {"optimisation"}
        assert all(new in kinds | fields for new in RETIRED[old])


def test_a_retired_key_is_refused_with_the_new_one():
    class Made(Component):
        greedy: bool = True

    with pytest.raises(ValidationError, match="made has no key 'decode'; 'decode' is now 'greedy'"):
        Made(decode=False)


TABLE = pd.DataFrame(
    {
        "seed": [0, 0],
        "layer": [0, 0],
        "prefix": ["given", "given"],
        "condition": ["intervened", "baseline"],
        "measure": ["off_label_rate"] * 2,
        "value": [0.5, 0.25],
        "low": [0.5, 0.25],
        "high": [0.5, 0.25],
    }
)


@pytest.mark.parametrize("old", VALUES)
def test_a_retired_value_is_refused_with_the_new_one_even_where_no_row_has_it(old):
    new = replaced_value(old)
    column = {"decode": "prefix", "neither": "measure"}.get(old, "condition")
    for message in (rf"{column} '{old}'; '{old}' is now '{new}'",):
        with pytest.raises(InputError, match=message):
            Quantity(table="t", where={column: old}).measure({"t": TABLE})
        with pytest.raises(InputError, match=message):
            Bars(table="t", x="layer", where={column: (old,)}).draw(TABLE)


def test_a_retired_column_is_refused_with_the_new_one():
    table = TABLE.assign(method="mean")
    with pytest.raises(InputError, match="no column 'how'; 'how' is now 'method'"):
        Quantity(table="t", where={"how": "mean"}).measure({"t": table})
