"""Rules that a neuron's activation map over two digits may follow, and the rule that its strongest
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
"""The types of a map: a type of rule, no rule, or silent (the same activation everywhere)."""
FEWEST = 5
"""Minimum number of cells of a rule: a single strong cell would satisfy a narrower one."""
WIDEST = 0.6
"""Maximum share of the cells of a rule: nearly every map would satisfy a wider one."""
MODULI = {"operand": (2, 3, 4, 5), "result": (2, 3, 4, 5, 10)}

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating]


class Rules(NamedTuple):
    """Rules over the same cells: their types, their names, and the cells in which they hold (rule x
    cell)."""

    types: tuple[str, ...]
    names: tuple[str, ...]
    holds: Bools

    @property
    def coverage(self) -> Floats:
        """The share of all cells in which each rule holds, which is also the share of the strongest
        cells that satisfy it by chance."""
        return self.holds.mean(1) if len(self.names) else np.zeros(0)


class Fit(NamedTuple):
    """The type and the rule of every map, with the share of its strongest cells that satisfy the
    rule (0 without a rule)."""

    types: NDArray[np.str_]
    names: NDArray[np.str_]
    shares: Floats


def rules_of(cells: NDArray[np.integer]) -> Rules:
    """The rules that can be tested on cells of (a, b, carry): neither too narrow nor too wide."""
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
                label = f"{name} = {low}" if low == high else f"{name} in {low}..{high}"
                yield f"{kind}_range", label, (low <= x) & (x <= high)
        for modulus in MODULI[kind]:
            for rest in range(modulus):
                yield f"{kind}_modulo", f"{name} mod {modulus} = {rest}", x % modulus == rest
    yield "identical_digits", "a = b", a == b
    for i, j in np.ndindex(2, 2):
        label = ", ".join(f"{name} {('even', 'odd')[odd]}" for name, odd in (("a", i), ("b", j)))
        yield "pattern", label, (a % 2 == i) & (b % 2 == j)
    for i in (0, 1):
        yield "carry", f"carry = {i}", carry == i


def shares(maps: Floats, holds: Bools) -> Floats:
    """For each rule, which holds in m cells, the share of each map's m strongest cells that satisfy
    it (maps: cell x map; result: rule x map).

    Cells tied for the last of the m places count fractionally, as in a random draw. A constant map
    thus gets each rule's coverage.
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
    """The best rule of every map: of those that fit, the one whose share is furthest above chance.

    Args:
        maps: activations, cell x map.
        rules: the rules to try, over the same cells.
        threshold: minimum share of the strongest cells that satisfy a rule that fits (fraction).
        margin: minimum excess of this share over the rule's share of all cells (fraction).
    """
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
