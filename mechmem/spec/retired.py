"""Names of version 0.1 that version 0.2 replaced, so that an old spec is told the new name."""

from __future__ import annotations

from collections.abc import Collection

RETIRED: dict[str, tuple[str, ...]] = {
    # keys of a spec
    "training": ("optimisation",),
    "decode": ("greedy",),
    "n_control_decode": ("n_control_greedy",),
    "how": ("method",),
    "over": ("reference_set",),
    # kinds
    "twin": ("cross_model_swap",),
    "distributed": ("token_replacement",),
    "scramble": ("random_displacement",),
    "neither": ("off_label_rate",),
    # values of a table's columns
    "patched": ("intervened",),
    "unpatched": ("baseline",),
    "relabelled": ("head_permuted",),
}
"""From an old name to the new one, or to several where it depends on what is named."""

VALUES = ("decode", "patched", "unpatched", "relabelled", "neither")
"""Old values of a table's columns. They stand for nothing else now, so the new name is given even
where no row has it."""


def replacement(name: object, known: Collection[str]) -> str | None:
    """The new name for an old one, if it is among the names that are known here."""
    return next((new for new in RETIRED.get(str(name), ()) if new in known), None)


def replaced_value(value: object) -> str | None:
    """The new name for an old value of a table's column."""
    return RETIRED[str(value)][0] if value in VALUES else None
