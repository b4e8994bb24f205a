"""Sweeps: fields that take several values in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
)

from mechmem.spec.errors import InputError

T = TypeVar("T")


class Each(BaseModel, Generic[T]):
    """A swept value: `{each: [1, 2]}`, or `{each: all}` for every value that the model, the task or
    the experiment allows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    each: Annotated[
        Annotated[tuple[T, ...], Field(min_length=1), Tag("values")]
        | Annotated[Literal["all"], Tag("all")],
        Discriminator(lambda value: "all" if isinstance(value, str) else "values"),
    ]

    @field_validator("each", mode="before")
    @classmethod
    def _is_not_empty(cls, each: Any) -> Any:
        if isinstance(each, (list, tuple)) and not each:
            raise ValueError("a sweep needs at least one value; for every value write `each: all`")
        return each

    @field_validator("each")
    @classmethod
    def _all_differ(cls, each: Any) -> Any:
        if each != "all" and (twice := repeated(each)):
            raise ValueError(f"{twice[0]!r} is listed twice")
        return each

    def values(self, name: str, sweep_domain: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
        """The values of the sweep.

        Args:
            name: name of the swept field.
            sweep_domain: by the name of a field, the values that `each: all` expands to.

        Raises:
            InputError: for `each: all`, if the domain does not have the field.
        """
        if self.each != "all":
            return self.each
        if name not in sweep_domain:
            raise InputError(
                f"`{name}: {{each: all}}` is not defined for this field; list the values"
            )
        return sweep_domain[name]


def repeated(values: Sequence[Any]) -> list[Any]:
    """The values that also occur earlier in the sequence."""
    with suppress(TypeError):  # in Python, a user may pass lists, which have no hash
        if len(set(values)) == len(values):
            return []
    return [value for i, value in enumerate(values) if value in values[:i]]


def each(*values: Any) -> Any:
    """Sweep a field: `PatchGrid(layer=each(0, 1))`; without values, over all possible ones."""
    return Each(each=values or "all")


def _swept_tag(value: Any) -> str:
    return (
        "each"
        if isinstance(value, Each) or (isinstance(value, Mapping) and "each" in value)
        else "value"
    )


if TYPE_CHECKING:
    # A swept field is read only after `expand` has replaced every `Each`, so its type is that of
    # the value it then has.
    Swept = Annotated[T, "swept"]
else:

    class Swept:
        """`Swept[int]`: an int, or `{each: ...}` over ints."""

        def __class_getitem__(cls, item: Any) -> Any:
            values = Annotated[Each[item], Tag("each")]
            return Annotated[Annotated[item, Tag("value")] | values, Discriminator(_swept_tag)]
