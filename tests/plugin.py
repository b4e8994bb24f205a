"""Kinds of a test file's own."""

from __future__ import annotations

from typing import TypeVar

from mechmem.spec.registry import Component

C = TypeVar("C", bound=type[Component])


def plugin(kind: C) -> C:
    """A class of a user's own, taken out of its registry again: the laws over all kinds of other
    test files are not about it."""
    kind.registries[kind.registry or ""].pop(kind.kind)
    return kind
