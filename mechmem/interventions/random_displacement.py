"""RandomDisplacement: the same displacement in a random direction, the control of an
intervention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.swap_weights import SwapWeights
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit, axes_of
from mechmem.session import Session

NEXT = 7919
"""Between the seeds of two directions of one draw."""


class RandomDisplacement(Intervention):
    """Moves each activation as far as the intervention `of` does, but in a random direction.

    What is left of an effect here is due to the size of the change alone. The direction is one for
    each position, shared by all examples; in each example it stays within the units that `of`
    changes there. Of a change of weights, it moves what the changed components write.
    Touches: the sites of `of`. Source: ours.
    """

    of: Intervention
    seed: int = 0

    @property
    def by_example(self) -> bool:  # type: ignore[override]
        """As that of the intervention."""
        return self.of.by_example

    def edits(self, session: Session, model: Model, examples: Examples) -> list[Edit]:
        return self.edits_after((), session, model, examples)

    def edits_after(
        self, earlier: Sequence[Edit], session: Session, model: Model, examples: Examples
    ) -> list[Edit]:
        if isinstance(self.of, SwapWeights):
            return self._of_weights(self.of, earlier, session, model, examples)
        inner = self.of.edits_after(earlier, session, model, examples)
        return [self._displaced(edit, i, model, examples) for i, edit in enumerate(inner)]

    def _displaced(self, edit: Edit, i: int, model: Model, examples: Examples) -> Edit:
        whole = self._direction(edit.hook, i, model, examples)

        def displaced(own: Tensor, rows: Tensor) -> Tensor:
            change = edit.function(own.clone(), rows) - own
            everywhere = whole.to(own).expand(len(rows), *whole.shape[1:])
            direction = edit.at.take(everywhere, rows) * (change != 0)
            return own + _rescaled(direction, change, edit.hook)

        return Edit(edit.at, displaced, rowwise=edit.rowwise)

    def _of_weights(
        self,
        swap: SwapWeights,
        earlier: Sequence[Edit],
        session: Session,
        model: Model,
        examples: Examples,
    ) -> list[Edit]:
        """Each component's output is moved as far as its new weights move it, on the input that
        it gets after the displacements before it."""
        found: list[Edit] = []
        for i, (component, hook) in enumerate(swap.outputs(model)):
            before = [*earlier, *found]
            changed = component.derive(session, model)
            new, old = (
                session.edited_activations(m, examples, before, [hook])[hook]
                for m in (changed, model)
            )
            direction = self._direction(hook, i, model, examples).to(old) * (new != old)
            offset = _rescaled(direction, new - old, hook)
            found.append(Edit(At(hook), lambda own, rows, offset=offset: own + offset[rows]))
        return found

    def _direction(
        self, hook: str, i: int, model: Model, examples: Examples
    ) -> Float[Tensor, "1 ..."]:
        """Normal numbers of the shape of the whole activation of one example."""
        n_positions = int(examples.n_positions.max())
        names = sites.site(hook).shape(model.cfg)[1:]
        shape = [n_positions if isinstance(name, str) else name for name in names]
        generator = torch.Generator().manual_seed(self.seed + NEXT * i)
        dtype = next(model.parameters()).dtype
        return torch.randn(1, *shape, generator=generator, dtype=dtype)


def _rescaled(direction: Tensor, change: Tensor, hook: str) -> Tensor:
    """The direction with the length of the change, at each position of each example."""
    axes = [axis for axis in range(1, change.ndim) if axis != axes_of(hook)[0]]
    size, length = (x.pow(2).sum(axes, keepdim=True).sqrt() for x in (change, direction))
    return size * direction / length.clamp_min(1e-12)
