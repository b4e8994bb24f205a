"""Rules by hand: planted maps are called what they are, shuffled ones are not, and ties count in
part."""

from __future__ import annotations

import numpy as np
import pytest

from mechmem.analyses.neurons.rules import FEWEST, TYPES, WIDEST, fitted, rules_of, shares

CELLS = np.array(list(np.ndindex(10, 10, 2)))
A, B, CARRY = CELLS.T
RULES = rules_of(CELLS)

PLANTED = {
    "a in 3..5": ("operand_range", (A >= 3) & (A <= 5)),
    "b = 7": ("operand_range", B == 7),
    "a in 5..9": ("operand_range", A >= 5),
    "sum in 12..14": ("result_range", (A + B + CARRY >= 12) & (A + B + CARRY <= 14)),
    "sum mod 10 = 3": ("result_modulo", (A + B + CARRY) % 10 == 3),
    "sum mod 2 = 1": ("result_modulo", (A + B + CARRY) % 2 == 1),
    "a mod 3 = 1": ("operand_modulo", A % 3 == 1),
    "b mod 2 = 0": ("operand_modulo", B % 2 == 0),
    "a = b": ("identical_digits", A == B),
    "a odd, b even": ("pattern", (A % 2 == 1) & (B % 2 == 0)),
    "carry = 1": ("carry", CARRY == 1),
}


@pytest.mark.parametrize(("name", "planted"), PLANTED.items(), ids=PLANTED)
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_a_neuron_that_follows_a_rule_is_called_by_it(noise, name, planted):
    kind, holds = planted
    map_ = holds + noise * np.random.default_rng(0).random(len(CELLS))
    fit = fitted(map_[:, None], RULES, 0.6, 0.3)
    assert (fit.types[0], fit.names[0], fit.shares[0]) == (kind, name, pytest.approx(1))


def test_the_rules_of_a_digit_s_grid():
    assert set(RULES.types) == set(TYPES) - {"none", "silent"}
    assert len(set(RULES.names)) == len(RULES.names)
    assert (RULES.holds.sum(1) >= FEWEST).all()
    assert (RULES.coverage <= WIDEST).all()
    holds = dict(zip(RULES.names, RULES.holds, strict=True))
    np.testing.assert_array_equal(
        holds["sum in 10..13"], (A + B + CARRY >= 10) & (A + B + CARRY <= 13)
    )
    assert "sum = 0" not in holds  # a single cell
    assert "a in 0..8" not in holds


def test_the_share_is_that_of_as_many_strongest_cells_as_the_rule_has():
    map_ = np.array([5.0, 4, 3, 2, 1, 0])[:, None]
    holds = np.array([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
    np.testing.assert_allclose(shares(map_, holds)[:, 0], [1, 2 / 3, 0])


def test_cells_of_equal_activation_count_in_part():
    map_ = np.array([1.0, 1, 1, 1, 0, 0])[:, None]
    holds = np.array([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0]], bool)
    np.testing.assert_allclose(
        shares(map_, holds)[:, 0], [1 / 2, 1 / 4]
    )  # two of four equal cells are drawn
    flat = shares(np.zeros((200, 1)), RULES.holds)[:, 0]
    np.testing.assert_allclose(flat, RULES.coverage)


def test_shares_are_those_of_drawing_among_equals():
    generator = np.random.default_rng(0)
    map_ = generator.integers(0, 4, 200).astype(float)
    drawn = []
    for _ in range(400):
        order = np.lexsort([generator.random(200), -map_])
        drawn.append([holds[order[: holds.sum()]].mean() for holds in RULES.holds])
    np.testing.assert_allclose(
        shares(map_[:, None], RULES.holds)[:, 0], np.mean(drawn, axis=0), atol=0.04
    )


def test_shuffled_maps_follow_no_rule():
    maps = np.stack([holds for _, holds in PLANTED.values()] * 40, axis=1).astype(float)
    maps += 0.4 * np.random.default_rng(1).random(maps.shape)
    shuffled = np.random.default_rng(2).permuted(maps, axis=0)
    assert (fitted(maps, RULES, 0.6, 0.3).types != "none").all()
    assert (fitted(shuffled, RULES, 0.6, 0.3).types == "none").mean() > 0.99


def test_threshold_and_margin_decide():
    half = (A == 3) & (B < 7)  # 14 of the 20 cells of a = 3
    map_ = half + 0.01 * np.random.default_rng(0).random(200)
    map_ += 0.5 * (
        (A != 3) & (np.arange(200) % 33 == 0)
    )  # six others that are stronger than the rest
    for threshold, margin, kind in (
        (0.7, 0.3, "operand_range"),
        (0.75, 0.3, "none"),
        (0.6, 0.65, "none"),
    ):
        assert fitted(map_[:, None], RULES, threshold, margin).types[0] == kind


def test_what_has_no_pattern_has_no_rule():
    silent = np.full((200, 1), 0.3)
    assert fitted(silent, RULES, 0.6, 0.0).types[0] == "silent"
    assert (
        fitted(np.random.default_rng(0).random((200, 5)), RULES, 0.6, 0.3).types.tolist()
        == ["none"] * 5
    )
    few = rules_of(CELLS[:3])
    assert fitted(np.eye(3), few, 0.6, 0.3).types.tolist() == ["none"] * 3
    assert not few.names
