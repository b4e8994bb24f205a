"""PatchWithin: a patch that moves the residual stream at most so far."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import AfterValidator, NonNegativeFloat
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.patch import Patch
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit
from mechmem.models.outputs import OUTPUTS, check_adds_up, output_of, weights_out
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.selection import distinct
from mechmem.spec.sweep import Swept

WRITERS = (*OUTPUTS, "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post")
"""Sites whose change has a size in the residual stream."""


class PatchWithin(Patch):
    """Activation patching by a dose: towards the source, but at most `norm` far.

    The distance is the L2 norm of the change in the residual stream, in each example and position;
    `neurons` and `z` change it through their own weights out. A shorter way is gone to its end.
    Sites can be compared at equal doses if no one is moved further than the others could be:
    list them in `within`.
    Touches: the site's sum in the residual stream, `batch pos d_model`.
    Raises: InputError for a site that does not write into the residual stream.
    Source: ours.
    """

    norm: Swept[NonNegativeFloat | None] = None
    """The largest L2 norm of the change; by default, no limit of its own."""
    within: Annotated[tuple[str, ...], AfterValidator(distinct)] | None = None
    """Sites of the same layer: the change is also no larger than theirs would be."""

    def hooks(self, model: Model) -> list[str]:
        for site in (self.site, *(self.within or ())):
            if sites.site(site).name not in WRITERS:
                raise InputError(
                    f"a change of {site!r} has no size in the residual stream; choose from: "
                    f"{', '.join(WRITERS)}"
                )
        check_adds_up(model)
        return super().hooks(model)

    def edits(self, session: Session, model: Model, examples: Examples) -> list[Edit]:
        found: list[Edit] = []
        for hook in self.hooks(model):
            found += self._of_layer(self.at(hook, model, examples), session, model, examples)
        return found

    def _of_layer(self, at: At, session: Session, model: Model, examples: Examples) -> list[Edit]:
        patch = super().edit(at, session, model, examples)
        most = self._most(at, session, model, examples)

        def limited(change: Tensor, rows: Tensor) -> Tensor:
            if most is None:
                return change
            limit = most if len(most) == 1 else most[rows.to(most.device)]
            size = change.norm(dim=-1, keepdim=True)
            return change * (limit.to(change) / size.clamp_min(1e-12)).clamp_max(1)

        if sites.site(at.hook).name not in OUTPUTS:

            def moved(own: Tensor, rows: Tensor) -> Tensor:
                return own + limited(patch.function(own, rows) - own, rows)

            return [Edit(at, moved, only_reads=True)]

        weights, seen = weights_out(model, at.hook, at.units), []

        def look(own: Tensor, rows: Tensor) -> Tensor:
            seen[:] = [own]
            return own

        def written(own: Tensor, rows: Tensor) -> Tensor:
            units = at.take(seen[0], rows)
            change = (patch.function(units, rows) - units).flatten(2) @ weights
            return own + limited(change, rows)

        summed = At(output_of(at.hook), at.pos)
        return [Edit(At(at.hook), look, only_reads=True), Edit(summed, written, only_reads=True)]

    def _most(
        self, at: At, session: Session, model: Model, examples: Examples
    ) -> Float[Tensor, "n pos 1"] | None:
        """The largest norm in each example and position; None for no limit."""
        limits = [] if self.norm is None else [torch.full((1, 1, 1), float(self.norm))]
        for site in self.within or ():
            limits.append(self._size(site, at, session, model, examples))
        if not limits:
            return None
        found = limits[0]
        for limit in limits[1:]:
            found = torch.minimum(found.to(limit), limit)
        return found

    def _size(
        self, site: str, at: At, session: Session, model: Model, examples: Examples
    ) -> Float[Tensor, "n pos 1"]:
        """How far a whole patch of another site of the layer would move the residual stream."""
        hook = sites.hook_of(model, sites.site(site).name, at.layer)
        there = self.model_copy(update={"head": None, "neurons": None, "site": site})

        def place(rows: Examples) -> At:
            return there.at(hook, model, rows)

        theirs = self.source.activation(place, session, model, examples)
        change = (theirs - session.activation(model, examples, place(examples))).flatten(2)
        if sites.site(site).name in OUTPUTS:
            change = change @ weights_out(model, hook)
        return change.norm(dim=-1, keepdim=True)
