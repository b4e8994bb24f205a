"""References: the checkpoints and example sets of the experiment that a component names.

A field with such a name is declared as a `CheckpointName` or an `ExampleSetName`. Both are strings
in YAML and in Python; the type distinguishes references from other strings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self, get_args

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from mechmem.spec.sweep import Each


class _Name(str):
    """A string that pydantic converts to this class."""

    __slots__ = ()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


class CheckpointName(_Name):
    """The name of a checkpoint under the experiment's `checkpoints:`."""

    __slots__ = ()


class ExampleSetName(_Name):
    """The name of an example set under the experiment's `examples:`."""

    __slots__ = ()


@dataclass(frozen=True)
class References:
    """The checkpoints and example sets that a component or value names."""

    checkpoints: frozenset[str] = frozenset()
    examples: frozenset[str] = frozenset()
    every_checkpoint: bool = False
    """Whether a checkpoint is swept with `{each: all}`, which refers to all of the experiment."""
    every_example_set: bool = False
    """Whether an example set is swept with `{each: all}`."""

    def __or__(self, other: References) -> Self:
        return type(self)(
            self.checkpoints | other.checkpoints,
            self.examples | other.examples,
            self.every_checkpoint or other.every_checkpoint,
            self.every_example_set or other.every_example_set,
        )

    def within(self, checkpoints: Collection[str], examples: Collection[str]) -> Self:
        """The same references with `{each: all}` replaced by the names in an experiment.

        Args:
            checkpoints: names of all its checkpoints.
            examples: names of all its example sets.
        """
        return type(self)(
            self.checkpoints | frozenset(checkpoints if self.every_checkpoint else ()),
            self.examples | frozenset(examples if self.every_example_set else ()),
        )


def references_of(value: Any) -> References:
    """The references in a field's value: a name, a component, or a container of these."""
    if isinstance(value, CheckpointName):
        return References(checkpoints=frozenset([str(value)]))
    if isinstance(value, ExampleSetName):
        return References(examples=frozenset([str(value)]))
    if isinstance(value, Each):
        return references_of(value.each)
    if isinstance(value, BaseModel):
        return value.references() if hasattr(value, "references") else references_of_fields(value)
    if isinstance(value, Mapping):
        return _union(value.values())
    return _union(value) if isinstance(value, (tuple, list, frozenset)) else References()


def references_of_fields(model: BaseModel) -> References:
    """The references in the fields of a component and of its nested components."""
    found = References()
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        found |= references_of(value)
        if isinstance(value, Each) and value.each == "all":
            # The string `all` has no type: its meaning depends on the field's declared type.
            found |= References(
                every_checkpoint=_allows(field.annotation, CheckpointName),
                every_example_set=_allows(field.annotation, ExampleSetName),
            )
    return found


def _union(values: Any) -> References:
    found = References()
    for value in values:
        found |= references_of(value)
    return found


def _allows(annotation: Any, name: type[_Name]) -> bool:
    """Whether this type is `name` or contains it, as in `Swept[X | None]`."""
    generic = getattr(annotation, "__pydantic_generic_metadata__", {})
    parts = (*get_args(annotation), *generic.get("args", ()))
    return annotation is name or any(_allows(part, name) for part in parts)
