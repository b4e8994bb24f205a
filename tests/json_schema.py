"""As much of a JSON schema validator as our schemas need; a keyword that it does not know is an
error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

TYPES = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
IGNORED = {"title", "description", "default", "$defs"}


def is_valid(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """Whether the value fits the schema; references are looked up in `root`."""
    return all(
        RULES[key](value, wanted, schema, root)
        for key, wanted in schema.items()
        if key not in IGNORED
    )


def at(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference refers to."""
    node: Any = root
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node


def _is_a(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        return not isinstance(value, bool) and isinstance(
            value, int if name == "integer" else (int, float)
        )
    return isinstance(value, TYPES[name])


def _named(
    value: Any, wanted: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any]
) -> bool:
    return not isinstance(value, dict) or all(
        is_valid(value[k], s, root) for k, s in wanted.items() if k in value
    )


def _others(value: Any, wanted: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    others = (
        [value[key] for key in value if key not in schema.get("properties", {})]
        if isinstance(value, dict)
        else []
    )
    return (
        all(is_valid(other, wanted, root) for other in others)
        if isinstance(wanted, dict)
        else wanted or not others
    )


def _items(value: Any, wanted: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    return not isinstance(value, list) or all(is_valid(item, wanted, root) for item in value)


def _places(
    value: Any, wanted: list[Any], schema: Mapping[str, Any], root: Mapping[str, Any]
) -> bool:
    return not isinstance(value, list) or all(
        is_valid(i, s, root) for i, s in zip(value, wanted, strict=False)
    )


def _number(holds: Callable[[Any, Any], bool]) -> Callable[..., bool]:
    return lambda value, wanted, *_: not _is_a(value, "number") or holds(value, wanted)


def _length(holds: Callable[[int, int], bool]) -> Callable[..., bool]:
    return lambda value, wanted, *_: not isinstance(value, list) or holds(len(value), wanted)


RULES: dict[str, Callable[..., bool]] = {
    "$ref": lambda value, wanted, _, root: is_valid(value, at(wanted, root), root),
    "type": lambda value, wanted, *_: _is_a(value, wanted),
    "const": lambda value, wanted, *_: value == wanted,
    "enum": lambda value, wanted, *_: value in wanted,
    "anyOf": lambda value, wanted, _, root: any(is_valid(value, schema, root) for schema in wanted),
    "oneOf": lambda value, wanted, _, root: (
        sum(is_valid(value, schema, root) for schema in wanted) == 1
    ),
    "properties": _named,
    "additionalProperties": _others,
    "required": lambda value, wanted, *_: (
        not isinstance(value, dict) or set(wanted) <= value.keys()
    ),
    "items": _items,
    "prefixItems": _places,
    "minItems": _length(lambda n, least: n >= least),
    "maxItems": _length(lambda n, most: n <= most),
    "maxLength": lambda value, most, *_: not isinstance(value, str) or len(value) <= most,
    "minLength": lambda value, least, *_: not isinstance(value, str) or len(value) >= least,
    "minimum": _number(lambda value, least: value >= least),
    "maximum": _number(lambda value, most: value <= most),
    "exclusiveMinimum": _number(lambda value, least: value > least),
    "exclusiveMaximum": _number(lambda value, most: value < most),
    "pattern": lambda value, wanted, *_: (
        not isinstance(value, str) or re.search(wanted, value) is not None
    ),
}
