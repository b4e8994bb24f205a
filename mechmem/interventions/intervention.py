"""Intervention: what changes activations, and the choice of the activations that it changes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.fast import Edit
from mechmem.session import Session
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.registry import Component
from mechmem.spec.sweep import Swept

Names = str | tuple[str, ...]
Indices = int | tuple[int, ...]


class Intervention(Component, registry="intervention"):
    """A change of a model's activations, stated before any model is at hand."""

    @abstractmethod
    def edits(self, model: Model, examples: Examples, session: Session) -> list[Edit]:
        """The pure tensor -> tensor functions that make this change on these examples.

        Whatever is learnt from data (means, erasers) is fitted here and lives in the functions,
        never on the spec.
        """


class SiteIntervention(Intervention):
    """An intervention at the chosen layers and positions of one site; the rest is left alone."""

    site: Swept[str]
    """A name of `mechmem.sites`."""
    layer: Swept[Indices | None] = None
    """One layer or several; none for a site without layers."""
    position: Swept[Names | None] = None
    """Named positions (or `readout`, all that answer tokens are read from); every position unless
    given."""

    @abstractmethod
    def replacement(self, hook: str, model: Model, examples: Examples, session: Session) -> Any:
        """A function from the activation at this hook to what takes its place where it is
        chosen."""

    def edits(self, model: Model, examples: Examples, session: Session) -> list[Edit]:
        return [
            Edit(
                hook,
                _where(
                    self.mask(model, examples), self.replacement(hook, model, examples, session)
                ),
            )
            for hook in self.hooks(model)
        ]

    def hooks(self, model: Model) -> list[str]:
        """The hook names this touches. Raises InputError for a site or layer that the model does
        not have."""
        if self.site in sites.READ_ONLY:
            raise InputError(f"site {self.site!r} can only be read: {sites.READ_ONLY[self.site]}")
        layers = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        return [sites.checked_hook(model.cfg, self.site, layer) for layer in layers]

    def mask(self, model: Model, examples: Examples) -> Tensor:
        """Where the activation is changed, broadcastable to it."""
        site = sites.site(self.site)
        chosen = torch.ones([1] * len(site.axes), dtype=torch.bool)
        for axis, indices, size in self.choices(model, examples):
            if site.axis(axis) < 0:
                raise InputError(
                    f"site {self.site!r} has no axis {axis!r} to choose from (its axes: {site.axes})"
                )
            on = torch.zeros(size, dtype=torch.bool)
            on[torch.tensor(indices)] = True
            chosen = chosen & sites.on_axis(on, site.axis(axis), len(site.axes))
        return chosen

    def choices(self, model: Model, examples: Examples) -> list[tuple[str, list[int], int]]:
        """What is chosen on each axis that not everything is chosen on: (axis, indices, size of the
        axis)."""
        if self.position is None:
            return []
        return [("pos", position_indices(self.position, examples), examples.tokens.shape[1])]


class UnitIntervention(SiteIntervention):
    """An intervention that may be at chosen heads or neurons only."""

    head: Swept[Indices | None] = None
    """Heads, at sites that have them; every head unless given."""
    neurons: Swept[tuple[int, ...] | None] = None
    """Neurons, at `neurons` and `mlp_pre`; every neuron unless given."""

    def choices(self, model: Model, examples: Examples) -> list[tuple[str, list[int], int]]:
        choices = super().choices(model, examples)
        for axis, value, size in (
            ("head", self.head, model.cfg.n_heads),
            ("d_mlp", self.neurons, model.cfg.d_mlp),
        ):
            if value is not None:
                choices.append((axis, _checked(axis, value, size), size or 0))
        return choices


def position_indices(names: Names, examples: Examples) -> list[int]:
    """Indices of named positions. Raises InputError for a name that the task does not have."""
    found = []
    for name in (names,) if isinstance(names, str) else names:
        if name == "readout":
            found += range(examples.tokens.shape[1] - examples.n_answer, examples.tokens.shape[1])
        elif name in examples.positions:
            found.append(examples.positions[name])
        else:
            raise InputError(
                f"there is no position {name!r}; {suggest(name, [*examples.positions, 'readout'])}"
            )
    return found


def _checked(axis: str, value: Indices, size: int | None) -> list[int]:
    indices = [value] if isinstance(value, int) else list(value)
    wrong = [i for i in indices if not 0 <= i < (size or 0)]
    if wrong or not indices:
        raise InputError(
            f"{axis} {wrong or indices} is out of range: the model has 0 to {(size or 0) - 1}"
        )
    return indices


def _where(mask: Tensor, function: Any) -> Any:
    return lambda activation: torch.where(
        mask.to(activation.device), function(activation), activation
    )
