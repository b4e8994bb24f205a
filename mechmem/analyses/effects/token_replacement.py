"""TokenReplacement: how many tokens an answer hangs on, by replacing them one at a time and several
together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from mechmem.analyses.analysis import Analysis
from mechmem.data.examples import Examples
from mechmem.interventions.patch import Patch, Source
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import ratio
from mechmem.statistics.rows import Row, over_examples, single

Hits = Mapping[str, Float[np.ndarray, "n place"]]
"""By measure, whether the whole answer and each of its tokens is what it names."""


class TokenReplacement(Analysis):
    """Replaces tokens, or the residual at them, by those of another example, and asks what is
    answered then.

    A look-up that is keyed on few tokens survives the replacement of all others: beside the curve
    stands what a pure look-up on t of the N tokens would show, C(N - t, m) / C(N, m) after m
    replacements, and chance. `tokens_needed` sums over the tokens what is lost when each alone is
    replaced: t for a look-up on t tokens, N for an answer that hangs on all. A lost answer that
    follows the rule on the changed input was an exception to a rule that still runs; one that is
    neither was broken. A key of all tokens looks as distributed as a computation does: read it
    beside the clean instances, and beside knock-outs. In one draw an example has one donor, which
    has another token at every position. Every answer is free (greedy decoding), so that no prefix
    can help.
    Touches: resid_pre. Source: ours, for claim C6 of arXiv:2507.04782.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "layer": "layer before which the residual is replaced; 0: the token",
        "condition": "alone (one named token), together (a random set), look_up_T (pure, on T "
        "tokens) or chance",
        "position": "of `alone` (else empty), the token that is replaced",
        "n_replaced": "number of tokens replaced; empty for chance and tokens_needed",
        "prefix": "greedy: the model is fed its own answer",
        "place": "answer token, or all for the whole answer",
        "measure": "accuracy_given, accuracy_true (of the input as it was), accuracy_rule (what "
        "the rule gives on the "
        "changed input), off_label_rate (none of the three), or tokens_needed",
        "unit": "fraction of the examples; of tokens_needed, tokens",
        "value": "mean over the examples and draws; tokens_needed is undefined where nothing is "
        "given at the baseline",
        "low": "lower end of the bootstrap 95 % interval over examples, of their means over draws",
        "high": "upper end of it",
        "n": "number of examples",
        "per_example": "the means over draws of the examples, in the order of the set",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    examples: Swept[ExampleSetName] = ExampleSetName("noisy")
    layer: Swept[NonNegativeInt] = 0
    """0 replaces the token itself; a later layer also what was gathered at its position before it.
    What a token says then also stands elsewhere, so that look-ups and `tokens_needed` are given for
    layer 0 only."""
    donors: Swept[ExampleSetName] = ExampleSetName("clean")
    """The set whose tokens or residuals take the place."""
    positions: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of prompt positions; all whose token is not the same in every example unless given."""
    n_draws: int = Field(5, ge=1)
    """Random donors, each with a random order in which tokens are replaced."""
    look_up: tuple[PositiveInt, ...] = (1, 2)
    """Numbers of tokens of the look-ups that the curve is compared with."""
    seed: int = 0

    def table(self, session: Session) -> pd.DataFrame:
        examples = session.examples(self.examples)
        positions = self._positions(examples, session.examples(self.donors))
        draws = [
            self._draw(session, examples, positions, self.seed + i) for i in range(self.n_draws)
        ]
        alone = {name: _mean([draw.hits(name) for draw in draws]) for name in positions}
        together = [
            _mean([draw.hits(*draw.order[:m]) for draw in draws]) for m in range(len(positions) + 1)
        ]
        rows = [
            row | {"position": name}
            for name, hits in alone.items()
            for row in _rows(hits, examples, "alone", 1)
        ]
        rows += [
            row for m, hits in enumerate(together) for row in _rows(hits, examples, "together", m)
        ]
        if self.layer == 0:  # later, what a token says also stands where it is not replaced
            rows += [_needed(alone, together[0]), *self._look_ups(positions)]
        rows += [single(session.chance) | {"condition": "chance", "measure": "accuracy_given"}]
        shared = {"examples": self.examples, "layer": self.layer, "prefix": "greedy"}
        empty = {"position": None, "n_replaced": np.nan, "place": "all", "unit": "fraction"}
        return pd.DataFrame([empty | shared | row for row in rows])[[*self.columns]].astype(
            {"n_replaced": float}
        )

    def _positions(self, examples: Examples, donors: Examples) -> list[str]:
        if not examples.is_rectangular or not donors.is_rectangular:
            raise InputError("token_replacement needs prompts of one length, in both sets")
        varies = _varies(examples, donors)
        if self.positions is None:
            every = [(name, _index(examples, name)) for name in examples.positions]
            return [name for name, i in every if i < len(varies) and varies[i]]
        for name in self.positions:
            if name == "readout" or _index(examples, name) >= len(varies):
                raise InputError(
                    f"{name!r} is not in the prompt: the token there is the model's own answer"
                )
        return list(self.positions)

    def _draw(
        self, session: Session, examples: Examples, positions: Sequence[str], seed: int
    ) -> Replacement:
        donors, generator = session.examples(self.donors), torch.Generator().manual_seed(seed)
        varies = _varies(examples, donors)
        at = [i for i in (_index(examples, name) for name in positions) if varies[i]]
        n_same = (examples.prompt[:, None, at] == donors.prompt[None, :, at]).sum(dim=2)
        fits = n_same == 0
        session.demand(
            bool(fits.any(dim=1).all()),
            f"an example of {self.examples!r} shares a token with every example of "
            f"{self.donors!r}, so that not all of {', '.join(positions)} can be replaced at once; "
            "take a larger set of donors, or fewer positions",
        )
        if not fits.any(dim=1).all():
            fits = n_same == n_same.min(dim=1, keepdim=True).values
        chosen = donors.select(
            torch.multinomial(fits.double(), 1, generator=generator)[:, 0]
        ).as_set()
        order = [positions[i] for i in torch.randperm(len(positions), generator=generator)]
        return Replacement(session, session.model(self.model), examples, chosen, self.layer, order)

    def _look_ups(self, positions: Sequence[str]) -> list[Row]:
        """What pure look-ups show. Raises InputError for one on more tokens than there are."""
        n, said = len(positions), {"measure": "accuracy_given"}
        if max(self.look_up, default=0) > n:
            raise InputError(
                f"there are {n} tokens ({', '.join(positions)}), not {max(self.look_up)} to look up"
            )
        left = [(t, m, comb(n - t, m) / comb(n, m)) for t in self.look_up for m in range(n + 1)]
        return [
            single(share) | said | {"condition": f"look_up_{t}", "n_replaced": m}
            for t, m, share in left
        ]


@dataclass(frozen=True, eq=False)
class Replacement:
    """One draw: a donor for each example, and the order in which its tokens come in."""

    session: Session
    model: Model
    examples: Examples
    donors: Examples
    layer: int
    order: Sequence[str]
    known: dict[frozenset[str], Hits] = field(default_factory=dict)

    def hits(self, *names: str) -> Hits:
        """What is answered when the tokens at these positions, or the residual there, are the
        donor's."""
        key = frozenset(names)
        if key not in self.known:
            patches = [self._patch(names)] if names else []
            answer = self.session.greedy(self.model, self.examples, patches)
            self.known[key] = _hits(answer, self._labels(names))
        return self.known[key]

    def _patch(self, names: Sequence[str]) -> Patch:
        source = Source(live=self.donors)
        return Patch(site="resid_pre", layer=self.layer, position=tuple(names), source=source)

    def _labels(self, names: Sequence[str]) -> dict[str, Int[Tensor, "n n_answer"]]:
        if self.session.rule is None:
            raise InputError(
                "this needs the task's rule, to answer the changed inputs: "
                "Session(rule=task.answers)"
            )
        prompt = self.examples.prompt.clone()
        at = [_index(self.examples, name) for name in names]
        prompt[:, at] = self.donors.prompt[:, at]
        return {
            "given": self.examples.given,
            "true": self.examples.true,
            "rule": self.session.rule(prompt),
        }


