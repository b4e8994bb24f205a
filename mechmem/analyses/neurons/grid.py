"""GridAnalysis: the base of analyses that map neurons over the two digits and the carry of an
addition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.neurons.rules import Fit, fitted, rules_of
from mechmem.data.examples import Examples
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.limits import Seed
from mechmem.spec.references import ExampleSetName

CELLS = np.array(list(np.ndindex(10, 10, 2)))
"""(a, b, carry) of every cell."""


@dataclass(frozen=True)
class Grid:
    """The cell of each example of a set, at one place of the answer."""

    examples: Examples
    place: str
    index: Tensor
    """Row of `CELLS` of each example."""

    @classmethod
    def of(cls, examples: Examples, place: str) -> Self:
        """The grid of place s_i: the digits at positions a_i and b_i, and the carry into s_i (0 for
        s0)."""
        digit = torch.tensor([int(word) if word.isdigit() else -1 for word in examples.vocabulary])
        a, b = (digit[examples.tokens[:, examples.positions[f"{x}{place[1:]}"]]] for x in "ab")
        return cls(
            examples,
            place,
            20 * a + 2 * b + examples.variables.get(f"carry_{place[1:]}", torch.zeros_like(a)),
        )

    @property
    def counts(self) -> NDArray[np.integer]:
        """Number of examples in each cell."""
        return torch.bincount(self.index, minlength=len(CELLS)).numpy()

    def means(self, activation: Tensor) -> NDArray[np.floating]:
        """Mean activation per cell (cell x neuron) at the position where this place is read; 0 for
        cells without examples."""
        values = activation[
            :, self.examples.places.index(self.place) - self.examples.n_answer
        ].double()
        total = torch.zeros(len(CELLS), values.shape[1], dtype=torch.double).index_add_(
            0, self.index, values.cpu()
        )
        return total.numpy() / np.maximum(self.counts, 1)[:, None]


class GridAnalysis(Analysis):
    """An analysis of MLP neurons at the position where an answer digit is read, as functions of the
    two operand digits and the carry.

    For tasks whose answer has places `s0`, `s1` ... with operand digits at positions `a0`, `b0`,
    `a1` ... (FDA).
    """

    examples: ExampleSetName = ExampleSetName("clean")
    """The set over which maps are averaged: many clean instances, since there are 200 cells."""
    threshold: float = Field(0.6, gt=0, le=1)
    """For a rule that holds in m cells, the share of a map's m strongest cells that must satisfy
    it (fraction)."""
    margin: float = Field(0.3, ge=0, le=1)
    """How far this share must exceed the rule's share of all cells, so that wide rules do not fit
    by chance (fraction)."""
    seed: Seed = 0
    """Seed of the shuffled maps, and of permutations."""

    def places(self, session: Session) -> list[str]:
        """The answer places that have two operand digits. Raises InputError if none has."""
        examples = session.examples(self.examples)
        found = [
            p for p in examples.places if {f"a{p[1:]}", f"b{p[1:]}"} <= examples.positions.keys()
        ]
        if not found:
            known = ", ".join(examples.positions)
            raise InputError(
                f"maps need operand digits at positions a0, b0 ...; this task has {known}"
            )
        return found

    def activations(self, session: Session, model: str, examples: str) -> list[Tensor]:
        """The activations of the MLP neurons of each layer, `n pos d_mlp`.

        Args:
            session: gives the activations.
            model: name of the model.
            examples: name of the example set.
        """
        n_layers = session.model(model).cfg.n_layers
        hooks = [f"blocks.{layer}.mlp.hook_post" for layer in range(n_layers)]
        return [
            *session.activations(session.model(model), session.examples(examples), hooks).values()
        ]

    def maps(self, session: Session, model: str) -> dict[tuple[int, str], NDArray[np.floating]]:
        """The maps of all neurons (cell x neuron), by layer and place; cached on the session."""
        examples = session.examples(self.examples)

        def make() -> dict[tuple[int, str], NDArray[np.floating]]:
            grids = [Grid.of(examples, place) for place in self.places(session)]
            layers = self.activations(session, model, self.examples)
            return {
                (layer, grid.place): grid.means(activation)
                for layer, activation in enumerate(layers)
                for grid in grids
            }

        return session.cached(("maps", session.model(model), examples), make)

    def classified(self, session: Session, model: str) -> pd.DataFrame:
        """Type and rule of every neuron at every place, and its type with the cells shuffled;
        cached on the session."""
        examples = session.examples(self.examples)

        def make() -> pd.DataFrame:
            maps = self.maps(session, model).items()
            tables = [self._classified(session, *at, map_) for at, map_ in maps]
            return pd.concat(tables, ignore_index=True)

        chosen = (self.threshold, self.margin, self.seed)
        return session.cached(("classified", session.model(model), examples, *chosen), make)

    def _classified(
        self, session: Session, layer: int, place: str, map_: NDArray[np.floating]
    ) -> pd.DataFrame:
        is_met = Grid.of(session.examples(self.examples), place).counts > 0
        rules, met = rules_of(CELLS[is_met]), map_[is_met]
        mixed = np.random.default_rng([self.seed, layer]).permuted(met, axis=0)
        fit, shuffled = (fitted(of, rules, self.threshold, self.margin) for of in (met, mixed))
        return _rows(fit, shuffled).assign(layer=layer, place=place)


def _rows(fit: Fit, shuffled: Fit) -> pd.DataFrame:
    columns = {
        "type": fit.types,
        "rule": fit.names,
        "share": fit.shares,
        "shuffled_type": shuffled.types,
    }
    return pd.DataFrame({"neuron": np.arange(len(fit.types))} | columns).astype(
        {"type": str, "rule": str}
    )
