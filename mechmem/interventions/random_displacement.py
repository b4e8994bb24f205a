"""RandomDisplacement: a displacement of the same size in a random direction, as the control of an
intervention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import Intervention
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.edits import Edit, norms
from mechmem.session import Session
from mechmem.spec.limits import Seed

NEXT = 7919
"""Offset between the seeds of the directions of one draw."""


class RandomDisplacement(Intervention):
    """Moves each activation as far as another intervention does, but in a random direction.

    An effect that remains is due to the size of the change alone. There is one direction per
    position, shared by all examples. In each example it is restricted to the units that `of`
    changes there. For a change of weights, the outputs of the changed components are moved.
    Touches: the sites of `of`.
    Source: ours.
    """

    of: Intervention
    """The intervention whose displacement is matched."""
    seed: Seed = 0
    """Seed of the first direction."""

    def is_by_example(self) -> bool:
        return self.of.is_by_example()

    def edits(self, session: Session, model: Model, examples: Examples) -> list[Edit]:
        return self.edits_after((), session, model, examples)

    def edits_after(
        self, earlier: Sequence[Edit], session: Session, model: Model, examples: Examples
    ) -> list[Edit]:
        found: list[Edit] = []
        for stage in self.of.stages(session, model, examples):
            for edit in stage([*earlier, *found]):
                found.append(self._displaced(edit, len(found), model, examples))
        return found

    def _displaced(self, edit: Edit, i: int, model: Model, examples: Examples) -> Edit:
        whole = self._direction(edit.hook, i, model, examples)

        def displaced(own: Tensor, rows: Tensor) -> Tensor:
            # An edit with a known value does not change its argument, so no copy is needed.
            given = own if edit.constant is not None else own.clone()
            change = edit.function(given, rows) - own
            if edit.hook.endswith("hook_attn_scores"):
                # Scores that are masked (-inf) before and after are not displaced.
                change = change.nan_to_num(0.0, 0.0, 0.0)
            everywhere = whole.to(own).expand(len(rows), *whole.shape[1:])
            direction = edit.at.take(everywhere, rows) * (change != 0)
            return own + _rescaled(direction, change, edit.hook)

        return Edit(edit.at, displaced, rowwise=edit.rowwise)

    def _direction(
        self, hook: str, i: int, model: Model, examples: Examples
    ) -> Float[Tensor, "1 ..."]:
        """Normal numbers with the shape of the whole activation of one example."""
        n_positions = int(examples.n_positions.max())
        names = sites.site(hook).shape(model.cfg)[1:]
        shape = [n_positions if isinstance(name, str) else name for name in names]
        generator = torch.Generator().manual_seed(self.seed + NEXT * i)
        dtype = next(model.parameters()).dtype
        return torch.randn(1, *shape, generator=generator, dtype=dtype)


def _rescaled(direction: Tensor, change: Tensor, hook: str) -> Tensor:
    """The direction, scaled at each position of each example to the norm of the change."""
    return norms(change, hook) * direction / norms(direction, hook).clamp_min(1e-12)
