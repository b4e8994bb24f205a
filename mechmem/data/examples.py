"""Examples: a set of task instances with their given and true labels, variables and named
positions."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Int
from torch import Tensor

from mechmem.data.checks import (
    FRAME_COLUMNS,
    READOUT,
    check,
    check_prefix,
    repeated,
    whole_numbers,
    whole_positions,
    yes_or_no,
)
from mechmem.data.example import Example, line
from mechmem.spec.errors import InputError, suggest

if TYPE_CHECKING:
    import pandas as pd

Label = Literal["given", "true"]
AnyLabel = Literal["given", "true", "pair"]
Value = TypeVar("Value")

ROW_FIELDS = ("prompt", "given", "true", "is_noisy", "index")
"""Fields that are tensors with one row per example."""


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Instances of one task, aligned row by row.

    `given` are the labels of the training set (wrong where `is_noisy`), `true` the correct ones.
    `prefix` is the label whose tokens the model is fed before each answer token. Accuracies depend
    on it, so a set always has exactly one.

    Prompts may differ in length: shorter ones end in the filler -1. Such a set has no single tensor
    of tokens; `buckets` splits it into parts that have one, and `indices` finds named positions in
    each example. All answers of a set have the same number of tokens.

    `len`, iteration and indexing work: `examples[3]` is one readable example; `examples[:10]`, a
    mask or a tensor of rows gives `Examples`.

    Raises InputError for fields that are inconsistent with each other or the vocabulary. Tensors
    are not copied: changing them in place changes the set.
    """

    # jaxtyping's import hook would check the arguments first and raise its own errors, not ours.
    __no_type_check__ = True

    prompt: Int[Tensor, "n n_prompt"]
    """Tokens of the prompts; shorter prompts are filled up with -1 at the end."""
    given: Int[Tensor, "n n_answer"]
    """Tokens of the labels of the training set."""
    true: Int[Tensor, "n n_answer"]
    """Tokens of the correct labels."""
    is_noisy: Bool[Tensor, " n"]
    """Whether the given label is a wrong one."""
    variables: Mapping[str, Int[Tensor, " n"]]
    """Intermediate results and other properties of the examples, by name."""
    positions: Mapping[str, int | Int[Tensor, " n"]]
    """The index of every input position by name: the same in every example, or a tensor with one
    index per example (-1 where an example lacks the position)."""
    places: tuple[str, ...]
    """Name of every answer token, in the order of the answer."""
    vocabulary: tuple[str, ...]
    """The readable form of every token."""
    prefix: Label = "given"
    """The label whose earlier tokens the model is fed."""
    index: Int[Tensor, " n"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Row of each example in the set from which it was selected."""
    counterfactual: Examples | None = None
    """The minimal pair of each row, if the set was made with pairs; its prompts may have other
    lengths."""
    parent: Examples | None = None
    """The set from which these rows were selected; None for a set of its own."""
    token_variables: tuple[str, ...] = ()
    """Variables whose values are tokens."""
    name: str = ""
    """Name of the set in an experiment or session."""
    requested: int | None = None
    """Number of examples that were requested, if fewer exist; otherwise None."""

    def __post_init__(self) -> None:
        parts = {name: whole_numbers(name, getattr(self, name), 2) for name in ROW_FIELDS[:3]}
        index = whole_numbers("index", self.index, 1)
        if not len(index):
            index = torch.arange(len(parts["prompt"]), device=parts["prompt"].device)
        self._set(
            **parts,
            index=index,
            is_noisy=yes_or_no("is_noisy", self.is_noisy),
            variables={
                name: whole_numbers(f"variables[{name!r}]", value, 1)
                for name, value in self.variables.items()
            },
            positions=whole_positions(self.positions),
            places=tuple(self.places),
            vocabulary=tuple(self.vocabulary),
        )
        check_prefix(self.prefix)
        check(self)
        self._set(prompt=self._without_spare_filler())
        if self.counterfactual is not None and self.counterfactual.name != self.name:
            self._set(counterfactual=self.counterfactual.with_name(self.name))

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _derived(self, **changes: Any) -> Self:
        """The same examples with some fields changed, *without* validation.

        Every derivation below starts from a valid set and cannot produce an invalid one. They are
        called in inner loops, where checks would cost more than the work itself.
        """
        made = object.__new__(type(self))
        made._set(**(self.__getstate__() | changes))
        return made

    def _with_tensors(self, change: Callable[[Tensor], Tensor], **changes: Any) -> Self:
        """The same examples with `change` applied to each of their tensors."""
        return self._derived(
            **{name: change(getattr(self, name)) for name in ROW_FIELDS},
            variables={name: change(value) for name, value in self.variables.items()},
            positions={
                name: change(index) if isinstance(index, Tensor) else index
                for name, index in self.positions.items()
            },
            **changes,
        )

    def __getstate__(self) -> dict[str, Any]:
        # Only the fields: the cache of `_kept` relies on the versions of tensors, which start again
        # in a copy or a pickle.
        return {f.name: self.__dict__[f.name] for f in fields(self)}

    def _kept(self, name: str, make: Callable[[], Value], others: Sequence[Tensor] = ()) -> Value:
        """The result of `make`, cached until prompt, labels, `others` or the cached tensor are
        changed in place."""
        sources = (self.prompt, self.given, self.true, *others)
        if torch.is_inference_mode_enabled() or any(t.is_inference() for t in sources):
            return make()  # tensors of torch.inference_mode have no versions
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in sources)
        known_versions, known = self.__dict__.get(f"_kept_{name}", (None, None))
        if known_versions == (versions, _version(known)):
            return known
        made = make()
        self.__dict__[f"_kept_{name}"] = ((versions, _version(made)), made)
        return made

    def __len__(self) -> int:
        return len(self.prompt)

    def __iter__(self) -> Iterator[Example]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, rows: Any) -> Any:
        """An `Example` for a number, `Examples` for a slice, a mask or several rows."""
        try:
            row = operator.index(rows)
        except TypeError:
            return self.select(rows)
        if not -len(self) <= row < len(self):
            raise IndexError(
                f"there is no example {row}: rows are numbered 0 to {len(self) - 1}"
                if len(self)
                else f"there is no example {row}: the set is empty"
            )
        return Example(
            index=int(self.index[row]),
            prompt=self._words(self.prompt[row].tolist()),
            given=self._words(self.given[row].tolist()),
            true=self._words(self.true[row].tolist()),
            is_noisy=bool(self.is_noisy[row]),
            variables={name: int(value[row]) for name, value in self.variables.items()},
        )

    def __repr__(self) -> str:
        parts = [f"{len(self)} examples", f"{int(self.is_noisy.sum())} noisy"]
        if not self.is_rectangular:
            shortest, longest = self._range_of_lengths()
            parts.append(f"prompts of {shortest} to {longest} tokens")
        parts.append(f"prefix {self.prefix}")
        if self.counterfactual is not None:
            parts.append("with counterfactuals")
        if self.note:
            parts.append(self.note)
        name = f" {self.name!r}" if self.name else ""
        example = f"; the first: {self.text(0)}" if len(self) else ""
        return f"<Examples{name}: {', '.join(parts)}{example}>"

    @property
    def note(self) -> str:
        """A note if fewer examples exist than were requested; otherwise empty."""
        if self.requested is None:
            return ""
        return f"{len(self)} of the {self.requested} requested examples exist"

    @property
    def n_answer(self) -> int:
        """Number of answer tokens; they are read from the logits at the last `n_answer` input
        positions."""
        return self.given.shape[1]

    @property
    def lengths(self) -> Int[Tensor, " n"]:
        """Number of prompt tokens of each example."""
        return self._kept("lengths", lambda: (self.prompt >= 0).sum(dim=1))

    @property
    def n_positions(self) -> Int[Tensor, " n"]:
        """Number of input positions of each example: the prompt and all but the last answer
        token."""
        return self.lengths + self.n_answer - 1

    @property
    def is_rectangular(self) -> bool:
        """Whether all prompts have the same length, so that `tokens` exists."""
        return self._kept(
            "is_rectangular", lambda: bool((self.lengths == self.prompt.shape[1]).all())
        )

    @property
    def whole(self) -> Examples:
        """The set to whose rows `index` refers, with the same prefix."""
        return self if self.parent is None else self.parent.with_prefix(self.prefix)

    def labels(self, label: AnyLabel) -> Int[Tensor, "n n_answer"]:
        """The given labels, the true ones, or (`pair`) the true ones of the minimal pairs. Raises
        InputError if there are no pairs."""
        if label == "pair":
            if self.counterfactual is None:
                raise InputError(
                    "a measure of the pair's label needs an example set that was made with `pair:`"
                )
            return self.counterfactual.true
        return self.given if label == "given" else self.true

    @property
    def tokens(self) -> Int[Tensor, "n pos"]:
        """The model's input: the prompt and all but the last token of the `prefix` label.

        Raises InputError if the prompts differ in length.
        """
        return self._kept("tokens", self._tokens)

    def _tokens(self) -> Tensor:
        if not self.is_rectangular:
            shortest, longest = self._range_of_lengths()
            raise InputError(
                f"these prompts have {shortest} to {longest} tokens, so they do not form one "
                "tensor; iterate over `examples.buckets()`, and find positions with "
                "`examples.indices(...)`"
            )
        return torch.cat([self.prompt, self.labels(self.prefix)[:, :-1]], dim=1)

    def _range_of_lengths(self) -> tuple[int, int]:
        return int(self.lengths.min()), int(self.lengths.max())

    def buckets(self) -> list[tuple[Tensor, Self]]:
        """Parts with prompts of equal length, shortest first, as (rows in this set, part).

        Together the parts contain every row once. If all prompts have the same length, the set
        itself is the only part.
        """
        if self.is_rectangular:
            return [(torch.arange(len(self), device=self.prompt.device), self)]
        parts = []
        for length in self.lengths.unique().tolist():
            rows = (self.lengths == length).nonzero()[:, 0]
            parts.append((rows, self.select(rows)))
        return parts

    def indices(self, names: str | Sequence[str]) -> Int[Tensor, "n k"]:
        """The input positions of these names in each example; -1 where an example lacks one.

        `readout` means the last `n_answer` input positions, from which the answer tokens are read.

        Raises:
            InputError: if no name is given, a name is unknown, or two names mean the same position.
        """
        chosen = (names,) if isinstance(names, str) else tuple(names)
        if not chosen:
            raise InputError(f"no position is named; choose from: {', '.join(self._known())}")
        twice = repeated(chosen)
        if twice:
            raise InputError(f"position {twice[0]!r} is named twice; name each position once")
        found = torch.cat([self._columns(name) for name in chosen], dim=1)
        ordered = found.sort(dim=1).values
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise InputError(
                f"the positions {', '.join(chosen)} overlap; name each input position once"
            )
        return found

    def _columns(self, name: str) -> Tensor:
        if name == READOUT:
            steps = torch.arange(self.n_answer, device=self.prompt.device)
            return rearrange(self.lengths - 1, "n -> n 1") + steps
        if name not in self.positions:
            raise InputError(f"there is no position {name!r}; {suggest(name, self._known())}")
        index = self.positions[name]
        if isinstance(index, Tensor):
            return rearrange(index, "n -> n 1")
        return repeat(torch.tensor([index], device=self.prompt.device), "k -> n k", n=len(self))

    def _known(self) -> list[str]:
        return [*self.positions, READOUT]

    def with_prefix(self, prefix: Label) -> Self:
        """The same examples, with the model fed the earlier tokens of this label."""
        check_prefix(prefix)
        counterfactual = _changed(self.counterfactual, lambda other: other.with_prefix(prefix))
        return self._derived(prefix=prefix, counterfactual=counterfactual)

    def with_name(self, name: str) -> Self:
        """The same examples and counterfactuals under this name."""
        counterfactual = _changed(self.counterfactual, lambda other: other.with_name(name))
        return self._derived(name=name, counterfactual=counterfactual)

    def with_requested(self, n: int | None) -> Self:
        """The same examples with the number that was requested; None if all were found."""
        return self._derived(requested=n)

    def with_true(self, labels: Int[Tensor, "n n_answer"]) -> Self:
        """The same examples with other labels in the place of the true ones."""
        return self._derived(true=labels)

    def continued_with(self, answer: Int[Tensor, "n n_answer"]) -> Self:
        """The same examples, with the model fed the earlier tokens of `answer`, as in greedy
        decoding."""
        if answer.shape != self.given.shape:
            raise InputError(
                f"answer has shape {tuple(answer.shape)}, but these examples have answers of shape "
                f"{tuple(self.given.shape)}; pass one answer per example"
            )
        return self._derived(given=answer, prefix="given")

    def select(self, rows: Tensor | Sequence[int] | Sequence[bool] | slice) -> Self:
        """The examples in these rows (indices, a mask or a slice)."""
        chosen = self._rows(rows)
        selected = self._with_tensors(
            lambda tensor: tensor[chosen],
            counterfactual=_changed(self.counterfactual, lambda other: other.select(chosen)),
            parent=self if self.parent is None else self.parent,
            requested=None,
        )
        if not self.is_rectangular:
            selected._set(prompt=selected._without_spare_filler())
        return selected

    def _rows(self, rows: Tensor | Sequence[int] | Sequence[bool] | slice) -> Tensor:
        if isinstance(rows, slice):
            rows = torch.arange(len(self), device=self.prompt.device)[rows]
        chosen = rows if isinstance(rows, Tensor) else torch.as_tensor(rows)
        if not chosen.numel():
            chosen = chosen.long() if chosen.is_floating_point() else chosen  # `select([])`
        if chosen.ndim != 1 or chosen.is_floating_point():
            raise InputError(
                f"rows are a {chosen.dtype} tensor of shape {tuple(chosen.shape)}; "
                "pass a list of row numbers or a mask with one value per example"
            )
        if chosen.dtype == torch.bool and len(chosen) != len(self):
            raise InputError(
                f"the mask has {len(chosen)} value(s), but the set has {len(self)} examples; "
                "pass one value per example"
            )
        # All integer types are row numbers, but torch would treat uint8 as a mask.
        return chosen if chosen.dtype in (torch.bool, torch.long) else chosen.long()

    def _without_spare_filler(self) -> Tensor:
        """The prompts, cut to the width of the longest."""
        return self.prompt[:, : int(self.lengths.max())] if len(self) else self.prompt

    def as_set(self) -> Self:
        """The same examples as a set of their own, with rows numbered from 0."""
        counterfactual = _changed(self.counterfactual, lambda other: other.as_set())
        index = torch.arange(len(self), device=self.prompt.device)
        return self._derived(index=index, counterfactual=counterfactual, parent=None)

    def to(self, device: torch.device | str) -> Self:
        """The same examples on another device."""
        return self._with_tensors(
            lambda tensor: tensor.to(device),
            counterfactual=_changed(self.counterfactual, lambda other: other.to(device)),
            parent=_changed(self.parent, lambda other: other.to(device)),
        )

    def clone(self) -> Self:
        """A copy of the examples with tensors of its own, which no other code can change."""
        return self._with_tensors(
            lambda tensor: tensor.clone(),
            counterfactual=_changed(self.counterfactual, lambda other: other.clone()),
            parent=_changed(self.parent, lambda other: other.clone()),
        )

    @property
    def key(self) -> str:
        """A hash of the model's input, for caches of activations."""
        return self._kept("key", self._key)

    def _key(self) -> str:
        found = hashlib.sha256()
        for rows, part in self.buckets():
            found.update(str(tuple(part.tokens.shape)).encode())
            for tensor in (rows, part.tokens):
                found.update(tensor.contiguous().cpu().numpy().tobytes())
        return f"{found.hexdigest()[:16]}-{len(self)}"

    @property
    def content_key(self) -> str:
        """A hash of the whole content of the examples, for caches of results."""
        per_example = [index for index in self.positions.values() if isinstance(index, Tensor)]
        known = [self.index, self.is_noisy, *self.variables.values(), *per_example]
        own = self._kept("content_key", self._content_key, known)
        # Not cached with the rest: the tensors of the pair may change in place too.
        pair = "" if self.counterfactual is None else self.counterfactual.content_key
        return f"{own}-{self.prefix}-{pair}"

    def _content_key(self) -> str:
        found = hashlib.sha256(self.key.encode())
        known: dict[str, Tensor | int] = {"given": self.given, "true": self.true}
        known |= {"index": self.index, "is_noisy": self.is_noisy}
        known |= {**self.variables, **self.positions}
        for name, value in known.items():
            found.update(
                name.encode() + torch.as_tensor(value).cpu().contiguous().numpy().tobytes()
            )
        return found.hexdigest()[:16]

    def text(self, row: int) -> str:
        """One example in readable form: `3 4 7 1 + 2 9 0 8 = 0 6 3 7 9`."""
        parts = (self.prompt, self.given, self.true)
        return line(*(self._words(part[row].tolist()) for part in parts))

    def _words(self, tokens: list[int]) -> str:
        return " ".join(self.vocabulary[token] for token in tokens if token >= 0)

    def to_frame(self) -> pd.DataFrame:
        """One row per example: its text, labels, whether it is noisy, and its variables.

        The index is the row in the set from which the examples were selected.
        """
        import pandas as pd

        prompts, given, true = (
            [self._words(tokens) for tokens in part.tolist()]
            for part in (self.prompt, self.given, self.true)
        )
        texts = [line(*row) for row in zip(prompts, given, true, strict=True)]
        first = (texts, given, true, self.is_noisy.tolist())
        columns = dict(zip(FRAME_COLUMNS, first, strict=True))
        variables = {name: value.tolist() for name, value in self.variables.items()}
        return pd.DataFrame(columns | variables, index=pd.Index(self.index.tolist(), name="row"))


N_TRIES = 100
"""Draws after which a third label counts as impossible."""


def third_labels(examples: Examples, seed: int = 0) -> Int[Tensor, "n n_answer"]:
    """A third label for each example, neither the given nor the true one: the given label of
    another example, drawn at random.

    Args:
        examples: with their labels.
        seed: seed of the draw.

    Raises:
        InputError: if the examples have too few different labels.
    """
    generator, given = torch.Generator().manual_seed(seed), examples.given
    drawn = torch.randint(len(given), (len(given),), generator=generator)
    for _ in range(N_TRIES):
        taken = [(given[drawn] == examples.labels(x)).all(dim=1) for x in ("given", "true")]
        open_rows = (taken[0] | taken[1]).nonzero()[:, 0]
        if not len(open_rows):
            return given[drawn]
        drawn[open_rows] = torch.randint(len(given), (len(open_rows),), generator=generator)
    raise InputError(
        "an example has no third label: its set has too few different given labels; take more "
        "examples"
    )


def concatenate(first: Examples, second: Examples) -> Examples:
    """Two sets of the same task, one after the other, without counterfactuals.

    Variables that only one of the sets has are dropped. A position that only one of them has is -1
    in the other's examples.

    Raises InputError if the sets differ in places, vocabulary or prefix.
    """
    for name in ("places", "vocabulary", "prefix"):
        if getattr(first, name) != getattr(second, name):
            raise InputError(f"the two sets differ in {name}; concatenate sets that agree in it")
    shared = [name for name in first.variables if name in second.variables]
    return Examples(
        prompt=_joined_prompts(first.prompt, second.prompt),
        given=torch.cat([first.given, second.given]),
        true=torch.cat([first.true, second.true]),
        is_noisy=torch.cat([first.is_noisy, second.is_noisy]),
        variables={
            name: torch.cat([first.variables[name], second.variables[name]]) for name in shared
        },
        positions={
            name: _joined_position(name, first, second)
            for name in {**first.positions, **second.positions}
        },
        places=first.places,
        vocabulary=first.vocabulary,
        prefix=first.prefix,
        token_variables=tuple(name for name in first.token_variables if name in shared),
        name=first.name if first.name == second.name else "",
    )


def _joined_prompts(first: Tensor, second: Tensor) -> Tensor:
    width = max(first.shape[1], second.shape[1])
    filled = [
        torch.nn.functional.pad(prompt, (0, width - prompt.shape[1]), value=-1)
        for prompt in (first, second)
    ]
    return torch.cat(filled)


def _joined_position(name: str, first: Examples, second: Examples) -> int | Tensor:
    indices = [examples.positions.get(name, -1) for examples in (first, second)]
    if isinstance(indices[0], int) and indices[0] == indices[1]:
        return indices[0]
    return torch.cat(
        [
            index if isinstance(index, Tensor) else torch.full_like(examples.index, index)
            for index, examples in zip(indices, (first, second), strict=True)
        ]
    )


def _changed(other: Examples | None, change: Callable[[Examples], Examples]) -> Examples | None:
    return None if other is None else change(other)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
