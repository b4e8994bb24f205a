"""Analysis: a session of models and examples -> one tidy table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd
from pydantic import Field

from mechmem.session import Session
from mechmem.spec.registry import Component


class Analysis(Component, registry="analysis"):
    """A question put to trained models, answered by one tidy table."""

    columns: ClassVar[Mapping[str, str]] = {}
    """What each column of the table means, with its unit; swept fields come beside them."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the table; the kind unless given."""

    @property
    def table_name(self) -> str:
        return self.name or self.kind

    @abstractmethod
    def table(self, session: Session) -> pd.DataFrame:
        """The table of one concrete analysis, nothing in it being swept any more."""

    def run(self, session: Session, sweep_domain: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
        """The tables of all members of the sweep, one below the other, the swept values as
        columns."""
        tables = []
        members = self.expand(sweep_domain)
        of_several = {
            key
            for labels, _ in members
            for key, value in labels.items()
            if isinstance(value, (tuple, list))
        }
        for i, (labels, member) in enumerate(members, start=1):
            swept = ", ".join(f"{key} {_cell(value, True)}" for key, value in labels.items())
            session.say(f"{self.table_name} {i}/{len(members)} {swept}")
            table = member.table(session)
            for column, value in reversed(labels.items()):
                if column not in table:
                    table.insert(0, column, [_cell(value, column in of_several)] * len(table))
            tables.append(table)
        joined = pd.concat(tables, ignore_index=True)
        mixed = [c for c in members[0][0] if c in joined and len(set(joined[c].map(type))) > 1]
        return joined.astype(
            dict.fromkeys(mixed, str)
        )  # a file's column has one type: 2 and "0+1" become words


def _cell(value: Any, is_text: bool) -> Any:
    """A swept value; text throughout a column in which a set such as layers 0 and 1 stands as
    `0+1`."""
    if isinstance(value, (tuple, list)):
        return "+".join(map(str, value))
    return str(value) if is_text and value is not None else value
