"""Edits: a change of one activation, stated as a hook, positions, units and a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mechmem.spec.errors import InputError

EditFunction = Callable[[Tensor, Int[Tensor, " batch"]], Tensor]
"""(own copy of the chosen part of an activation, row numbers) -> what takes its place."""
LATE = 10**6
"""The layer of hooks after the last layer."""


@dataclass(frozen=True, eq=False)
class At:
    """Where an activation is read or changed: resolved for one set of examples, without names."""

    hook: str
    """TransformerLens's name of the hook."""
    pos: Int[Tensor, "n k"] | Int[Tensor, "1 k"] | None = None
    """Positions of each example, or of all of them (one row); -1 for none. None: every position."""
    units: tuple[int, ...] | None = None
    """Heads or neurons; None: every one."""

    @property
    def layer(self) -> int:
        """Layer of the hook; -1 before the first, `LATE` after the last."""
        return layer_of(self.hook)

    @property
    def is_whole(self) -> bool:
        """Whether every position and unit is meant."""
        return self.pos is None and self.units is None

    def take(self, activation: Tensor, rows: Int[Tensor, " batch"]) -> Tensor:
        """A copy of the chosen part, in the order of axes of the activation.

        Where an example has no such position, the value is that of its first position.
        """
        pos_axis, unit_axis = axes_of(self.hook)
        part = activation
        if self.pos is not None:
            chosen = self._positions(rows).to(part.device)
            if len(chosen) == 1 and (chosen >= 0).all():
                part = part.index_select(pos_axis, chosen[0])
            else:
                index = _laid_out(chosen.clamp_min(0), part, pos_axis)
                part = part.gather(pos_axis, index)
        if self.units is not None:
            part = part.index_select(unit_axis, torch.tensor(self.units, device=part.device))
        return part.clone() if self.is_whole else part

    def put(self, activation: Tensor, part: Tensor, rows: Int[Tensor, " batch"]) -> Tensor:
        """A new tensor: the activation with the chosen part replaced.

        Args:
            activation: the whole activation; it is left as it is.
            part: of the shape that `take` gives.
            rows: numbers of the rows of `activation` in the set of examples.
        """
        pos_axis, unit_axis = axes_of(self.hook)
        if self.units is not None:
            units = torch.tensor(self.units, device=activation.device)
            every_unit = At(self.hook, self.pos).take(activation, rows)
            part = every_unit.index_copy(unit_axis, units, part)
        if self.pos is None:
            return part
        chosen = self._positions(rows).to(activation.device)
        if len(chosen) == 1 and (chosen >= 0).all():
            return activation.index_copy(pos_axis, chosen[0], part)
        # An example without the position must stay as it is, so only existing ones are written.
        chosen = chosen.expand(len(activation), -1)
        row, column = (chosen >= 0).nonzero(as_tuple=True)
        changed = activation.clone()
        if pos_axis == 1:
            changed[row, chosen[row, column]] = part[row, column]
        else:
            changed[row, :, chosen[row, column]] = part[row, :, column]
        return changed

    def known(self, part: Tensor, rows: Int[Tensor, " batch"]) -> Tensor:
        """The taken part, with NaN where an example does not have the position."""
        if self.pos is None or not (self.pos < 0).any():
            return part
        is_missing = (self._positions(rows) < 0).to(part.device)
        shape = [1] * part.ndim
        shape[0], shape[axes_of(self.hook)[0]] = is_missing.shape
        return part.masked_fill(is_missing.reshape(shape), float("nan"))

    def mean(self, part: Tensor) -> Tensor:
        """The mean over the examples that have the position, `1 ...`."""
        if self.pos is not None and (self.pos < 0).any():
            return part.nanmean(dim=0, keepdim=True)  # missing ones are NaN
        return part.mean(dim=0, keepdim=True)

    def _positions(self, rows: Int[Tensor, " batch"]) -> Int[Tensor, "one_or_batch k"]:
        assert self.pos is not None
        return self.pos if len(self.pos) == 1 else self.pos[rows.to(self.pos.device)]


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of one activation. Its function works on a copy of its own.

    So a function that edits in place gives what one gives that returns a new tensor, touches the
    chosen positions only, and leaves weights and caches alone.
    """

    at: At
    function: EditFunction
    rowwise: bool = True
    """Whether each row is changed without a look at the others. If not, rows are never run
    apart."""
    constant: Tensor | None = None
    """The new value where it is known beforehand, `n ...` or `1 ...`: fast routes make use of
    it."""
    only_reads: bool = False
    """Whether the function never changes what it is given, and so needs no copy of it."""

    @property
    def hook(self) -> str:
        return self.at.hook

    @property
    def layer(self) -> int:
        """Layer of the hook; -1 before the first, `LATE` after the last."""
        return self.at.layer

    def __call__(self, activation: Tensor, rows: Int[Tensor, " batch"]) -> Tensor:
        """The edited activation, a new tensor. Raises InputError for a part of another shape."""
        needs_copy = not (self.only_reads and self.at.is_whole)
        own = self.at.take(activation, rows) if needs_copy else activation
        shape, dtype = own.shape, own.dtype
        part = self.function(own, rows)
        if not isinstance(part, Tensor) or part.shape != shape:
            found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise InputError(
                f"the edit at {self.hook} returned {found} for {tuple(shape)}: "
                "it must return a tensor of the shape that it is given"
            )
        part = part.to(dtype)
        if not needs_copy:
            part = part.contiguous()  # it may be expanded, which some products refuse
        elif self.at.is_whole and part is not own:
            # It may be expanded, which some products refuse, or a tensor that someone keeps.
            part = part.clone(memory_format=torch.contiguous_format)
        return self.at.put(activation, part, rows)


def replacing(at: At, value: Tensor, source: str = "the source") -> Edit:
    """The edit that puts a known value in the place of an activation.

    Args:
        at: where.
        value: of the shape of the chosen part, `n ...`, or `1 ...` for all examples alike.
        source: how an error calls where the value is from.
    """

    def replaced(own: Tensor, rows: Int[Tensor, " batch"]) -> Tensor:
        chosen = value if len(value) == 1 else value[rows.to(value.device)]
        if chosen.shape[1:] != own.shape[1:]:
            raise InputError(
                f"at {at.hook} {source} has shape {tuple(chosen.shape)}, the edited model "
                f"{tuple(own.shape)}: they must be of one architecture and read as many positions"
            )
        return chosen.to(own).expand_as(own)

    return Edit(at, replaced, constant=value, only_reads=True)


def lacks(value: Tensor, at: At) -> bool:
    """Whether a value has nothing (NaN) at a position that the edited example has.

    Args:
        value: of the shape of the chosen part, `n ...`, or `1 ...` for all examples alike.
        at: where it is to be put.
    """
    if at.pos is None or not value.isnan().any():
        return False
    by_position = value.isnan().movedim(axes_of(at.hook)[0], 1).flatten(2).any(dim=2).cpu()
    return bool((by_position & (at.pos >= 0).cpu()).any())


def layer_of(hook: str) -> int:
    """Layer of a hook; -1 before the first layer, `LATE` after the last."""
    if hook.startswith("blocks."):
        return int(hook.split(".")[1])
    return LATE if hook.startswith(("ln_final", "unembed")) else -1


def axes_of(hook: str) -> tuple[int, int]:
    """The axes of positions and of units (heads, neurons) of the activation at a hook.

    Attention patterns and scores are `batch head pos key_pos`, all others `batch pos ...`.
    """
    return (2, 1) if hook.endswith(("hook_pattern", "hook_attn_scores")) else (1, 2)


def norms(part: Tensor, hook: str) -> Tensor:
    """The Euclidean norm of a part of an activation at each position of each example, over all its
    other axes, which keep size 1."""
    others = [axis for axis in range(1, part.ndim) if axis != axes_of(hook)[0]]
    return part.pow(2).sum(others, keepdim=True).sqrt()


def _laid_out(positions: Int[Tensor, "batch k"], like: Tensor, axis: int) -> Tensor:
    """The positions along one axis of an index for `gather`, the same for all that they choose."""
    shape = [1] * like.ndim
    shape[0], shape[axis] = positions.shape
    size = list(like.shape)
    size[axis] = positions.shape[1]
    return positions.reshape(shape).expand(size)
