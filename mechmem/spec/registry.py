"""Component: the frozen base of everything that a spec can name.

A registry (task, label noise, intervention, measure, analysis, figure ...) is an abstract subclass made with
`class Task(Component, registry="task")`. Every concrete subclass of a registry registers itself by its `kind`, the
snake_case of its class name, so a YAML block `{kind: patch_grid, ...}` and `PatchGrid(...)` are one object.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import itertools
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

T = TypeVar("T")


class InputError(ValueError):
    """What the user wrote cannot be: says what, where it is known, and what instead."""


class Component(BaseModel):
    """A frozen, hashable piece of a spec: equal when its fields are equal, and the same after a round trip."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="strings", use_attribute_docstrings=True
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
        cls.kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        if registry is not None:
            cls.registry, cls.registries[registry] = registry, {}
            cls.homes[registry] = cls.__module__.rpartition(".")[0]
        elif cls.registry is not None and not inspect.isabstract(cls):
            cls._register()

    @classmethod
    def _register(cls) -> None:
        known = cls.registries[cls.registry or ""].get(cls.kind)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"{cls.__module__}.{cls.__name__} and {known.__module__}.{known.__name__} "
                f"are both the {cls.registry} {cls.kind!r}: rename one"
            )
        cls.registries[cls.registry or ""][cls.kind] = cls

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """The kinds that stand on this class's registry, by name."""
        load_members(cls.homes.get(cls.registry or "", ""))
        registered: Mapping[str, Any] = cls.registries[cls.registry or ""]
        return {kind: member for kind, member in sorted(registered.items()) if issubclass(member, cls)}

    @classmethod
    def shorthand(cls, word: str) -> dict[str, Any]:
        """What a bare word means where this component is expected; by default, the kind with its defaults."""
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
            raise _custom("wrong_kind", f"kind must be {cls.kind!r} here")
        return cls._all_errors_at_once(value, handler)

    @classmethod
    def _member(cls, value: Mapping[str, Any]) -> type[Self]:
        kind = value.get("kind")
        if kind is None:
            raise _custom("no_kind", f"a {cls.registry} needs `kind:`, one of {', '.join(cls.kinds())}")
        if not isinstance(kind, str) or kind not in cls.kinds():
            message = f"there is no {cls.registry} {kind!r}; {suggest(kind, cls.kinds())}"
            raise ValidationError.from_exception_data(cls.__name__, [_error("unknown_kind", message, ("kind",), kind)])
        return cls.kinds()[kind]

    @classmethod
    def _all_errors_at_once(cls, value: dict[str, Any], handler: Callable[[Any], Self]) -> Self:
        names = {field.alias or name: name for name, field in cls.model_fields.items()} | dict.fromkeys(
            cls.model_fields, ""
        )
        unknown = [key for key in value if key not in names]
        errors = [
            _error(
                "unknown_key", f"{cls.kind} has no key {key!r}; {suggest(key, cls.model_fields)}", (key,), value[key]
            )
            for key in unknown
        ]
        try:
            result = handler({key: item for key, item in value.items() if key not in unknown})
        except ValidationError as error:
            errors += [_error(e["type"], e["msg"], e["loc"], e["input"]) for e in error.errors(include_url=False)]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return result

    @model_serializer(mode="plain")
    def _to_block(self) -> dict[str, Any]:
        # Field by field, and not pydantic's default: that drops a subclass's own fields behind a base-typed field.
        kind = {"kind": self.kind} if self.registry is not None else {}
        return kind | {name: getattr(self, name) for name in type(self).model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if cls.registry is not None and inspect.isabstract(cls):
            return {
                "x-registry": cls.registry
            }  # json_schema() fills it in: a registry may hold members that hold the registry
        schema = handler(core_schema)
        if cls.registry is not None:
            body = handler.resolve_ref_schema(schema)
            body["properties"] = {"kind": {"const": cls.kind}} | body.get("properties", {})
            body["required"] = ["kind", *body.get("required", [])]
        return schema

    def block(self) -> dict[str, Any]:
        """The block of plain lists, numbers and strings that stands for this object in YAML and JSON."""
        return self.model_dump(mode="json")

    def words(self) -> set[str]:
        """Every word that stands somewhere in the block."""
        return set(_words(self.block()))

    @property
    def content_hash(self) -> str:
        """Twelve hexadecimal digits that are the same whenever the content is."""
        return digest(self.block())

    def __hash__(self) -> int:
        return hash((type(self), self.content_hash))

    def expand(self, sweep_domain: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], Self]]:
        """Every member of the sweep that the `each:` fields of this component (and of its parts) describe.

        `sweep_domain` says what `each: all` means, by field name. Returns (the swept values, the concrete component).
        """
        choices = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Each):
                choices.append([({name: v}, (name, v)) for v in value.values(name, sweep_domain)])
            elif isinstance(value, Component):
                choices.append([(labels, (name, part)) for labels, part in value.expand(sweep_domain)])
        members = []
        for combination in itertools.product(*choices):
            labels = {key: label for swept, _ in combination for key, label in swept.items()}
            fields = {name: getattr(self, name) for name in type(self).model_fields} | dict(c[1] for c in combination)
            members.append((labels, self._swept_member(labels, fields)))
        return members

    def _swept_member(self, labels: Mapping[str, Any], fields: Mapping[str, Any]) -> Self:
        try:
            return type(self)(**fields)
        except ValidationError as error:
            found = "; ".join(f"{e['loc'][0] if e['loc'] else self.kind}: {said(e)}" for e in error.errors())
            raise InputError(f"with {', '.join(f'{k} {v!r}' for k, v in labels.items())}: {found}") from error


