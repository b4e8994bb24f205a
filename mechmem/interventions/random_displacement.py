"""RandomDisplacement: the same displacement in a random direction, the control of any
intervention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import Intervention
from mechmem.models.architecture import Model
from mechmem.models.fast import Edit
from mechmem.session import Session


class RandomDisplacement(Intervention):
    """Moves each activation as far as the intervention `of` does, but in a random direction.

    What is left of an effect here is due to the size of the change alone. The direction is one for
    each position, shared by all examples; in each example it stays within the units that `of`
    changes there.
    Touches: the sites of `of`. Source: ours.
    """

    of: Intervention
    seed: int = 0

    def edits(self, model: Model, examples: Examples, session: Session) -> list[Edit]:
        inner = self.of.edits(model, examples, session)
        return [
            Edit(edit.hook, _displaced(edit, self.seed + 7919 * i)) for i, edit in enumerate(inner)
        ]


def _displaced(edit: Edit, seed: int) -> Callable[[Tensor], Tensor]:
    pos = 2 if edit.hook.endswith("hook_pattern") else 1

    def displaced(activation: Tensor) -> Tensor:
        change = edit.function(activation) - activation
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(
            activation.shape[1:], generator=generator, dtype=activation.dtype
        ).to(activation.device)
        direction = direction * (change != 0)
        axes = [axis for axis in range(1, activation.ndim) if axis != pos]
        size, length = (x.pow(2).sum(axes, keepdim=True).sqrt() for x in (change, direction))
        return activation + size * direction / length.clamp_min(1e-12)

    return displaced
