"""Experiment: the whole spec of a run as one frozen object; a YAML file and a Python call make the
same one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from mechmem.analyses.analysis import Analysis
from mechmem.data.example_set import ExampleSet
from mechmem.experiment.claims import Claim
from mechmem.experiment.quantities import Quantity
from mechmem.experiment.sentence import template_fields
from mechmem.report.figures.figure import Figure
from mechmem.spec.errors import InputError, error_details, suggest
from mechmem.spec.limits import Name, Seeds
from mechmem.spec.references import References
from mechmem.spec.registry import Component
from mechmem.spec.size import Size
from mechmem.spec.yaml_file import SpecFile
from mechmem.training.recipe import PHASES, Recipe, recipe_by_name


class CheckpointRef(Component):
    """A checkpoint of the experiment's training, or of another one: a phase, or a step."""

    phase: str | None = None
    step: int | None = Field(None, ge=0)
    same_step_as: str | None = None
    """A phase of the experiment's own training, at whose step the other `training` is taken."""
    training: Recipe | None = None
    """Another training, of the same seed; by default, the experiment's own."""

    @model_validator(mode="before")
    @classmethod
    def _phase(cls, value: Any) -> Any:
        return {"phase": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(x is not None for x in (self.phase, self.step, self.same_step_as)) != 1:
            raise ValueError(f"a checkpoint is a phase ({', '.join(PHASES)}) or `{{step: N}}`")
        phase = self.phase or self.same_step_as
        if phase is not None and phase not in PHASES:
            raise ValueError(f"there is no phase {phase!r}; {suggest(phase, PHASES)}")
        if self.same_step_as is not None and self.training is None:
            raise ValueError(
                "`same_step_as` takes another training at the step of a phase of the experiment's "
                "own; name that `training`, or use `phase`"
            )
        return self

    _by_name = field_validator(
        "training", mode="before", json_schema_input_type=Recipe | str | None
    )(recipe_by_name)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), {"enum": list(PHASES)}]}

    @property
    def at(self) -> str | int:
        return self.step if self.step is not None else str(self.phase)


