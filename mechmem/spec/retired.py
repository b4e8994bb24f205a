"""Names of version 0.1 that version 0.2 replaced, so that errors about an old spec give the new
name."""

from __future__ import annotations

from collections.abc import Collection

RETIRED: dict[str, tuple[str, ...]] = {
    # keys of a spec
    "training": ("optimisation",),
    "decode": ("greedy",),
    "n_control_decode": ("n_control_greedy",),
    "how": ("method",),
    "over": ("reference_set",),
    "shuffled_by": ("control_task",),
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
"""The new name of each old one, or several if it depends on the context."""

VALUES = ("decode", "patched", "unpatched", "relabelled", "neither")
"""Old values of a table's columns. They have no other meaning now, so the new name is given even if
no row has it."""


def replacement(name: object, known: Collection[str]) -> str | None:
    """The new name of an old one, if it is among the known names; otherwise None."""
    return next((new for new in RETIRED.get(str(name), ()) if new in known), None)


def replaced_value(value: object) -> str | None:
    """The new name of an old value of a table's column; otherwise None."""
    return RETIRED[str(value)][0] if value in VALUES else None
