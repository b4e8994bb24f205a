"""Tape: what an edit of a forward leaves for a later edit of the same forward.

An edit sees its own activation only. Where a component is to be computed anew from the model's own
input to it, one edit at that input changes nothing but works out the new activation and leaves it
on a tape, and an edit at the component's output takes it off again. So every forward must pass
both, in this order; session.logits() and applied() do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mechmem.models.architecture import Model
from mechmem.models.fast import Edit, forward

Residual = Float[Tensor, "batch pos d_model"]


class Tape(dict[str, Tensor]):
    """Activations by hook, each left there by an earlier edit of a forward and taken off by a later
    one."""

    def listen(self, hook: str, work_out: Callable[[Tensor], Mapping[str, Tensor]]) -> Edit:
        """An edit that changes nothing, and leaves what `work_out` makes of the activation."""

        def heard(activation: Tensor) -> Tensor:
            self.update(work_out(activation))
            return activation

        return Edit(hook, heard)

    def play(self, hook: str, mask: Tensor | None = None) -> Edit:
        """An edit that puts in the place of an activation what was left for it, where the mask says
        so."""
        chosen = torch.ones(1, dtype=torch.bool) if mask is None else mask
        return Edit(
            hook,
            lambda activation: torch.where(
                chosen.to(activation.device), self.pop(hook), activation
            ),
        )


def in_attention(model: Model, layer: int, resid: Residual, hooks: list[str]) -> dict[str, Tensor]:
    """Activations at hooks of a layer's attention if `resid` is the residual stream before it."""
    return _captured(model, layer, resid, [], hooks)


def in_mlp(model: Model, layer: int, resid: Residual, hooks: list[str]) -> dict[str, Tensor]:
    """Activations at hooks of a layer's MLP if `resid` is the residual stream before it (after
    attention)."""
    return _captured(
        model, layer, resid, [Edit(f"blocks.{layer}.hook_attn_out", torch.zeros_like)], hooks
    )


def at_the_end(model: Model, resid: Residual) -> dict[str, Tensor]:
    """The logits if `resid` is the last residual stream."""
    return _captured(model, model.cfg.n_layers, resid, [], ["unembed.hook_out"])


def _captured(
    model: Model, layer: int, resid: Residual, edits: list[Edit], hooks: list[str]
) -> dict[str, Tensor]:
    tokens = torch.zeros(
        resid.shape[:2], dtype=torch.long, device=resid.device
    )  # not read: the forward starts later
    return forward(model, tokens, 0, edits, hooks, start=(layer, resid))[1]
