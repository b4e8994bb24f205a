"""Trainable: the parameters of a model that a training may change."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mechmem.spec.registry import Component

Trained = Literal["everything", "attn", "mlp", "w_in", "head"]
OF_HEAD = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
"""Parameters of which each head has its own, along the first axis."""


class Trainable(Component):
    """The parameters that are trained: everything, one part of a layer, or the last layers."""

    part: Trained = "everything"
    """`attn` or `mlp` of a layer, `w_in` (weights and biases into its neurons), or one `head`."""
    layer: int | None = Field(None, ge=0)
    """The layer of the part."""
    head: int | None = Field(None, ge=0)
    """The head, for `part: head`."""
    last_layers: int | None = Field(None, ge=1)
    """Train everything in this many last layers (not the final norm and the unembedding)."""

    @model_validator(mode="after")
    def _is_one_choice(self) -> Self:
        if (self.part == "everything") != (self.layer is None):
            raise ValueError("`layer` and `part` go together: name the part of one layer")
        if (self.part == "head") != (self.head is not None):
            raise ValueError("`head` goes with `part: head`")
        if self.last_layers is not None and self.part != "everything":
            raise ValueError("choose either `last_layers` or a part of one layer")
        return self

    def mask(self, name: str, parameter: Tensor, n_layers: int) -> Tensor:
        """Which elements of a parameter are trained, in a shape that broadcasts to its own.

        Args:
            name: of the parameter, as in TransformerLens.
            parameter: its values.
            n_layers: number of layers of the model.
        """
        if self.part == "head" and name in self._names():
            heads = torch.arange(len(parameter), device=parameter.device)
            return heads.eq(self.head or 0).view(-1, *[1] * (parameter.dim() - 1))
        return torch.tensor(self._is_whole(name, n_layers), device=parameter.device)

    def _is_whole(self, name: str, n_layers: int) -> bool:
        """Whether all of a parameter is trained."""
        if self.last_layers is not None:
            last = range(max(0, n_layers - self.last_layers), n_layers)
            return any(name.startswith(f"blocks.{layer}.") for layer in last)
        if self.part in ("attn", "mlp"):
            return name.startswith(f"blocks.{self.layer}.{self.part}.")
        return self.part == "everything" or (self.part == "w_in" and name in self._names())

    def _names(self) -> tuple[str, ...]:
        block = f"blocks.{self.layer}"
        if self.part == "head":
            return tuple(f"{block}.attn.{name}" for name in OF_HEAD)
        return (f"{block}.mlp.W_in", f"{block}.mlp.b_in")
