"""Component: the frozen base class of every part of a spec.

A registry (task, label noise, intervention, measure, analysis, figure ...) is an abstract subclass
made with `class Task(Component, registry="task")`. Every concrete subclass of a registry registers
itself by its `kind`, the snake_case of its class name, so a YAML block `{kind: patch_grid, ...}`
and `PatchGrid(...)` make the same object.
"""

from __future__ import annotations

import inspect
import itertools
import math
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from mechmem.spec.errors import InputError, custom_error, error_details, format_error, suggest
from mechmem.spec.files import digest
from mechmem.spec.limits import MOST_CELLS
from mechmem.spec.references import References, references_of_fields
from mechmem.spec.sweep import Each, repeated


class Component(BaseModel):
    """A frozen, hashable part of a spec. Two components are equal if their fields are, and writing
    a component to a file and reading it back gives an equal one."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        ser_json_inf_nan="strings",
        use_attribute_docstrings=True,
    )

    registry: ClassVar[str | None] = None
    registries: ClassVar[dict[str, dict[str, type[Component]]]] = {}
    homes: ClassVar[dict[str, str]] = {}
    kind: ClassVar[str] = ""

    def __init_subclass__(cls, registry: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, registry: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.kind = re.sub(
            r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__
        ).lower()
        if registry is not None:
            cls.registry, cls.registries[registry] = registry, {}
            cls.homes[registry] = cls.__module__.rpartition(".")[0]
        elif cls.registry is not None and not inspect.isabstract(cls):
            cls._register()

    @classmethod
    def _register(cls) -> None:
        known = cls.registries[cls.registry or ""].get(cls.kind)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise TypeError(
                f"{cls.__module__}.{cls.__name__} and {known.__module__}.{known.__name__} "
                f"are both the {cls.registry} {cls.kind!r}: rename one"
            )
        cls.registries[cls.registry or ""][cls.kind] = cls

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """The kinds in this class's registry, by name."""
        load_members(cls.homes.get(cls.registry or "", ""))
        registered: Mapping[str, Any] = cls.registries[cls.registry or ""]
        return {
            kind: member for kind, member in sorted(registered.items()) if issubclass(member, cls)
        }

    @classmethod
    def shorthand(cls, word: str) -> dict[str, Any]:
        """The block for which a bare word is short where this component is expected: by default,
        the kind of that name with its defaults."""
        return {"kind": word}

    @model_validator(mode="wrap")
    @classmethod
    def _from_block(cls, value: Any, handler: Callable[[Any], Self]) -> Self:
        if isinstance(value, str) and cls.registry is not None:
            value = cls.shorthand(value)
        if not isinstance(value, Mapping):
            return handler(value)
        if cls.registry is not None and inspect.isabstract(cls):
            return cls._member(value).model_validate(value)
        value = dict(value)
        if value.pop("kind", cls.kind) != cls.kind:
            raise custom_error("wrong_kind", f"kind must be {cls.kind!r} here")
        return cls._all_errors_at_once(value, handler)

    @classmethod
    def _member(cls, value: Mapping[str, Any]) -> type[Self]:
        kind = value.get("kind")
        if kind is None:
            article = "an" if (cls.registry or "")[:1] in "aeiou" else "a"
            known = ", ".join(cls.kinds())
            message = f"{article} {cls.registry} needs `kind:`; choose from {known}"
            raise custom_error("no_kind", message)
        if not isinstance(kind, str) or kind not in cls.kinds():
            message = f"there is no {cls.registry} {kind!r}; {cls._hint(kind)}"
            raise ValidationError.from_exception_data(
                cls.__name__, [error_details("unknown_kind", message, ("kind",), kind)]
            )
        return cls.kinds()[kind]

    @classmethod
    def _hint(cls, kind: object) -> str:
        """The end of an error about an unknown kind: the methods that its class lacks, if there is
        such a class, otherwise a suggestion."""
        unfinished = next((sub for sub in _below(cls) if sub.kind == kind), None)
        if unfinished is None:
            return suggest(kind, cls.kinds())
        missing = ", ".join(sorted(unfinished.__abstractmethods__))
        return f"its class {unfinished.__name__} does not define {missing}"

    @classmethod
    def _all_errors_at_once(cls, value: dict[str, Any], handler: Callable[[Any], Self]) -> Self:
        names = {
            field.alias or name: name for name, field in cls.model_fields.items()
        } | dict.fromkeys(cls.model_fields, "")
        unknown = [key for key in value if key not in names]
        errors = [
            error_details(
                "unknown_key",
                f"{cls.kind} has no key {key!r}; {suggest(key, cls.model_fields)}",
                (key,),
                value[key],
            )
            for key in unknown
        ]
        try:
            result = handler({key: item for key, item in value.items() if key not in unknown})
        except ValidationError as error:
            errors += [
                error_details(e["type"], e["msg"], e["loc"], e["input"])
                for e in error.errors(include_url=False)
            ]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return result

    @model_validator(mode="after")
    def _lists_have_no_repeats(self) -> Self:
        """Rejects repeated items of a list: an item that is chosen twice would count twice."""
        errors = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, tuple) and _is_list(field.annotation):
                errors += [
                    error_details("repeated", f"{twice!r} is listed twice", (name,), value)
                    for twice in repeated(value)[:1]
                ]
        if errors:
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self

    @model_serializer(mode="plain")
    def _to_block(self) -> dict[str, Any]:
        # Field by field: by default, pydantic would drop a subclass's own fields where the field is
        # declared with the base class.
        kind = {"kind": self.kind} if self.registry is not None else {}
        return kind | {name: getattr(self, name) for name in type(self).model_fields}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        if cls.registry is not None and inspect.isabstract(cls):
            # json_schema() fills it in: a registry may have members that refer to the registry.
            return {"x-registry": cls.registry}
        schema = handler(core_schema)
        if cls.registry is not None:
            body = handler.resolve_ref_schema(schema)
            body["properties"] = {"kind": {"const": cls.kind}} | body.get("properties", {})
            body["required"] = ["kind", *body.get("required", [])]
        return schema

    def block(self) -> dict[str, Any]:
        """This object as in YAML or JSON: a mapping of plain lists, numbers and strings."""
        return self.model_dump(mode="json")

    def references(self) -> References:
        """The checkpoints and example sets that this component and its parts name."""
        return references_of_fields(self)

    @property
    def content_hash(self) -> str:
        """Twelve hexadecimal digits that depend only on the content."""
        return digest(self.block())

    def __hash__(self) -> int:
        return hash((type(self), self.content_hash))

    def expand(
        self, sweep_domain: Mapping[str, Sequence[Any]]
    ) -> list[tuple[dict[str, Any], Self]]:
        """All members of the sweep over the `each:` fields of this component and of its parts.

        Args:
            sweep_domain: by the name of a field, the values that `each: all` expands to.

        Returns:
            For each member, its swept values by field name and the component with these values.
        """
        choices = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Each):
                values = value.values(name, sweep_domain)
                choices.append([(_label(name, v), (name, v)) for v in values])
            elif isinstance(value, Component):
                choices.append(
                    [(labels, (name, part)) for labels, part in value.expand(sweep_domain)]
                )
        n_cells = math.prod(map(len, choices))
        if n_cells > MOST_CELLS:
            raise InputError(f"the sweep has {n_cells:,} members; at most {MOST_CELLS:,}")
        members = []
        for combination in itertools.product(*choices):
            labels = {key: label for swept, _ in combination for key, label in swept.items()}
            fields = {name: getattr(self, name) for name in type(self).model_fields} | dict(
                c[1] for c in combination
            )
            members.append((labels, self._swept_member(labels, fields)))
        return members

    def _swept_member(self, labels: Mapping[str, Any], fields: Mapping[str, Any]) -> Self:
        try:
            return type(self)(**fields)
        except ValidationError as error:
            found = "; ".join(
                f"{e['loc'][0] if e['loc'] else self.kind}: {format_error(e)}"
                for e in error.errors()
            )
            raise InputError(
                f"with {', '.join(f'{k} {v!r}' for k, v in labels.items())}: {found}"
            ) from error


def _label(name: str, value: Any) -> dict[str, Any]:
    """A swept value as a label of a table's rows; a component by its kind."""
    return {name: value.kind if isinstance(value, Component) else value}


def _below(cls: type[Component]) -> Iterator[type[Component]]:
    """All subclasses, including those that are not registered because a method is missing."""
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _below(subclass)


def _is_list(annotation: Any) -> bool:
    """Whether a type is a tuple of any length, or a union with one."""
    parts = get_args(annotation)
    if get_origin(annotation) is tuple:
        return Ellipsis in parts
    return any(_is_list(part) for part in parts)


def load_all() -> None:
    """Import the members of every registry."""
    loaded: set[str] = set()
    while missing := set(Component.homes.values()) - loaded:
        for home in missing:
            load_members(home)  # may import the base class of another registry
        loaded |= missing


@cache
def load_members(package: str) -> None:
    """Import every module of a package, which registers the kinds defined there."""
    if package.startswith("mechmem"):
        home = import_module(package)
        for found in pkgutil.walk_packages(home.__path__, f"{package}."):
            import_module(found.name)
