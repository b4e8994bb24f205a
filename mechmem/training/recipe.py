"""Recipe: the task, architecture and optimisation of a training, and the phases of its curves."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from mechmem.data.tasks.task import Task
from mechmem.models.architecture import Architecture, Model
from mechmem.models.device import Device
from mechmem.spec.files import digest
from mechmem.spec.registry import Component

Beta = Annotated[float, Field(ge=0, lt=1)]
PHASES = ("initial", "generalised", "memorised", "final")
"""The moments of a training that a checkpoint can be named by."""


class Phase(Component):
    """A moment of training: the first evaluated step at which all of these hold (fractions)."""

    held_out: float = Field(0.0, ge=0, le=1)
    corrected: float = Field(0.0, ge=0, le=1)
    memorised: float = Field(0.0, ge=0, le=1)
    memorised_at_most: float = Field(1.0, ge=0, le=1)

    def is_met(self, row: dict[str, float]) -> bool:
        reached = all(
            row[curve] >= getattr(self, curve) for curve in ("held_out", "corrected", "memorised")
        )
        return reached and row["memorised"] <= self.memorised_at_most


class Optimisation(Component):
    """How a model is trained: AdamW on the answer tokens, with warm-up, a schedule and clipped
    gradients."""

    n_steps: int = Field(4000, ge=1)
    batch_size: int = Field(500, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    weight_decay: float = Field(0.01, ge=0)
    n_warmup_steps: int = Field(100, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_factor: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of a schedule, as a share of `learning_rate`."""
    max_grad_norm: float = Field(1.0, gt=0)
    evaluate_every: int = Field(100, ge=1)
    """Steps between two points of the curves, each with a checkpoint."""
    n_evaluated: int = Field(2000, ge=1)
    """Instances of each group on which the curves are measured, at most."""
    generalised: Phase = Phase(held_out=0.95, corrected=0.9)
    memorised: Phase = Phase(memorised=0.98)
    stop_at: Phase | None = None
    """Stop early once this held at `patience` successive evaluations; None trains all `n_steps`."""
    patience: int = Field(1, ge=1)
    device: Device = "auto"
    """Where it is trained; `auto` is CUDA or MPS where there is one, else the CPU."""

    def schedule_factor(self, step: int) -> float:
        """Learning rate at a step, as a share of `learning_rate`."""
        warm = min(1.0, (step + 1) / max(self.n_warmup_steps, 1))
        done = step / self.n_steps
        falling = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }[self.schedule]
        return warm * (self.final_factor + (1 - self.final_factor) * falling)

    def keeps(self, step: int) -> bool:
        """Whether a checkpoint is written at this step, if training gets that far."""
        return step == self.n_steps or (step < self.n_steps and step % self.evaluate_every == 0)

    def phases(self, curves: list[dict[str, Any]]) -> dict[str, int | None]:
        """The step of each phase; None for a phase that was never reached."""
        found: dict[str, int | None] = {"initial": int(curves[0]["step"])}
        for name in ("generalised", "memorised"):
            phase: Phase = getattr(self, name)
            found[name] = next((int(row["step"]) for row in curves if phase.is_met(row)), None)
        return found | {"final": int(curves[-1]["step"])}


class Recipe(Component):
    """A training to be made: the task with its noise, the architecture and the optimisation."""

    name: str = Field("training", pattern=r"^[A-Za-z0-9_.-]+$")
    task: Task
    architecture: Architecture = Architecture()
    optimisation: Optimisation = Optimisation()

    @property
    def recipe_hash(self) -> str:
        """The hash of everything that decides the weights except the seed.

        Name, phases and device are left out.
        """
        block = self.block()
        del block["name"]
        for key in ("generalised", "memorised", "device"):
            del block["optimisation"][key]
        return digest(block)

    def build(self, seed: int) -> Model:
        """The untrained model."""
        return self.architecture.build(len(self.task.vocabulary), self.task.n_context, seed)
