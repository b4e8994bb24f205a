"""Exchange: units that take another model's values, in each example its own units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from einops import repeat
from jaxtyping import Bool
from torch import Tensor

from mechmem.analyses.neurons.ranking import Site, Unit
from mechmem.data.examples import Examples
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit
from mechmem.models.outputs import OUTPUTS, check_adds_up, output_of, weights_out
from mechmem.session import Session


@dataclass(frozen=True)
class Exchange:
    """An intervention that patches other neurons, or heads, in every example.

    All examples then go through the model together, however different their sets are.
    """

    source: Model
    """The model whose values the chosen units get."""
    chosen: Bool[Tensor, "n layer unit"]
    """Which units, for each row of the set that the examples are from."""
    site: Site = "neurons"
    """Neurons, or heads."""
    unit: Unit = "contributions"
    """Whether the source's weights out of the units are taken too."""

    def is_by_example(self) -> bool:
        return True

    def derive(self, session: Session, model: Model) -> Model:
        return model

    def edits_after(
        self, earlier: Sequence[Edit], session: Session, model: Model, examples: Examples
    ) -> list[Edit]:
        check_adds_up(model)
        found: list[Edit] = []
        for layer in range(model.cfg.n_layers):
            chosen = self.chosen[examples.index, layer]
            if chosen.any():
                hook = f"blocks.{layer}.{OUTPUTS[self.site][0]}"
                found += self._of_layer(hook, chosen, session, model, examples)
        return found

    def _of_layer(
        self,
        hook: str,
        chosen: Bool[Tensor, "n unit"],
        session: Session,
        model: Model,
        examples: Examples,
    ) -> list[Edit]:
        theirs = session.activation(self.source, examples, hook).flatten(2)
        mask = repeat(chosen, "n unit -> n 1 (unit size)", size=theirs.shape[-1] // chosen.shape[1])
        mask = mask.to(theirs)
        if self.unit == "activations":

            def taken(own: Tensor, rows: Tensor) -> Tensor:
                flat, where = own.flatten(2), mask[rows]
                return (flat + where * (theirs[rows] - flat)).reshape(own.shape)

            return [Edit(At(hook), taken, only_reads=True)]

        written = (theirs * mask) @ weights_out(self.source, hook)
        weights, seen = weights_out(model, hook), []

        def look(own: Tensor, rows: Tensor) -> Tensor:
            seen[:] = [own]
            return own

        def exchanged(own: Tensor, rows: Tensor) -> Tensor:
            return own + written[rows] - (seen[0].flatten(2) * mask[rows]) @ weights

        summed = At(output_of(hook))
        return [
            Edit(At(hook), look, only_reads=True),
            Edit(summed, exchanged, only_reads=True),
        ]
