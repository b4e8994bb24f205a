"""Analysis: a session of models and examples -> one tidy table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd

from mechmem.session import Session
from mechmem.spec.limits import Name
from mechmem.spec.registry import Component


class Analysis(Component, registry="analysis"):
    """A question about trained models, answered by one tidy table."""

    columns: ClassVar[Mapping[str, str]] = {}
    """The meaning of each column of the table, with its unit. Swept fields become columns too."""

    name: Name | None = None
    """Name of the table; by default, the kind."""

    @property
    def table_name(self) -> str:
        return self.name or self.kind

    @abstractmethod
    def table(self, session: Session) -> pd.DataFrame:
        """The table of one member of the sweep, in which no field is swept any more."""

    def run(self, session: Session, sweep_domain: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
        """The tables of all members of the sweep, concatenated, with the swept values as columns.

        Args:
            session: the models and example sets.
            sweep_domain: by the name of a field, the values that `each: all` expands to.
        """
        members, tables = self.expand(sweep_domain), []
        for i, (labels, member) in enumerate(members):
            session.say(self.progress(i, len(members), labels))
            tables.append(member.table(session))
        return joined(tables, [labels for labels, _ in members])

    def progress(self, done: int, total: int, labels: Mapping[str, Any]) -> str:
        """`patch_grid 3/8 layer 0`: the progress message for the current member of the sweep.

        Args:
            done: number of members before it.
            total: number of members of the sweep.
            labels: its swept values by field name.
        """
        swept = ", ".join(f"{key} {_cell(value, True)}" for key, value in labels.items())
        return f"{self.table_name} {done + 1}/{total} {swept}"


def joined(tables: Sequence[pd.DataFrame], labels: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The tables of the members of a sweep, concatenated, with the swept values as columns.

    Args:
        tables: one per member, in the order of the sweep; the columns are added to them.
        labels: for each member, its swept values by field name.
    """
    of_several = {
        key for swept in labels for key, value in swept.items() if isinstance(value, (tuple, list))
    }
    for table, swept in zip(tables, labels, strict=True):
        for column, value in [*swept.items()][::-1]:
            if column not in table:
                table.insert(0, column, [_cell(value, column in of_several)] * len(table))
    whole = pd.concat(tables, ignore_index=True)
    # A column of a file has one type, so 2 and "0+1" both become text.
    mixed = [c for c in labels[0] if c in whole and len(set(whole[c].map(type))) > 1]
    return whole.astype(dict.fromkeys(mixed, str))


def _cell(value: Any, is_text: bool) -> Any:
    """A swept value as a cell of a table; a list such as layers 0 and 1 as `0+1`.

    Args:
        value: the value that the sweep gives the field.
        is_text: whether every cell of the column is text because some values are lists.
    """
    if isinstance(value, (tuple, list)):
        return "+".join(map(str, value))
    return str(value) if isinstance(value, str) or (is_text and value is not None) else value
