"""Intervention: a change of activations, and the choice of the activations that it changes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.registry import Component
from mechmem.spec.selection import Indices, Names, Units
from mechmem.spec.sweep import Swept

Stage = Callable[[Sequence[Edit]], list[Edit]]
"""(earlier edits) -> further edits."""
LACKING = "lacks a position that an edited example has, at {}"
"""Text of the error about a replacement value that is missing at an edited position."""


class Intervention(Component, registry="intervention"):
    """A change of a model's activations, specified independently of any model."""

    by_example: ClassVar[bool] = False
    """Whether each example's edit depends on that example alone, so that the edits of a part of the
    examples are rows of the edits of all. They can then be made and run in parts."""

    @abstractmethod
    def edits(self, session: Session, model: Model, examples: Examples) -> list[Edit]:
        """The edits that make this change on these examples.

        Anything estimated from data (means, erasers) is fitted here and never stored on the spec.

        Args:
            session: gives models, example sets, activations and cached results.
            model: the unedited model.
            examples: the examples that it will read, with the prefix that it is fed.
        """

    def edits_after(
        self, earlier: Sequence[Edit], session: Session, model: Model, examples: Examples
    ) -> list[Edit]:
        """The edits when other interventions come before this one; most interventions ignore them.

        Args:
            earlier: edits of the interventions listed before this one.
            session: as in `edits`.
            model: the unedited model.
            examples: as in `edits`.
        """
        return self.edits(session, model, examples)

    def is_by_example(self) -> bool:
        """`by_example`, or that of the intervention which this one is made of."""
        return self.by_example

    def stages(self, session: Session, model: Model, examples: Examples) -> list[Stage]:
        """The same change in stages, for interventions whose later edits depend on earlier ones.
        Each stage makes its edits once all edits before it are known.

        Args:
            session: as in `edits`.
            model: the unedited model.
            examples: as in `edits`.
        """
        return [lambda earlier: self.edits_after(earlier, session, model, examples)]

    def derive(self, session: Session, model: Model) -> Model:
        """The model that is run: `model` itself, unless the intervention changes weights."""
        return model


class SiteIntervention(Intervention):
    """An intervention at the chosen layers and positions of one site."""

    site: Swept[str]
    """A name of the sites table, or a TransformerLens hook name (then without `layer`)."""
    layer: Swept[Indices | None] = None
    """One layer or several; None for a site without layers."""
    position: Swept[Names | None] = None
    """Named positions, or `readout` for all from which answer tokens are read; by default, all."""

    @abstractmethod
    def edit(self, at: At, session: Session, model: Model, examples: Examples) -> Edit:
        """The edit at one hook.

        Args:
            at: the hook, positions and units that this intervention chooses.
            session: gives models, example sets, activations and cached results.
            model: the unedited model.
            examples: the examples that it will read, with the prefix that it is fed.
        """

    def edits(self, session: Session, model: Model, examples: Examples) -> list[Edit]:
        places = [self.at(hook, model, examples) for hook in self.hooks(model)]
        return [self.edit(at, session, model, examples) for at in places]

    def hooks(self, model: Model) -> list[str]:
        """The names of the edited hooks. Raises InputError for a hook that the model does not
        have."""
        name = sites.site(self.site).name
        if name in sites.READ_ONLY:
            raise InputError(f"site {name!r} can only be read: {sites.READ_ONLY[name]}")
        layers = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        return [sites.hook_of(model, self.site, layer) for layer in layers]

    def at(self, hook: str, model: Model, examples: Examples) -> At:
        """The chosen positions and units at a hook, for any set of examples.

        Args:
            hook: one of `hooks`.
            model: the model, for its numbers of heads and neurons.
            examples: the examples in which the named positions are looked up.
        """
        if self.position is None:
            return At(hook, None, self.units(model))
        if "pos" not in sites.site(self.site).axes:
            raise InputError(f"site {self.site!r} has no positions to choose from")
        return At(hook, shared(examples.indices(self.position)), self.units(model))

    def units(self, model: Model) -> tuple[int, ...] | None:
        """The chosen heads or neurons; None for all."""
        return None


class UnitIntervention(SiteIntervention):
    """An intervention that may be restricted to chosen heads or neurons."""

    head: Swept[Indices | None] = None
    """Heads, at sites that have them; by default, all. Key and value heads are numbered separately
    where grouped queries share them."""
    neurons: Swept[Units | None] = None
    """Neurons, at `neurons` and `mlp_pre`; by default, all."""

    def units(self, model: Model) -> tuple[int, ...] | None:
        found = sites.site(self.site)
        for field, value in (("head", self.head), ("neurons", self.neurons)):
            if value is None:
                continue
            axis = "d_mlp" if field == "neurons" else "head"
            if found.units not in ((axis, "key_head") if axis == "head" else (axis,)):
                raise InputError(
                    f"site {self.site!r} has no {field} to choose from (its axes: {found.axes})"
                )
            return _checked(field, value, found.n_units(model.cfg))
        return None


def _checked(field: str, value: int | tuple[int, ...], size: int) -> tuple[int, ...]:
    indices = (value,) if isinstance(value, int) else value
    if wrong := [i for i in indices if not 0 <= i < size]:
        raise InputError(f"{field} {wrong} is out of range: this site has 0 to {size - 1}")
    return indices


def shared(positions: Int[Tensor, "n k"]) -> Int[Tensor, "rows k"]:
    """The positions as a single row where they are the same in every example, which is faster to
    index with."""
    same = bool((positions == positions[:1]).all() and (positions >= 0).all())
    return positions[:1] if same else positions
