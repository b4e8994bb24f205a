"""Recipe: the task, architecture and optimisation of a training, and the phases of its curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mechmem.data.seeds import PARTS, Part, derived, seeded
from mechmem.data.tasks.task import Task
from mechmem.models.architecture import Architecture, Model
from mechmem.models.device import Device
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.files import digest, read_json
from mechmem.spec.limits import Instances, Name, Steps, check_name
from mechmem.spec.registry import Component
from mechmem.spec.yaml_file import SpecFile
from mechmem.training.plants.plant import Plant
from mechmem.training.trainable import Trainable

Beta = Annotated[float, Field(ge=0, lt=1)]
PHASES = ("initial", "before", "generalised", "memorised", "final")
"""The moments of a training that a checkpoint can be named by: `before` is the evaluated step with
most corrected answers, `generalised` and `memorised` are the first at which their conditions hold.
"""
SHIPPED = Path(__file__).parents[1] / "shipped"


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

    n_steps: Steps = 4000
    batch_size: Instances = 500
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    weight_decay: float = Field(0.01, ge=0)
    n_warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 100
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_factor: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of a schedule, as a share of `learning_rate`."""
    max_grad_norm: float = Field(1.0, gt=0)
    evaluate_every: Steps = 100
    """Steps between two points of the curves, each with a checkpoint."""
    n_evaluated: Instances = 2000
    """Instances of each group on which the curves are measured, at most."""
    noisy_share: float | None = Field(None, gt=0, lt=1)
    """Share of each batch that are noisy instances; by default, they come as often as others."""
    generalised: Phase = Phase(held_out=0.95)
    """When the rule is known; by held-out accuracy alone, so that claims about noisy instances at
    this moment are not true by definition."""
    memorised: Phase = Phase(memorised=0.98)
    stop_at: Phase | None = None
    """Stop early once this held at `patience` successive evaluations; None trains all `n_steps`."""
    patience: Steps = 1
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
        most = max(curves, key=lambda row: row["corrected"])  # of equal ones the first
        found["before"] = int(most["step"]) if most["corrected"] else None
        for name in ("generalised", "memorised"):
            phase: Phase = getattr(self, name)
            found[name] = next((int(row["step"]) for row in curves if phase.is_met(row)), None)
        return found | {"final": int(curves[-1]["step"])}


class Start(Component):
    """A checkpoint of another training, of the same seed, from which a training starts."""

    training: Recipe
    """The other training, or its name."""
    at: str | int = "final"
    """A phase or a step of it."""

    @field_validator("training", mode="before", json_schema_input_type=dict[str, Any] | str)
    @classmethod
    def _by_name(cls, value: Any, info: ValidationInfo) -> Any:
        return recipe_by_name(value, info)


class Recipe(Component):
    """A training to be made: the task with its noise, the architecture and the optimisation."""

    name: Name = "training"
    task: Task
    architecture: Architecture = Architecture()
    optimisation: Optimisation = Optimisation()
    true_labels: bool | Phase = False
    """Whether to train on the true labels, or until when. Noisy instances and their given labels
    are still there to be evaluated on: `true` makes the twin without noise."""
    start: Start | None = None
    """The checkpoint to start from; by default, new weights."""
    trainable: Trainable = Trainable()
    """The parameters that are trained; the others stay as they start."""
    plant: Plant | None = None
    """Builds the trained weights from those of `start` instead of training them."""
    vary: tuple[Part, ...] = PARTS
    """What differs between seeds."""

    @model_validator(mode="after")
    def _fits_its_start(self) -> Self:
        if self.plant is not None and (self.start is None or self.optimisation.n_steps != 1):
            raise ValueError("a plant needs `start:` and `optimisation: {n_steps: 1}`")
        if self.start is not None and self.plant is None:
            theirs = self.start.training.architecture
            if theirs != self.architecture:
                raise ValueError(
                    f"the architecture must be that of {self.start.training.name}, from which "
                    f"this training starts: {theirs.block()}"
                )
        return self

    @property
    def recipe_hash(self) -> str:
        """The hash of everything that decides the weights except the seed.

        Names, phases and the device are left out, but phases count in a training from which
        another one starts at a phase.
        """
        return digest(self._decisive())

    def _decisive(self) -> dict[str, Any]:
        block = self.block()
        del block["name"]
        for key in ("generalised", "memorised", "device"):
            del block["optimisation"][key]
        if self.start is not None:
            theirs = self.start.training
            named = theirs.optimisation.block()
            phase = named.get(self.start.at) if isinstance(self.start.at, str) else None
            block["start"] = [theirs._decisive(), self.start.at, phase]
        return block

    def task_of(self, seed: int) -> Task:
        """The task as this seed draws it."""
        return seeded(self.task, seed, self.vary)

    def seed_of(self, part: Part, seed: int) -> int:
        """The seed of the weights or of the batches in a replication."""
        return derived(seed, part) if part in self.vary else 0

    def build(self, seed: int) -> Model:
        """The untrained model."""
        return self.architecture.build(
            len(self.task.vocabulary), self.task.n_context, self.seed_of("weights", seed)
        )

    def has_true_labels(self, curves: list[dict[str, Any]]) -> bool:
        """Whether the next step is trained on the true labels, after these evaluations."""
        if isinstance(self.true_labels, bool):
            return self.true_labels
        return not any(self.true_labels.is_met(row) for row in curves)


def named_recipe(name: str, folder: Path | None = None, files: tuple[Path, ...] = ()) -> Recipe:
    """A recipe by its name: the first of `trainings/NAME.yaml` next to the spec, `NAME.yaml` next
    to it, `trainings/NAME.yaml` one folder up, and the shipped training of this name. The working
    directory does not matter.

    Args:
        name: of the recipe's file or of a shipped training.
        folder: of the spec that names it; without it, only shipped trainings are found.
        files: the specs that are being read, each because the one before it names it.

    Raises:
        InputError: there is no such training, or it starts from itself.
    """
    check_name(name, "training")
    places = _places_of(folder)
    for place in places:
        path = place / f"{name}.yaml"
        if not path.exists():
            continue
        if path.resolve() in files[1:]:
            raise InputError(f"{path} starts from itself; name another training")
        # An experiment may have the name of its training: it is not meant here.
        if path.resolve() not in files and is_training(file := SpecFile(path)):
            return file.build(Recipe, files)
    for record in sorted((SHIPPED / name).glob("seed_*/training.json")):
        return Recipe.model_validate(read_json(record)["recipe"])
    known = {path.parent.parent.name for path in SHIPPED.glob("*/seed_*/training.json")}
    known |= {path.stem for place in places for path in place.glob("*.yaml")}
    why = "" if folder is not None else " (from Python only shipped ones have a name)"
    raise InputError(f"there is no training {name!r}{why}; {suggest(name, sorted(known))}")


def is_training(file: SpecFile) -> bool:
    """Whether a spec is a recipe, not an experiment."""
    return "task" in file.data


def _places_of(folder: Path | None) -> list[Path]:
    """Where a spec in this folder looks for trainings: next to it, and one folder up."""
    if folder is None:
        return []
    return [folder / "trainings", folder, folder.parent / "trainings"]


def recipe_by_name(value: Any, info: ValidationInfo) -> Any:
    """The recipe that a field of a spec names; anything but a name is returned as it is."""
    if not isinstance(value, str):
        return value
    context = info.context or {}
    return named_recipe(value, context.get("folder"), context.get("files", ()))


Start.model_rebuild()
Recipe.model_rebuild()
