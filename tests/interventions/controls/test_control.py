from __future__ import annotations

import pytest
import torch

from mechmem.interventions.controls.control import Control
from mechmem.interventions.controls.random_direction import RandomDirection
from mechmem.interventions.controls.random_neurons import RandomNeurons
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.spec.errors import InputError

BEFORE = Source(checkpoint="before")
NEURONS = Patch(site="neurons", layer=1, neurons=(0, 3, 17, 20, 21), position="=", source=BEFORE)


def chosen(draw: list[Patch]) -> list[tuple[int, int]]:
    return [(part.layer, neuron) for part in draw for neuron in part.neurons]


@pytest.mark.parametrize("kind", Control.kinds().values())
def test_every_control_draws_n_times_and_the_same_again(kind, model):
    control = kind(n=4, seed=9)
    draws = control.draws([NEURONS], model)
    assert len(draws) == 4
    assert draws == control.draws([NEURONS], model)
    assert len({str(draw) for draw in draws}) == 4
    assert draws != kind(n=4, seed=50).draws([NEURONS], model)


@pytest.mark.parametrize("kind", Control.kinds().values())
def test_every_draw_can_be_applied(kind, session, model, examples):
    for draw in kind(n=3).draws([NEURONS], model):
        found = session.logits(model, examples, draw)
        assert not torch.equal(found, session.logits(model, examples))


@pytest.mark.parametrize("kind", Control.kinds().values())
def test_a_draw_for_several_interventions_replaces_each_of_them(kind, session, model, examples):
    together = [NEURONS, NEURONS.model_copy(update={"layer": 0, "position": "s4"})]
    control = kind(n=2, seed=3)
    for draw, first in zip(
        control.draws(together, model), control.draws(together[:1], model), strict=True
    ):
        assert draw[: len(first)] == first
        rest = draw[len(first) :]
        assert {getattr(part, "of", part).position for part in rest} == {"s4"}
        seeds = [part.seed for part in draw if isinstance(part, RandomDisplacement)]
        assert len(set(seeds)) == len(seeds)  # no two of them move in the same direction
        both, one = (session.logits(model, examples, parts) for parts in (draw, first))
        assert not torch.allclose(both, one, atol=1e-4)


def test_random_direction_displaces_at_random():
    draws = RandomDirection(n=2, seed=5).draws([NEURONS], None)
    assert draws == [
        [RandomDisplacement(of=NEURONS, seed=5)],
        [RandomDisplacement(of=NEURONS, seed=6)],
    ]


@pytest.mark.parametrize("part", [NEURONS, NEURONS.model_copy(update={"site": "mlp_pre"})])
def test_random_neurons_are_as_many_and_distinct(part, model):
    for draw in RandomNeurons(n=10).draws([part], model):
        assert len(chosen(draw)) == len(set(chosen(draw))) == 5
        assert all(0 <= layer < 2 and 0 <= neuron < 24 for layer, neuron in chosen(draw))


def test_random_neurons_differ_in_the_choice_of_neurons_alone(model):
    for part in RandomNeurons(n=1).draws([NEURONS], model)[0]:
        assert part.model_copy(update={"layer": 1, "neurons": NEURONS.neurons}) == NEURONS


def test_random_neurons_come_from_all_layers_alike(model):
    drawn = [
        neuron for draw in RandomNeurons(n=200).draws([NEURONS], model) for neuron in chosen(draw)
    ]
    assert set(drawn) == {(layer, neuron) for layer in range(2) for neuron in range(24)}
    share = sum(layer for layer, _ in drawn) / len(drawn)
    assert share == pytest.approx(0.5, abs=0.06)


def test_random_neurons_of_stated_layers_come_from_these(model):
    for draw in RandomNeurons(n=5, layers=(0,)).draws([NEURONS], model):
        assert [layer for layer, _ in chosen(draw)] == [0] * 5


def test_as_many_as_the_layers_hold_where_no_neurons_are_named(model):
    whole = Patch(site="neurons", layer=1, source=BEFORE)
    assert len(chosen(RandomNeurons(n=1).draws([whole], model)[0])) == 24
    both = Patch(site="neurons", layer=(0, 1), neurons=(2, 3), source=BEFORE)
    assert len(chosen(RandomNeurons(n=1).draws([both], model)[0])) == 4


@pytest.mark.parametrize(
    "part", [Patch(site="attn_out", layer=0, source=BEFORE), RandomDisplacement(of=NEURONS)]
)
def test_random_neurons_refuse_another_site(part, model):
    with pytest.raises(InputError, match="random_neurons only matches interventions at `neurons`"):
        RandomNeurons().draws([part], model)