class Each(BaseModel, Generic[T]):
    """A swept value: `{each: [1, 2]}`, or `{each: all}` for every value that the model and the task allow."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    each: Annotated[
        Annotated[tuple[T, ...], Field(min_length=1), Tag("values")] | Annotated[Literal["all"], Tag("all")],
        Discriminator(lambda value: "all" if isinstance(value, str) else "values"),
    ]

    @field_validator("each")
    @classmethod
    def _all_differ(cls, each: Any) -> Any:
        twice = [value for i, value in enumerate(each) if value in each[:i]] if each != "all" else []
        if twice:
            raise ValueError(f"{twice[0]!r} stands twice")
        return each

    def values(self, name: str, sweep_domain: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
        if self.each != "all":
            return self.each
        if name not in sweep_domain:
            raise InputError(f"`{name}: {{each: all}}` has no list to stand for; write the values out")
        return sweep_domain[name]


def each(*values: Any) -> Any:
    """Sweep a field: `PatchGrid(layer=each(0, 1))`; without values, over all that there are."""
    return Each(each=values or "all")


def _swept_tag(value: Any) -> str:
    return "each" if isinstance(value, Each) or (isinstance(value, Mapping) and "each" in value) else "value"


if TYPE_CHECKING:
    # A swept field is read only after `expand` has replaced every `Each`, so it is typed as what it then holds.
    Swept = Annotated[T, "swept"]
else:

    class Swept:
        """`Swept[int]`: an int, or `{each: ...}` over ints."""

        def __class_getitem__(cls, item: Any) -> Any:
            values = Annotated[Each[item], Tag("each")]
            return Annotated[Annotated[item, Tag("value")] | values, Discriminator(_swept_tag)]


def json_schema(root: type[Component]) -> dict[str, Any]:
    """The JSON schema of `root` for editors, with a `oneOf` of the real kinds wherever a registry is expected."""
    definitions: dict[str, Any] = {}

    def collect(cls: type[Component]) -> dict[str, Any]:
        schema = cls.model_json_schema()
        definitions.update(schema.pop("$defs", {}))
        return schema

    schema = collect(root)
    load_all()
    for registry, members in Component.registries.items():
        definitions |= {f"{registry}.{kind}": collect(member) for kind, member in members.items()}
        kinds = [{"$ref": f"#/$defs/{registry}.{kind}"} for kind in members]
        definitions[registry] = {"oneOf": [*kinds, {"type": "string"}]}
    text = json.dumps(schema | {"$defs": definitions})
    return json.loads(re.sub(r'"x-registry": "(\w+)"', r'"$ref": "#/$defs/\1"', text))


def _words(block: Any) -> Iterator[str]:
    if isinstance(block, str):
        yield block
    for part in block.values() if isinstance(block, Mapping) else block if isinstance(block, list) else ():
        yield from _words(part)


def said(error: Any) -> str:
    """What one of pydantic's errors says, without pydantic's own words before ours."""
    if error["type"] == "missing":
        return f"{error['loc'][-1]!r} is missing"
    return error["msg"].removeprefix("Value error, ")


def _error(kind: str, message: str, loc: tuple[int | str, ...], value: Any) -> InitErrorDetails:
    return InitErrorDetails(type=_custom(kind, message), loc=loc, input=value)


def _custom(kind: Any, message: Any) -> PydanticCustomError:
    """An error whose message is shown as it is: without a context, pydantic treats no text as a template."""
    return PydanticCustomError(kind, message)


def suggest(name: object, names: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest name, else the list of them."""
    known = [str(n) for n in names]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known) or 'none'}"


def digest(block: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(block, sort_keys=True).encode()).hexdigest()[:12]


def load_all() -> None:
    """Import the members of every registry."""
    for home in set(Component.homes.values()):
        load_members(home)


@cache
def load_members(package: str) -> None:
    """Import every module of a package, so that the kinds in its files are registered."""
    if package.startswith("mechmem"):
        home = import_module(package)
        for found in pkgutil.walk_packages(home.__path__, f"{package}."):
            import_module(found.name)
