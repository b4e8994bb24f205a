"""Checks of the arguments of `Examples`: one line for the first error, with its remedy."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechmem.spec.errors import InputError, suggest

if TYPE_CHECKING:
    from mechmem.data.examples import Examples

READOUT = "readout"
"""The name of the input positions whose logits score the answer tokens."""
FRAME_COLUMNS = ("text", "given", "true", "is_noisy")
"""Columns of `to_frame` that come before the variables."""


def whole_numbers(name: str, value: Any, n_dims: int) -> Tensor:
    """The tensor of a field as int64, which embeddings and indexing need.

    Args:
        name: name of the field, for the error.
        value: the value passed for it.
        n_dims: number of dimensions that it must have.

    Raises:
        InputError: if it is not a tensor of whole numbers with that many dimensions.
    """
    tensor = _tensor(name, value, n_dims)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{name} has dtype {tensor.dtype}; pass whole numbers: {name}.long()")
    return tensor.long()


def yes_or_no(name: str, value: Any) -> Tensor:
    """The mask of a field. Raises InputError if it is not one."""
    tensor = _tensor(name, value, 1)
    if tensor.dtype != torch.bool:
        raise InputError(f"{name} has dtype {tensor.dtype}; pass a mask: {name}.bool()")
    return tensor


def whole_positions(positions: Any) -> dict[str, int | Tensor]:
    """The positions with plain indices. Raises InputError for a value that is not an index."""
    if not isinstance(positions, Mapping):
        raise InputError(
            f"positions is a {type(positions).__name__}; pass a dictionary from names to an index, "
            "or to a tensor with one index per example"
        )
    return {name: _position(name, index) for name, index in positions.items()}


def check(examples: Examples) -> None:
    """Raises InputError for the first error in these examples."""
    _check_rows(examples)
    _check_answer(examples)
    for name in ("prompt", "given", "true"):
        _check_vocabulary(examples, name)
    _check_filler(examples)
    _check_names(examples)
    for name, index in examples.positions.items():
        _check_position(examples, name, index)
    if examples.counterfactual is not None:
        _check_counterfactual(examples, examples.counterfactual)


def check_prefix(prefix: str) -> None:
    """Raises InputError for anything but the two labels that a model can be fed."""
    labels = ("given", "true")
    if prefix not in labels:
        raise InputError(f"there is no prefix {prefix!r}; {suggest(prefix, labels)}")


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, in order of first occurrence."""
    return [name for name, count in Counter(names).items() if count > 1]


def _tensor(name: str, value: Any, n_dims: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; pass a tensor: torch.tensor({name})")
    if value.ndim != n_dims:
        wanted = "one row per example" if n_dims == 2 else "one value per example"
        raise InputError(
            f"{name} has shape {_shape(value)}, but it needs {n_dims} dimension(s): pass {wanted}"
        )
    return value


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "of a single number"


def _position(name: str, index: Any) -> int | Tensor:
    if isinstance(index, Tensor):
        return whole_numbers(f"positions[{name!r}]", index, 1)
    try:
        return operator.index(index)
    except TypeError as error:
        raise InputError(
            f"positions[{name!r}] is a {type(index).__name__}; pass an index, "
            "or a tensor with one index per example"
        ) from error


def _check_rows(examples: Examples) -> None:
    per_row = {name: getattr(examples, name) for name in ("given", "true", "is_noisy", "index")}
    per_row |= {f"variables[{name!r}]": value for name, value in examples.variables.items()}
    per_row |= {
        f"positions[{name!r}]": index
        for name, index in examples.positions.items()
        if isinstance(index, Tensor)
    }
    n, device = len(examples), examples.prompt.device
    for name, tensor in per_row.items():
        if len(tensor) != n:
            raise InputError(
                f"{name} has shape {_shape(tensor)}, but prompt has {n} row(s): "
                "pass one row per example in each"
            )
        if tensor.device != device:
            raise InputError(
                f"{name} is on {tensor.device}, but prompt is on {device}; use one device"
            )


def _check_answer(examples: Examples) -> None:
    given, true = examples.given, examples.true
    if given.shape != true.shape:
        raise InputError(
            f"given has shape {_shape(given)} and true has shape {_shape(true)}; "
            "pass labels with the same number of tokens"
        )
    if not examples.n_answer:
        raise InputError(f"given has shape {_shape(given)}; an answer needs at least one token")
    if len(examples.places) != examples.n_answer:
        raise InputError(
            f"places has {len(examples.places)} name(s), but the answers in given have "
            f"{examples.n_answer} token(s); name each answer token once"
        )


def _check_vocabulary(examples: Examples, name: str) -> None:
    tokens, size = getattr(examples, name), len(examples.vocabulary)
    lowest = -1 if name == "prompt" else 0
    wrong = ((tokens < lowest) | (tokens >= size)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise InputError(
            f"{name} has the token {int(tokens[row, column])} in row {row}, column {column}, but "
            f"the vocabulary has {size} tokens: pass numbers from 0 to {size - 1}"
        )


def _check_filler(examples: Examples) -> None:
    is_token = examples.prompt >= 0
    # The running product is 1 up to the first filler and 0 from there on.
    gaps = (is_token & (is_token.int().cumprod(dim=1) == 0)).any(dim=1).nonzero()
    if len(gaps):
        raise InputError(
            f"prompt has a token after the filler -1 in row {int(gaps[0])}; "
            "write shorter prompts from the left and fill them up at the end"
        )
    empty = (~is_token.any(dim=1)).nonzero()
    if len(empty):
        raise InputError(f"prompt is empty in row {int(empty[0])}; pass at least one token per row")


def _check_names(examples: Examples) -> None:
    twice = repeated(examples.places)
    if twice:
        raise InputError(f"places has {twice[0]!r} twice; name each answer token once")
    if READOUT in examples.positions:
        raise InputError(
            f"positions has the name {READOUT!r}, which is reserved for the positions from which "
            "the answer tokens are read; rename it"
        )
    for name in FRAME_COLUMNS:
        if name in examples.variables:
            raise InputError(
                f"variables has the name {name!r}, which is a column of every table of examples; "
                "rename it"
            )


def _check_position(examples: Examples, name: str, index: int | Tensor) -> None:
    n_positions = examples.n_positions
    if isinstance(index, Tensor):
        wrong = ((index < -1) | (index >= n_positions)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise InputError(
                f"positions[{name!r}] has the index {int(index[row])} in row {row}, whose input "
                f"has {int(n_positions[row])} positions (the prompt and all but the last answer "
                "token); use -1 where an example lacks the position"
            )
        return
    widest = examples.prompt.shape[1] + examples.n_answer - 1
    shortest = int(n_positions.min()) if len(examples) else widest
    if not 0 <= index < shortest:
        raise InputError(
            f"positions[{name!r}] is {index}, but the shortest input has {shortest} positions (the "
            "prompt and all but the last answer token); pass an index from 0 to "
            f"{shortest - 1}, or a tensor with one index per example"
        )


def _check_counterfactual(examples: Examples, other: Examples) -> None:
    if len(other) != len(examples):
        raise InputError(
            f"counterfactual has {len(other)} example(s), but prompt has {len(examples)} row(s); "
            "pass one counterfactual per example"
        )
    for field in ("places", "vocabulary"):
        if getattr(other, field) != getattr(examples, field):
            raise InputError(
                f"counterfactual and examples differ in {field}; take both from the same task"
            )
