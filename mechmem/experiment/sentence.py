"""The answer's sentence: a template with quantities and verdicts in braces."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mechmem.experiment.measured import Measured
from mechmem.spec.errors import InputError, suggest


class _Sentence(string.Formatter):
    """str.format on measured quantities, without a way to anything private."""

    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, str]:
        name, _, attribute = field_name.partition(".")
        if isinstance(kwargs.get(name), str) and attribute == "verdict":
            return kwargs[name], name
        if not isinstance(kwargs.get(name), Measured):
            raise InputError(
                f"the answer template refers to unknown quantity {name!r}; {suggest(name, kwargs)}"
            )
        measured: Measured = kwargs[name]
        if attribute in ("value", "low", "high", "n_seeds", "percent", "points", "number"):
            return getattr(measured, attribute), name
        if attribute in measured.labels or np.isnan(measured.value):
            return measured.labels.get(attribute, "undefined"), name
        known = ["percent", "number", *measured.labels]
        raise InputError(f"{name} has no {attribute!r}; {suggest(attribute, known)}")

    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{4}", format_spec):  # a sentence of gigabytes
            raise ValueError(f"{format_spec[:20]!r} is too wide")
        return super().format_field(value, format_spec)


def template_fields(template: str) -> list[str]:
    """The names in a template's braces. Raises InputError if it is not a valid template."""
    try:
        return [
            field.partition(".")[0]
            for _, field, _, _ in string.Formatter().parse(template)
            if field is not None
        ]
    except ValueError as error:
        raise InputError(f"the answer {template!r} cannot be filled in: {error}") from error


def render_answer(
    template: str, measured: Mapping[str, Measured], verdicts: Mapping[str, str] | None = None
) -> str:
    """The sentence that answers the question. Raises InputError for an unknown name.

    Args:
        template: such as `{returned.percent} of the true answers return; C7 is {C7.verdict}`.
        measured: quantities by name.
        verdicts: of claims, by their id.
    """
    try:
        return " ".join(_Sentence().vformat(template, (), {**(verdicts or {}), **measured}).split())
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"the answer {template!r} cannot be filled in: {error}") from error
