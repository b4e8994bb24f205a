"""Spec files: safe YAML with overrides from the command line, and errors with file:line:column."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from mechmem.spec import bounded_yaml
from mechmem.spec.errors import InputError, format_error
from mechmem.spec.registry import Component

C = TypeVar("C", bound=Component)
Place = tuple[int | str, ...]


class SpecError(InputError):
    """An invalid spec: one line per error, with its place in the file, its path and what to write
    instead."""


class SpecFile:
    """A YAML file with the line and column of every key.

    Args:
        path: path of the file.
        overrides: changes to the file, such as `key.sub=value`.

    Raises:
        SpecError: if the file or an override cannot be read.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.path = path
        self.overrides: dict[Place, str] = {}
        try:
            self.data = bounded_yaml.load(bounded_yaml.text_of(path))
        except FileNotFoundError as error:
            raise SpecError(f"{path} does not exist{_nearby(path)}") from error
        except IsADirectoryError as error:
            raise SpecError(f"{path} is a folder; name a .yaml file in it") from error
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            reason = getattr(error, "strerror", None) or error
            raise SpecError(f"{path} cannot be read: {reason}") from error
        except bounded_yaml.BoundsError as error:
            raise SpecError(f"{path}{error}") from error
        if not isinstance(self.data, CommentedMap):
            raise SpecError(f"{path}:1:1: a spec must be a mapping of keys to values; this is not")
        for override in overrides:
            self._override(override)

    def build(self, cls: type[C], files: tuple[Path, ...] = ()) -> C:
        """The component that the file describes. Raises SpecError with all errors at once.

        Args:
            cls: of the component.
            files: the specs that are being read, each because the one before it names it.
        """
        context = {"folder": self.path.parent, "files": (*files, self.path.resolve())}
        try:
            return cls.model_validate(_plain(self.data), context=context)
        except ValidationError as error:
            errors = error.errors(include_url=False)
            # Where one branch of a union has an error of ours, the other branches add nothing.
            ours = {self._find(e["loc"])[2] for e in errors if e["type"] == "value_error"}
            lines = [
                self.message(e["loc"], format_error(e))
                for e in errors
                if not _follows(e, errors)
                and (e["type"] not in OTHER_BRANCH or self._find(e["loc"])[2] not in ours)
            ]
            raise SpecError("\n".join(lines)) from error

    def message(self, loc: Place, text: str) -> str:
        """An error with its place: `file:line:column: path: text`, or `override 'key=value': path:
        text`.

        Args:
            loc: keys and indices from the top of the spec down to the wrong value.
            text: the error.
        """
        line, column, known = self._find(loc)
        path = ".".join(map(str, known))
        by = [text for key, text in self.overrides.items() if self._made(key, known)]
        at = f"override {_short(by[-1])}" if by else f"{self.path}:{line}:{column}"
        return f"{at}: {path + ': ' if path else ''}{text}"

    def _made(self, override: Place, place: Place) -> bool:
        """Whether the override of one place set the value at `place`, or created a part of it that
        the file does not have."""
        if place[: len(override)] == override:
            return True
        return override[: len(place)] == place != () and not self._is_in_file(place)

    def _is_in_file(self, place: Place) -> bool:
        node = self.data
        for part in place:
            if _at(node, part) is None:
                return False
            node = node[part]
        return True

    def _find(self, loc: Place) -> tuple[int, int, Place]:
        node, at, known = self.data, (0, 0), []
        for part in loc:
            if not _holds(node, part):
                continue  # a label that pydantic adds, such as the branch of a union
            at = _at(node, part) or at
            node = node[part]
            known.append(part)
        return at[0] + 1, at[1] + 1, tuple(known)

    def _override(self, override: str) -> None:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise SpecError(f"override {_short(override)} is not of the form key.sub=value")
        node, parts = self.data, [_index_or_key(part) for part in key.split(".")]
        if len(parts) > bounded_yaml.DEEPEST:
            most = bounded_yaml.DEEPEST
            raise SpecError(f"override {_short(override)}: a key has at most {most} parts")
        for part in parts[:-1]:
            if isinstance(node, dict) and part not in node:
                node[part] = {}
            if not _holds(node, part):
                raise SpecError(f"override {_short(override)}: {self.path} has nothing at {part!r}")
            # A copy: what an alias repeats elsewhere stays as it is.
            node[part] = copy.deepcopy(node[part])
            node = node[part]
        if not isinstance(node, dict) and not _holds(node, parts[-1]):
            raise SpecError(
                f"override {_short(override)}: {self.path} has nothing at {parts[-1]!r}"
            )
        try:
            node[parts[-1]] = bounded_yaml.load(value, typ="safe")
        except bounded_yaml.BoundsError as error:
            raise SpecError(f"override {_short(override)}: the value{error}") from error
        self.overrides[tuple(parts)] = override


def write_spec(component: Component) -> str:
    """The spec of a component as YAML, with every default written out."""
    from io import StringIO

    stream, yaml = StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = False, 110, False
    yaml.dump(component.block(), stream)
    return stream.getvalue()


def _index_or_key(part: str) -> int | str:
    return (
        int(part) if part.isdecimal() and len(part) <= len(str(bounded_yaml.MOST_NODES)) else part
    )


def _short(override: str) -> str:
    """An override as an error quotes it."""
    return repr(override if len(override) <= 80 else f"{override[:77]}...")


def _holds(node: Any, part: int | str) -> bool:
    if isinstance(node, list):
        return isinstance(part, int) and part < len(node)
    return isinstance(node, dict) and part in node


OTHER_BRANCH = ("int_type", "string_type", "tuple_type", "none_required")
"""Errors of pydantic that state only that a value is of another type."""


def _follows(error: Any, errors: Sequence[Any]) -> bool:
    """Whether the error only follows from others: pydantic also reports a list with wrong items as
    too short."""
    loc = error["loc"]
    return error["type"] == "too_short" and any(
        e["loc"][: len(loc)] == loc and e is not error for e in errors
    )


def _at(node: Any, part: int | str) -> tuple[int, int] | None:
    """Line and column of a part of the file; None if an override added it."""
    if isinstance(node, CommentedSeq):
        return node.lc.item(part)
    return (
        node.lc.key(part)
        if isinstance(node, CommentedMap) and part in (node.lc.data or ())
        else None
    )


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _nearby(path: Path) -> str:
    import difflib

    found = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), found, n=1) or found[:3]
    return (
        f"; did you mean {' or '.join(near)}?" if near else f"; {path.parent} holds no .yaml file"
    )