class Experiment(Component):
    """A question, the trained models and examples that it is asked of, the analyses, and the claims
    that would answer it."""

    name: Name
    question: str
    training: Recipe
    also: tuple[Recipe, ...] = ()
    """Other trainings for the same analyses; the column `training` then names that of each row."""
    seeds: Seeds = Field((0,), min_length=1)
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
    """Python files, relative to the spec, that define further components."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the analyses run; `auto` takes CUDA, else MPS, else the CPU. Recipes have their own."""
    memory: Size = Field(2 * 2**30, ge=2**20)
    """Memory that the analyses may use for activations, such as `2 GiB`; at least 1 MiB."""
    backend: Literal["auto", "hooked", "fast"] = "auto"
    """How models are run: `hooked` is TransformerLens's own forward, `fast` is ours, and `auto`
    takes `fast` for the models that it supports."""

    _by_name = field_validator("training", mode="before", json_schema_input_type=Recipe | str)(
        recipe_by_name
    )

    @field_validator("also", mode="before", json_schema_input_type=tuple[Recipe | str, ...])
    @classmethod
    def _also_by_name(cls, value: Any, info: ValidationInfo) -> Any:
        return (
            [recipe_by_name(part, info) for part in value]
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
                raise ValueError(
                    f"the answer template refers to unknown quantity {name!r}; "
                    f"{suggest(name, known)}"
                )
        return answer

    @model_validator(mode="after")
    def _tables_and_quantities_exist(self) -> Self:
        tables = [analysis.table_name for analysis in self.analyses]
        if len(set(tables)) < len(tables):
            twice = max(tables, key=tables.count)
            raise ValueError(f"two analyses make the table {twice!r}; give one a `name:`")
        readers = {f"figures.{i}": figure.table for i, figure in enumerate(self.figures)}
        readers |= {
            f"quantities.{name}": q.table
            for name, q in self.quantities.items()
            if q.table is not None
        }
        for reader, table in readers.items():
            if table not in tables:
                raise ValueError(f"{reader} reads the table {table!r}; {suggest(table, tables)}")
        known = self.quantities
        named = [
            (f"claim {claim.id}", name) for claim in self.claims for _, name in claim.quantities()
        ]
        named += [(f"quantity {by}", name) for by, q in known.items() for name in q.names]
        for by, name in named:
            if name not in known:
                raise ValueError(
                    f"{by} refers to unknown quantity {name!r}; {suggest(name, known)}"
                )
        for name in known:
            if name in self.quantities_behind(known[name].names):
                raise ValueError(f"quantity {name} is made from itself")
        return self

    def quantities_behind(self, names: Iterable[str]) -> frozenset[str]:
        """These quantities, and those that they are made from."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.quantities[name].names
        return frozenset(found)

    @model_validator(mode="after")
    def _checkpoints_will_be_kept(self) -> Self:
        for name, ref in self.checkpoints.items():
            recipe = ref.training or self.training
            training = recipe.optimisation
            if ref.step is not None and not training.keeps(ref.step):
                raise ValueError(
                    f"checkpoints.{name}: {recipe.name} keeps no checkpoint of step {ref.step}, "
                    f"only every {training.evaluate_every} up to {training.n_steps}"
                )
            own = self.training.optimisation
            if ref.same_step_as is not None and own.evaluate_every % training.evaluate_every:
                raise ValueError(
                    f"checkpoints.{name}: {recipe.name} is kept every {training.evaluate_every} "
                    f"steps, so it lacks steps of {self.training.name}, which is kept every "
                    f"{own.evaluate_every}"
                )
        return self

    @model_validator(mode="after")
    def _everything_is_used(self) -> Self:
        """A name that nothing uses is most likely misspelt, in its declaration or where it should
        be used; the run would answer another question than the one that was meant."""
        errors = [
            error_details("unused", text, place, place[-1])
            for kind in ("checkpoints", "examples")
            for place, text in self._unused(kind)
        ]
        if errors:
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self

    def _unused(self, kind: str) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """The place and the text of an error for every checkpoint or example set without a use."""
        declared = getattr(self, kind)
        uses = [_mentioned(analysis, self, kind) for analysis in self.analyses]
        used = frozenset().union(*uses)
        what = "checkpoint" if kind == "checkpoints" else "example set"
        for name in [name for name in declared if name not in used]:
            misspelt = difflib.get_close_matches(name, sorted(used - set(declared)), n=1)
            if misspelt:
                at = next(i for i, names in enumerate(uses) if misspelt[0] in names)
                text = f"there is no {what} {misspelt[0]!r}; did you mean {name!r}?"
                yield ("analyses", at), text
            else:
                near = difflib.get_close_matches(name, sorted(used & set(declared)), n=1)
                hint = f"did you mean {near[0]!r}?" if near else "use it or remove it"
                yield (kind, name), f"no analysis uses the {what} {name!r}; {hint}"

    def references_of(self, analysis: Analysis) -> References:
        """The declared checkpoints and example sets that an analysis refers to."""
        return References(
            _mentioned(analysis, self, "checkpoints") & set(self.checkpoints),
            _mentioned(analysis, self, "examples") & set(self.examples),
        )

    @classmethod
    def from_yaml(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        on_plugins: Callable[[Sequence[str]], None] = lambda _: None,
    ) -> Experiment:
        """The experiment of a YAML file, whose plug-ins are executed.

        Args:
            path: of the file.
            overrides: `key.sub=value`, in the order in which they apply.
            on_plugins: is called with the names of the plug-ins, if there are any, before they are
                executed; what it raises prevents that.

        Raises:
            SpecError: with the place of every error.
            InputError: a plug-in is missing, lies outside of the spec's folder, or fails.
        """
        file = SpecFile(Path(path), overrides)
        plugins = file.data.get("plugins")
        if isinstance(
            plugins, list
        ):  # anything else is refused with its place when the object is built
            names = [name for name in plugins if isinstance(name, str)]
            load_plugins(names, Path(path).parent, on_plugins)
        return file.build(cls)

    def recipes(self) -> Iterator[tuple[dict[str, Any], Recipe]]:
        """Every training without its seed: the swept values of the recipe, and the recipe."""
        for training in (self.training, *self.also):
            named = {"training": training.name} if self.also else {}
            for labels, recipe in training.expand({}):
                yield named | labels, recipe

    def trainings(self) -> Iterator[tuple[dict[str, Any], Recipe, int]]:
        """Every training: the swept values of the recipe, the recipe, and the seed."""
        for labels, recipe in self.recipes():
            for seed in self.seeds:
                yield labels, recipe, seed

    def sweep_domain(self, recipe: Recipe) -> Mapping[str, Sequence[Any]]:
        """By the name of a field, the values that `each: all` stands for."""
        positions = next(iter(self.examples.values()), ExampleSet(n=1)).of(recipe.task).positions
        return {
            "layer": range(recipe.architecture.n_layers),
            "head": range(recipe.architecture.n_heads),
            "position": tuple(positions),
            "model": tuple(self.checkpoints),
            "examples": tuple(self.examples),
        }


def _mentioned(analysis: Analysis, experiment: Experiment, kind: str) -> frozenset[str]:
    """The names of checkpoints or of example sets that an analysis mentions, declared or not."""
    found = analysis.references().within(experiment.checkpoints, experiment.examples)
    return getattr(found, kind)


PLUGINS: dict[str, Path] = {}
"""The files of the plug-ins that were loaded, by their names in the spec."""


def _is_below(path: Path, folder: Path) -> bool:
    try:
        whole = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a null byte, or a circle of links
        return False
    # An absolute name replaces the folder when it is joined to it.
    is_named_below = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
    return is_named_below and whole.is_relative_to(folder.resolve())


def _plugin_file(name: str, folder: Path) -> Path:
    path = folder / name
    if not _is_below(path, folder):
        raise InputError(
            f"plugin {name} lies outside of {folder}, the folder of its spec; copy it there"
        )
    if not path.is_file() or path.suffix != ".py":
        raise InputError(
            f"plugin {path} {'is not a .py file' if path.exists() else 'does not exist'}"
        )
    return path


def load_plugins(
    names: Sequence[str],
    folder: Path,
    on_plugins: Callable[[Sequence[str]], None] = lambda _: None,
) -> None:
    """Execute Python files that define components.

    Args:
        names: of the files, relative to the folder.
        folder: of the spec.
        on_plugins: is called with the names, if there are any, before the first is executed.

    Raises:
        InputError: one is missing, lies outside of the folder (also by a link), or fails.
    """
    paths = {name: _plugin_file(name, folder) for name in names}
    if names:
        on_plugins(names)
    for name, path in paths.items():
        module = ModuleType(f"mechmem_plugin_{path.stem}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # so that its annotations can be resolved
        try:
            # Not import_module: that might take an older version from a cache of bytecode.
            exec(compile(path.read_bytes(), path, "exec"), vars(module))
        except Exception as error:
            raise InputError(f"plugin {path} failed: {type(error).__name__}: {error}") from error
        PLUGINS[name] = path.resolve()
