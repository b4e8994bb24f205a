"""Rules: what a neuron's activation map over two digits may stand for, and which rule its strongest
cells satisfy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TYPES = (
    *(
        "operand_range",
        "result_range",
        "operand_modulo",
        "result_modulo",
        "identical_digits",
        "pattern",
        "carry",
    ),
    *("none", "silent"),
)
"""What a map can be: a type of rule, no rule, or the same activation everywhere."""
FEWEST = 5
"""Cells below which a rule is not tried: a single strong cell would satisfy it."""
WIDEST = 0.6
"""Share of the cells above which a rule is not tried: nearly every map would satisfy it."""
MODULI = {"operand": (2, 3, 4, 5), "result": (2, 3, 4, 5, 10)}

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating]


class Rules(NamedTuple):
    """Rules over the same cells: their types, their names, and in which cells they hold (rule x
    cell)."""

    types: tuple[str, ...]
    names: tuple[str, ...]
    holds: Bools

    @property
    def coverage(self) -> Floats:
        """The share of all cells in which each rule holds: its share of the strongest cells by
        chance."""
        return self.holds.mean(1) if len(self.names) else np.zeros(0)


class Fit(NamedTuple):
    """The type and the rule of every map, with the share of its strongest cells that satisfy it (0
    where none does)."""

    types: NDArray[np.str_]
    names: NDArray[np.str_]
    shares: Floats


def rules_of(cells: NDArray[np.integer]) -> Rules:
    """The rules that can be told apart on cells of (a, b, carry): neither too narrow nor too
    wide."""
    tried = [
        (kind, name, holds)
        for kind, name, holds in _rules(*cells.T)
        if holds.sum() >= FEWEST and holds.mean() <= WIDEST
    ]
    types, names, holds = (
        zip(*tried, strict=True) if tried else ((), (), np.zeros((0, len(cells)), bool))
    )
    return Rules(types, names, np.asarray(holds))


def _rules(a: NDArray, b: NDArray, carry: NDArray) -> Iterator[tuple[str, str, Bools]]:
    result = a + b + carry
    for name, x in (("a", a), ("b", b), ("sum", result)):
        kind = "result" if name == "sum" else "operand"
        for low in range(20):
            for high in range(low, 20):
                said = f"{name} = {low}" if low == high else f"{name} in {low}..{high}"
                yield f"{kind}_range", said, (low <= x) & (x <= high)
        for modulus in MODULI[kind]:
            for rest in range(modulus):
                yield f"{kind}_modulo", f"{name} mod {modulus} = {rest}", x % modulus == rest
    yield "identical_digits", "a = b", a == b
    for i, j in np.ndindex(2, 2):
        said = ", ".join(f"{name} {('even', 'odd')[odd]}" for name, odd in (("a", i), ("b", j)))
        yield "pattern", said, (a % 2 == i) & (b % 2 == j)
    for i in (0, 1):
        yield "carry", f"carry = {i}", carry == i


def shares(maps: Floats, holds: Bools) -> Floats:
    """Of the strongest cells of each map (cell x map), as many as a rule has, the share that
    satisfies it (rule x map).

    Cells of equal activation count in part, as if drawn among: a map without a pattern has every
    rule's coverage.
    """
    ordered, sizes = -np.sort(-maps, axis=0), holds.sum(1)
    found = np.empty((len(holds), maps.shape[1]))
    for size in np.unique(sizes):
        least = ordered[size - 1]
        above, level = maps > least, maps == least
        strongest = above + level * ((size - above.sum(0)) / level.sum(0))
        found[sizes == size] = holds[sizes == size] @ strongest / size
    return found


def fitted(maps: Floats, rules: Rules, threshold: float, margin: float) -> Fit:
    """Of the rules that fit a map (share at least `threshold`, and `margin` above chance), the one
    furthest above."""
    n_maps = maps.shape[1]
    silent = np.ptp(maps, axis=0) == 0 if len(maps) else np.ones(n_maps, bool)
    types, names = np.where(silent, "silent", "none").astype("U16"), np.full(n_maps, "", "U32")
    if not len(rules.names):
        return Fit(types, names, np.zeros(n_maps))
    found = shares(maps, rules.holds)
    above = found - rules.coverage[:, None]
    fits = (found >= threshold) & (above >= margin) & ~silent
    best, any_fits = np.where(fits, above, -1.0).argmax(0), fits.any(0)
    types[any_fits] = np.array(rules.types)[best[any_fits]]
    names[any_fits] = np.array(rules.names)[best[any_fits]]
    return Fit(types, names, np.where(any_fits, found[best, np.arange(n_maps)], 0.0))
