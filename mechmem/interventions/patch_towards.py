"""PatchTowards: a step from an activation towards its value in the run of the minimal pair."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import LACKING, UnitIntervention
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit, lacks, norms, replacing
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.references import ExampleSetName
from mechmem.spec.sweep import Swept


class PatchTowards(UnitIntervention):
    """Moves an activation towards its value in the run of the example's minimal pair.

    The pair's prompt is followed by the answer tokens that the example itself is fed, so that the
    two runs differ in the prompt only. Dose 1 goes the whole way. With `matched`, the way is as
    long as the shorter of two at each position of each example: to the example's own pair, and to
    its pair in that other set. Steps towards either pair then have equal norms.
    Touches: any site, `batch pos ...`, at the chosen layers, positions and units.
    Raises: InputError for examples without pairs, or if `matched` has other examples.
    Source: interchange interventions, arXiv:2106.02997; equal norms: ours.
    """

    by_example: ClassVar[bool] = True

    dose: Swept[Annotated[float, Field(ge=0, le=1)]] = 1.0
    """Length of the step as a share of the way (fraction)."""
    matched: Swept[ExampleSetName | None] = None
    """A set of the same examples with another kind of pair, whose distance limits the way."""

    def edit(self, at: At, session: Session, model: Model, examples: Examples) -> Edit:
        own = session.activation(model, examples, at)

        def way(paired: Examples) -> Tensor:
            rows = self._pairs(paired, examples)
            theirs = session.activation(model, rows, self.at(at.hook, model, rows))
            if theirs.shape != own.shape:
                raise InputError(
                    f"at {at.hook} the pair has shape {tuple(theirs.shape)}, the example "
                    f"{tuple(own.shape)}: name the positions that both have"
                )
            # Masked scores are -inf in both runs: their difference is NaN, and they stay masked.
            return torch.where(own.isneginf(), 0.0, theirs - own)

        change = way(examples)
        length = norms(change, at.hook)
        step = self.dose * change
        if self.matched is not None:
            other = norms(way(self._same_examples(session, examples)), at.hook)
            shorter = torch.minimum(length, other)
            step = torch.where(length > 0, step * shorter / length, 0.0)
        value = own + step
        session.demand(not lacks(value, at), f"the pair {LACKING.format(at.hook)}")
        return replacing(at, value, "the pair")

    def _same_examples(self, session: Session, examples: Examples) -> Examples:
        """The rows of `matched` that are these examples."""
        assert self.matched is not None
        whole = session.examples(self.matched)
        is_long_enough = int(examples.index.max()) < len(whole)
        found = (
            whole.select(examples.index).with_prefix(examples.prefix) if is_long_enough else None
        )
        if found is None or not torch.equal(found.prompt, examples.prompt):
            raise InputError(
                f"{self.matched!r} has other examples than the set that is patched; make both sets "
                "alike, with `pair` and `also_pair` swapped"
            )
        return found

    def _pairs(self, paired: Examples, examples: Examples) -> Examples:
        """The minimal pairs, fed the answer tokens that the examples are fed."""
        if paired.counterfactual is None:
            raise InputError("patching towards a pair needs an example set made with `pair:`")
        return paired.counterfactual.continued_with(examples.labels(examples.prefix))
