from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

import mechmem.experiment.spec  # noqa: F401  imports the base class of every registry
from mechmem.data.example_set import ExampleSet
from mechmem.experiment.claims import Condition
from mechmem.models.architecture import Architecture
from mechmem.spec.errors import InputError
from mechmem.spec.limits import MOST_SEEDS
from mechmem.spec.registry import Component, load_all
from mechmem.spec.sweep import each
from mechmem.training.recipe import Optimisation, Recipe

COUNTS = (
    "n",
    "n_draws",
    "n_random",
    "n_steps",
    "steps",
    "seed",
    "split_seed",
    "n_halves",
    "copies",
    "k",
    "top",
    "least",
    "n_codes",
    "rank",
    "shift",
    "look_up",
    "n_relations_per_entity",
)
load_all()
KINDS = [kind for members in Component.registries.values() for kind in members.values()]
FIELDS = [
    (kind, name)
    for kind in [*KINDS, Optimisation, ExampleSet]
    for name in kind.model_fields
    if name in COUNTS
]


def has_upper_limit(field: Any) -> bool:
    """Whether the type of a field, or a part of it, has an upper limit."""
    metadata = getattr(field, "metadata", None) or getattr(field, "__metadata__", ())
    if any(getattr(m, "le", None) or getattr(m, "lt", None) for m in metadata):
        return True
    if any(isinstance(m, FieldInfo) and has_upper_limit(m) for m in metadata):
        return True
    of = field.annotation if isinstance(field, FieldInfo) else field
    return any(has_upper_limit(part) for part in get_args(of))


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda v: getattr(v, "kind", v))
def test_every_count_and_seed_has_an_upper_limit(kind, name):
    assert has_upper_limit(kind.model_fields[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_is_finite(value):
    with pytest.raises(ValidationError, match="finite number"):
        Condition(quantity="x", at_least=value)
    with pytest.raises(ValidationError, match=r"finite number|greater than 0|less than"):
        Optimisation(learning_rate=value)


@pytest.mark.parametrize("fields", [{"d_model": 10**6}, {"d_mlp": 10**6, "n_layers": 1000}])
def test_a_model_that_does_not_fit_is_refused_with_its_size(fields):
    with pytest.raises(InputError, match=r"needs [\d,]+ GB, this machine has [\d,]+ GB; choose"):
        Architecture(**{"d_model": 4096, **fields}).build(100, 10)


def test_the_number_of_parameters_is_that_of_the_model():
    architecture = Architecture(n_layers=3, d_model=16, n_heads=2, d_head=4, d_mlp=24, norm=None)
    model = architecture.build(11, 7)
    weights = sum(p.numel() for name, p in model.named_parameters() if ".W_" in name)
    assert architecture.n_parameters(11, 7) == weights


def test_a_sweep_has_a_limited_number_of_members():
    sizes = each(*range(1, 201))
    with pytest.raises(InputError, match="the sweep has 40,000 members; at most 10,000"):
        Architecture(n_layers=sizes, d_model=sizes, d_head=4).expand({})


def test_the_number_of_seeds_is_limited(spec):
    from mechmem.experiment.spec import Experiment

    with pytest.raises(ValidationError, match="1,001 seeds are listed; at most 1,000"):
        Experiment.model_validate(spec(seeds=tuple(range(MOST_SEEDS + 1))))
    for seed in (-1, 2**63):
        with pytest.raises(ValidationError, match="seeds"):
            Experiment.model_validate(spec(seeds=(seed,)))


def test_a_name_is_short():
    with pytest.raises(ValidationError, match="at most 100 characters"):
        Recipe(name="x" * 101, task={"kind": "four_digit_addition"})
