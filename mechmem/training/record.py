"""What the record of a training and the note of an interrupted one must hold."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Step = Annotated[int, Field(ge=0, strict=True)]
Checksums = dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
"""By the name of a checkpoint's file, its SHA-256."""


class Row(BaseModel):
    """One evaluation: the four curves (fractions)."""

    model_config = ConfigDict(extra="forbid")

    step: Step
    clean: Share
    memorised: Share
    corrected: Share
    held_out: Share


class Curves(BaseModel):
    """Evaluations in their order."""

    curves: list[Row] = Field(min_length=1)
    checkpoints: Checksums = {}
    """Records of version 0.2 have none."""
    seconds: float = Field(0.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        steps = [row.step for row in self.curves]
        if steps != sorted(set(steps)):
            raise ValueError("the steps of the curves must increase")
        return self


class TrainingRecord(Curves):
    """training.json."""

    recipe: dict[str, Any]
    seed: Step
    provenance: dict[str, Any] = {}


class StateNote(Curves):
    """The note of state.safetensors: how far an interrupted training was."""

    step: Step

    @model_validator(mode="after")
    def _ends_here(self) -> Self:
        if self.curves[-1].step != self.step:
            raise ValueError(f"the curves end at step {self.curves[-1].step}, not at {self.step}")
        return self
