"""Experiment: the whole spec of a run as one frozen object; a YAML file and a Python call make the
same one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from pydantic import Field, GetJsonSchemaHandler, ValidationInfo, field_validator, model_validator
from pydantic_core import CoreSchema

from mechmem.analyses.analysis import Analysis
from mechmem.data.example_set import ExampleSet
from mechmem.experiment.claims import Claim, Quantity, template_fields
from mechmem.report.figures.figure import Figure
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.files import read_json
from mechmem.spec.registry import Component
from mechmem.spec.yaml_file import SpecFile
from mechmem.training.recipe import PHASES, Recipe
from mechmem.training.store import SHIPPED


def named_recipe(name: str, folder: Path | None = None) -> Recipe:
    """The recipe `trainings/NAME.yaml` beside a spec or under experiments/, or that of a shipped
    training."""
    places = [*([folder / "trainings", folder] if folder else []), Path("experiments/trainings")]
    for place in places:
        if (place / f"{name}.yaml").exists():
            return SpecFile(place / f"{name}.yaml").build(Recipe)
    for record in sorted(SHIPPED.glob(f"{name}/seed_*/training.json")):
        return Recipe.model_validate(read_json(record)["recipe"])
    known = {path.parent.parent.name for path in SHIPPED.glob("*/seed_*/training.json")}
    known |= {path.stem for place in places for path in place.glob("*.yaml")}
    raise InputError(f"there is no training {name!r}; {suggest(name, sorted(known))}")


def _recipe_by_name(value: Any, info: ValidationInfo) -> Any:
    return (
        named_recipe(value, (info.context or {}).get("folder")) if isinstance(value, str) else value
    )


class CheckpointRef(Component):
    """A checkpoint of the experiment's training, or of another one: a phase, or a step."""

    phase: str | None = None
    step: int | None = Field(None, ge=0)
    training: Recipe | None = None
    """Another training (same seed); the experiment's own unless given."""

    @model_validator(mode="before")
    @classmethod
    def _phase(cls, value: Any) -> Any:
        return {"phase": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.phase is None) == (self.step is None):
            raise ValueError(f"a checkpoint is a phase ({', '.join(PHASES)}) or `{{step: N}}`")
        if self.phase is not None and self.phase not in PHASES:
            raise ValueError(f"there is no phase {self.phase!r}; {suggest(self.phase, PHASES)}")
        return self

    _by_name = field_validator(
        "training", mode="before", json_schema_input_type=Recipe | str | None
    )(_recipe_by_name)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), {"enum": list(PHASES)}]}

    @property
    def at(self) -> str | int:
        return self.step if self.step is not None else str(self.phase)


class Experiment(Component):
    """A question, the trained models and examples that it is put to, the analyses, and what would
    count as an answer."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    question: str
    training: Recipe
    also: tuple[Recipe, ...] = ()
    """Other trainings that are put to the same analyses; rows then say whose they are in the column
    `training`."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Seeds of the model; each is a replication."""
    checkpoints: dict[str, CheckpointRef] = {}
    examples: dict[str, ExampleSet] = {}
    analyses: tuple[Analysis, ...] = Field(min_length=1)
    figures: tuple[Figure, ...] = ()
    quantities: dict[str, Quantity] = {}
    claims: tuple[Claim, ...] = ()
    answer: str = ""
    """The answer's sentence, with `{quantity.percent}` and the like in it."""
    plugins: tuple[str, ...] = ()
    """Python files, relative to the spec, whose components stand beside the built-in ones."""

    _by_name = field_validator("training", mode="before", json_schema_input_type=Recipe | str)(
        _recipe_by_name
    )

    @field_validator("also", mode="before", json_schema_input_type=tuple[Recipe | str, ...])
    @classmethod
    def _also_by_name(cls, value: Any, info: ValidationInfo) -> Any:
        return (
            [_recipe_by_name(part, info) for part in value]
            if isinstance(value, (list, tuple))
            else value
        )

    @field_validator("answer")
    @classmethod
    def _speaks_of_what_is_known(cls, answer: str, info: ValidationInfo) -> str:
        known = [
            *info.data.get("quantities", ()),
            *(claim.id for claim in info.data.get("claims", ())),
        ]
        for name in template_fields(answer):
            if name not in known:
                raise ValueError(f"the answer speaks of {name!r}; {suggest(name, known)}")
        return answer

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seed {max(self.seeds, key=self.seeds.count)} stands twice; a replication needs its own"
            )
        tables = [analysis.table_name for analysis in self.analyses]
        if len(set(tables)) < len(tables):
            raise ValueError(
                f"two analyses make the table {max(tables, key=tables.count)!r}; give one a `name:`"
            )
        for owner, name in [(f"figures.{i}", f.table) for i, f in enumerate(self.figures)] + [
            (f"quantities.{key}", q.table) for key, q in self.quantities.items()
        ]:
            if name not in tables:
                raise ValueError(f"{owner} reads the table {name!r}; {suggest(name, tables)}")
        for claim in self.claims:
            for condition in claim.holds_when:
                if condition.quantity not in self.quantities:
                    raise ValueError(
                        f"claim {claim.id} asks for {condition.quantity!r}; {suggest(condition.quantity, self.quantities)}"
                    )
        return self

    @model_validator(mode="after")
    def _checkpoints_will_be_kept(self) -> Self:
        for name, ref in self.checkpoints.items():
            training = (ref.training or self.training).optimisation
            if ref.step is not None and not training.keeps(ref.step):
                raise ValueError(
                    f"checkpoints.{name}: {(ref.training or self.training).name} keeps no checkpoint of step {ref.step}, "
                    f"only every {training.evaluate_every} up to {training.n_steps}"
                )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """The experiment of a YAML file. Raises SpecError with the place of every error."""
        file = SpecFile(Path(path), overrides)
        plugins = file.data.get("plugins")
        if isinstance(
            plugins, list
        ):  # anything else is refused with its place when the object is built
            load_plugins([name for name in plugins if isinstance(name, str)], Path(path).parent)
        return file.build(cls)

    def sweep_domain(self, recipe: Recipe) -> Mapping[str, Sequence[Any]]:
        """What `each: all` means, by field."""
        positions = next(iter(self.examples.values()), ExampleSet(n=1)).of(recipe.task).positions
        return {
            "layer": range(recipe.architecture.n_layers),
            "head": range(recipe.architecture.n_heads),
            "position": tuple(positions),
            "model": tuple(self.checkpoints),
            "examples": tuple(self.examples),
        }


PLUGINS: dict[str, Path] = {}
"""Where the plugins that were loaded stand, by their names in the spec."""


def load_plugins(names: Sequence[str], folder: Path) -> None:
    """Run Python files that add components to the registries. Raises InputError if one is missing
    or fails."""
    for name in names:
        path = folder / name
        if not path.is_file() or path.suffix != ".py":
            raise InputError(
                f"plugin {path} {'is not a .py file' if path.exists() else 'does not exist'}"
            )
        module = ModuleType(f"mechmem_plugin_{path.stem}")
        module.__file__, sys.modules[module.__name__] = (
            str(path),
            module,
        )  # known, so that its annotations resolve
        try:
            exec(
                compile(path.read_bytes(), path, "exec"), vars(module)
            )  # as it is now, whatever lies in a cache
        except Exception as error:
            raise InputError(f"plugin {path} failed: {type(error).__name__}: {error}") from error
        PLUGINS[name] = path.resolve()
