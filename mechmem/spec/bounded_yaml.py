"""YAML that is safe to build: bounded in size, depth, aliases and the length of numbers.

The events of the parser are checked before any value is built, so a small file cannot become a
large object, and no object refers to itself.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode

MOST_BYTES = 200_000
"""Size of a spec file, and of an override."""
MOST_LINES = 10_000
"""Lines of a spec: the parser needs seconds for many lines, even empty ones."""
MOST_NODES = 20_000
"""Keys and values of a spec, each alias counted with all that it repeats."""
DEEPEST = 50
"""Levels of nesting."""
MOST_DIGITS = 20
"""Characters of an integer: enough for 64 bits."""
STRING, MERGE, INTEGER = (f"tag:yaml.org,2002:{name}" for name in ("str", "merge", "int"))


TOO_DEEP = re.compile(rf"(?:[\[{{][ \n]*){{{DEEPEST + 1}}}")
NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and halves of characters, which no file name or page can hold."""


class BoundsError(Exception):
    """YAML that mechmem does not build. The message begins with `:line:column: ` where there is a
    place."""


def text_of(path: Path) -> str:
    """The text of a spec file. Only regular files are read, as UTF-8 and up to `MOST_BYTES`.

    Raises:
        BoundsError: the file is of another kind, too large, or not UTF-8.
        OSError: it cannot be read.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device may block, or never end
        raise BoundsError(" is not a regular file; write the spec to a file first")
    if found.st_size > MOST_BYTES:
        raise BoundsError(f" has {found.st_size:,} bytes; a spec has at most {MOST_BYTES:,}")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    try:
        return content[:MOST_BYTES].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise BoundsError(f":{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from (
            error
        )


def load(text: str, typ: str = "rt") -> Any:
    """The value of a YAML text.

    Args:
        text: to read.
        typ: of ruamel's loader; `rt` keeps the line and column of every key.

    Raises:
        BoundsError: the text is not YAML, or goes beyond the bounds.
    """
    if len(text) > MOST_BYTES:
        raise BoundsError(f" has {len(text):,} characters; at most {MOST_BYTES:,} are read")
    if (n_lines := text.count("\n")) > MOST_LINES:
        raise BoundsError(f" has {n_lines:,} lines; at most {MOST_LINES:,} are read")
    if nested := TOO_DEEP.search(text):  # the parser would read on before it says where it is
        line = text.count("\n", 0, nested.start()) + 1
        raise BoundsError(f":{line}: nested more than {DEEPEST} levels deep")
    try:
        _Bounds().check(text)
        return YAML(typ=typ, pure=True).load(text)
    except BoundsError:
        raise
    except YAMLError as error:
        raise BoundsError(_marked(error)) from error
    except Exception as error:  # for some texts, the parser fails with an error of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BoundsError(f": not valid YAML: {reason}") from error


def _marked(error: YAMLError) -> str:
    """`:line:column: problem`, as far as the parser provides it."""
    mark = getattr(error, "problem_mark", None)
    at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or f"not valid YAML: {str(error).splitlines()[0]}"
    return f"{at}: {problem}"


@dataclass
class _Part:
    """A mapping, list or scalar."""

    anchor: str | None
    size: int = 1
    """Number of nodes, itself included."""
    height: int = 0
    """Levels below it."""
    is_mapping: bool = False
    n_parts: int = 0
    """Keys and values so far, or items."""


class _Bounds:
    """What has been read of a text: the open mappings and lists, and the sizes of anchored parts.

    Sizes and heights are those after aliases are replaced by what they repeat.
    """

    def __init__(self) -> None:
        self.resolver = YAML(typ="rt", pure=True).resolver
        self.n_nodes = 0
        self.open: list[_Part] = []
        self.anchored: dict[str, _Part | None] = {}

    def check(self, text: str) -> None:
        """Raises BoundsError for the first event beyond the bounds."""
        for event in YAML(typ="safe", pure=True).parse(text):
            kind = type(event).__name__
            if kind == "DocumentStartEvent" and (event.version or event.tags):
                self._refuse(event, "a spec has no % directives; remove them")
            elif kind == "AliasEvent":
                self._alias(event)
            elif kind == "ScalarEvent":
                self._is_allowed(event)
                self._scalar(event)
                self._closed(_Part(event.anchor), event)
            elif kind in ("MappingStartEvent", "SequenceStartEvent"):
                self._is_allowed(event)
                self._is_no_key(event)
                self.open.append(_Part(event.anchor, is_mapping=kind == "MappingStartEvent"))
                if event.anchor is not None:
                    self.anchored[event.anchor] = None  # known, but not complete
                if len(self.open) > DEEPEST:
                    self._refuse(event, f"nested more than {DEEPEST} levels deep")
            elif kind in ("MappingEndEvent", "SequenceEndEvent"):
                self._closed(self.open.pop(), event)

    def _is_no_key(self, event: Any) -> None:
        if self._is_key():
            self._refuse(event, "a key must be a text")

    def _is_key(self) -> bool:
        return bool(self.open) and self.open[-1].is_mapping and self.open[-1].n_parts % 2 == 0

    def _alias(self, event: Any) -> None:
        self._is_no_key(event)
        if event.anchor not in self.anchored:
            self._refuse(event, f"no part of the file is named &{event.anchor} before this")
        part = self.anchored[event.anchor]
        if part is None:
            self._refuse(event, f"&{event.anchor} contains itself; write it out without *")
        self._closed(_Part(None, part.size, part.height), event, is_alias=True)

    def _is_allowed(self, event: Any) -> None:
        if event.tag is not None:
            self._refuse(event, f"a spec has no tags; remove {event.tag}")
        if event.anchor in self.anchored:
            self._refuse(event, f"&{event.anchor} is defined twice; rename one")

    def _scalar(self, event: Any) -> None:
        value, tag = event.value, STRING
        if event.implicit[0]:  # without quotes
            tag = str(self.resolver.resolve(ScalarNode, value, (True, False)))
        if tag == INTEGER and len(value) > MOST_DIGITS:
            self._refuse(event, f"an integer of {len(value):,} digits; at most {MOST_DIGITS}")
        if self._is_key() and tag not in (STRING, MERGE):
            self._refuse(event, f"the key {value[:MOST_DIGITS]} must be a text; put it in quotes")
        if bad := NO_TEXT.search(value):
            self._refuse(event, f"\\u{ord(bad[0]):04x} is no character of a text; leave it out")

    def _closed(self, part: _Part, event: Any, is_alias: bool = False) -> None:
        """Count a complete part, and add it to the one that it is in.

        Args:
            part: that is complete.
            event: that ended it.
            is_alias: whether it repeats another part, so that nothing of it is counted yet.
        """
        self.n_nodes += part.size if is_alias else 1
        if part.anchor is not None:
            self.anchored[part.anchor] = part
        if self.open:
            self.open[-1].n_parts += 1
            self.open[-1].size += part.size
            self.open[-1].height = max(self.open[-1].height, part.height + 1)
        if self.n_nodes > MOST_NODES:
            self._refuse(event, f"more than {MOST_NODES:,} keys and values")
        if len(self.open) + part.height > DEEPEST:
            self._refuse(event, f"nested more than {DEEPEST} levels deep")

    def _refuse(self, event: Any, text: str) -> NoReturn:
        mark = event.start_mark
        raise BoundsError(f":{mark.line + 1}:{mark.column + 1}: {text}")
