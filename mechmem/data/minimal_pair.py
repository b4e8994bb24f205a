"""Minimal pairs: which variable they change and which they hold."""

from __future__ import annotations

from mechmem.spec.registry import Component


class MinimalPair(Component):
    """Which variable the minimal pair of an example changes, and which it holds."""

    flip: str
    """The variable that must differ."""
    hold: tuple[str, ...] = ()
    """Variables that must stay as they are."""
    seed: int = 0
