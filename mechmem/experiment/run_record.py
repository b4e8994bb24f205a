"""What run.json must hold, whoever wrote it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Number = float | None
Ends = Annotated[list[Number], Field(min_length=2, max_length=2)]


class _Beside(BaseModel):
    quantity: str
    value: Number
    interval: Ends


class _Rule(BaseModel):
    rule: str


class _Claim(BaseModel):
    """Versions before 0.3 wrote neither `timing` nor what follows it."""

    id: str
    says: str
    verdict: Literal["supported", "refuted", "undetermined", "not testable"]
    reason: str
    rule: str
    effect: Number
    interval: Ends
    timing: Literal["before", "after", "changed", "exploratory"] = "after"
    exploratory: bool | str = False
    requires: list[_Rule] = []
    attainable: _Beside | None = None
    control: _Beside | None = None


class _Quantity(BaseModel):
    value: Number
    low: Number
    high: Number
    labels: dict[str, Any] = {}


class RunRecord(BaseModel):
    """run.json."""

    answer: str
    claims: list[_Claim]
    quantities: dict[str, _Quantity]
    seconds: float = Field(ge=0)
    provenance: dict[str, Any]
    question: str = ""
    missing: dict[str, dict[Annotated[str, Field(pattern=r"^[0-9]{1,18}$")], str]] = {}
    spreads: dict[str, float] = {}
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = {}
    """By path below the folder, the SHA-256 of what is read again: the tables, the spec and its
    plug-ins. Runs before version 0.3 have none."""