def _index(examples: Examples, name: str) -> int:
    """The index of a position. Raises InputError where examples differ in it."""
    indices = examples.indices(name)[:, 0]
    if not (indices == indices[0]).all():
        raise InputError(f"position {name!r} is not the same in all examples; leave it out")
    return int(indices[0])


def _varies(examples: Examples, donors: Examples) -> list[bool]:
    """Which tokens of the prompt are not the same in every example."""
    prompts = torch.cat([examples.prompt, donors.prompt])
    return (prompts != prompts[:1]).any(dim=0).tolist()


def _hits(answer: Int[Tensor, "n n_answer"], labels: Mapping[str, Tensor]) -> Hits:
    found = {f"accuracy_{name}": answer == label for name, label in labels.items()}
    found = {
        name: torch.cat([hit.all(dim=1, keepdim=True), hit], dim=1) for name, hit in found.items()
    }
    found["off_label_rate"] = ~torch.stack([*found.values()]).any(dim=0)
    return {name: hit.double().numpy() for name, hit in found.items()}


def _mean(draws: Sequence[Hits]) -> Hits:
    return {name: np.mean([draw[name] for draw in draws], axis=0) for name in draws[0]}


def _rows(hits: Hits, examples: Examples, condition: str, n_replaced: int) -> list[Row]:
    places = ("all", *(examples.places if examples.n_answer > 1 else ()))
    said = {"condition": condition, "n_replaced": n_replaced}
    return [
        over_examples(values[:, i]) | said | {"measure": measure, "place": place}
        for measure, values in hits.items()
        for i, place in enumerate(places)
    ]


def _needed(alone: Mapping[str, Hits], baseline: Hits) -> Row:
    """Over how many tokens the answer is lost, of the answers that are given at the baseline."""
    given = baseline["accuracy_given"][:, 0]
    lost = np.sum([given - hits["accuracy_given"][:, 0] for hits in alone.values()], axis=0)
    return over_examples(ratio(lost, given)) | {
        "condition": "alone",
        "measure": "tokens_needed",
        "unit": "tokens",
    }
