"""TokenReplacement: how many tokens an answer depends on, by replacing one or several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mechmem.analyses.analysis import Analysis
from mechmem.data.examples import Examples
from mechmem.interventions.patch import Patch, Source
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.limits import Draws, Index, Seed, Width
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import ratio
from mechmem.statistics.rows import FRACTION, Row, over_examples, single

Hits = Mapping[str, Float[np.ndarray, "n place"]]
"""For each measure, whether the whole answer (column 0) and each of its tokens is right by it."""


class TokenReplacement(Analysis):
    """Replaces tokens, or the residuals at them, by those of another example and decodes an answer.

    A look-up keyed on a few tokens survives the replacement of all others. The curve is therefore
    compared with chance and with a pure look-up on t of the N tokens, which survives m replacements
    with probability C(N - t, m) / C(N, m). `tokens_needed` sums over all tokens the accuracy that
    is lost when each is replaced alone: it is t for a look-up on t tokens, and N for an answer that
    depends on all N. If the new answer follows the rule on the changed input, the memorised answer
    was an exception to a rule that still works; if it is no label at all, the computation is
    broken. A look-up keyed on all tokens looks as distributed as a computation, so compare with
    clean instances and with knock-outs. In each draw an example has one donor, which differs from
    it at every position. Answers are decoded greedily, so that no prefix can help.
    Touches: resid_pre.
    Source: ours, for claim C6 of arXiv:2507.04782.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "layer": "layer before which the residual is replaced; 0: the token",
        "condition": "alone (one named token), together (a random set), look_up_T (a pure look-up "
        "on T tokens) or chance",
        "position": "for `alone`, the position of the replaced token; otherwise empty",
        "n_replaced": "number of tokens replaced; empty for chance and tokens_needed",
        "prefix": "greedy: the model is fed its own answer",
        "place": "answer token, or all for the whole answer",
        "measure": "accuracy_given, accuracy_true (labels of the original input), accuracy_rule "
        "(the rule's answer to the changed input), off_label_rate (none of the three), or "
        "tokens_needed",
        "unit": "fraction of the examples; for tokens_needed, tokens",
        "value": "mean over the examples and draws; tokens_needed is undefined where no given "
        "label is answered at the baseline",
        "low": "lower end of the bootstrap 95 % interval over examples (over their means over "
        "draws)",
        "high": "upper end of that interval",
        "n": "number of examples",
        "per_example": "the means over draws of the examples, in the order of the set",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint that answers."""
    examples: Swept[ExampleSetName] = ExampleSetName("noisy")
    """The example set."""
    layer: Swept[Index] = 0
    """Layer before which the residual is replaced. 0 replaces the token itself; a later layer also
    replaces information gathered at its position in earlier layers. By then the token's information
    is at other positions too, so look-ups and `tokens_needed` are given for layer 0 only."""
    donors: Swept[ExampleSetName] = ExampleSetName("clean")
    """The set from which replacement tokens or residuals come."""
    positions: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of prompt positions; by default, all at which the token varies between examples."""
    n_draws: Draws = 5
    """Number of random donors, each with a random order in which tokens are replaced."""
    look_up: tuple[Width, ...] = (1, 2)
    """Numbers of key tokens of the pure look-ups that the curve is compared with."""
    seed: Seed = 0
    """Seed of the first draw."""

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
        if self.layer == 0:  # later, other positions hold the token's information too
            rows += [_needed(alone, together[0]), *self._look_ups(positions)]
        rows += [single(session.chance) | {"condition": "chance", "measure": "accuracy_given"}]
        shared = {"examples": self.examples, "layer": self.layer, "prefix": "greedy"}
        empty = {"position": None, "n_replaced": np.nan, "place": "all", "unit": "fraction"}
        return pd.DataFrame([empty | shared | row for row in rows])[[*self.columns]].astype(
            {"n_replaced": float}
        )

    def _positions(self, examples: Examples, donors: Examples) -> list[str]:
        if not examples.is_rectangular or not donors.is_rectangular:
            raise InputError(
                "token_replacement needs prompts of the same length in both sets; choose sets of "
                "rectangular prompts"
            )
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
            f"{self.donors!r}, so {', '.join(positions)} cannot all be replaced together; choose "
            "a larger set of donors, or fewer positions",
        )
        if not fits.any(dim=1).all():
            fits = n_same == n_same.min(dim=1, keepdim=True).values
        chosen = donors.select(
            torch.multinomial(fits.double(), 1, generator=generator)[:, 0]
        ).as_set()
        order = [positions[i] for i in torch.randperm(len(positions), generator=generator)]
        return Replacement(session, session.model(self.model), examples, chosen, self.layer, order)

    def _look_ups(self, positions: Sequence[str]) -> list[Row]:
        """The curves of pure look-ups. Raises InputError for one keyed on more tokens than there
        are positions."""
        n, labels = len(positions), {"measure": "accuracy_given"}
        if max(self.look_up, default=0) > n:
            raise InputError(
                f"look_up {max(self.look_up)} exceeds the {n} replaced tokens "
                f"({', '.join(positions)}); lower it"
            )
        left = [(t, m, comb(n - t, m) / comb(n, m)) for t in self.look_up for m in range(n + 1)]
        return [
            single(share) | labels | {"condition": f"look_up_{t}", "n_replaced": m}
            for t, m, share in left
        ]


@dataclass(frozen=True, eq=False)
class Replacement:
    """One draw: a donor for each example, and the order in which its tokens are inserted."""

    session: Session
    model: Model
    examples: Examples
    donors: Examples
    layer: int
    order: Sequence[str]
    known: dict[frozenset[str], Hits] = field(default_factory=dict)

    def hits(self, *names: str) -> Hits:
        """The measures of the answers when the tokens (or residuals) at these positions are the
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
                "token_replacement needs the task's rule to answer the changed inputs; pass "
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
    """For each prompt token, whether it varies between examples."""
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
    labels = {"condition": condition, "n_replaced": n_replaced}
    return [
        over_examples(values[:, i], FRACTION) | labels | {"measure": measure, "place": place}
        for measure, values in hits.items()
        for i, place in enumerate(places)
    ]


def _needed(alone: Mapping[str, Hits], baseline: Hits) -> Row:
    """The accuracy lost, summed over the tokens replaced alone, relative to the accuracy on given
    labels at the baseline."""
    given = baseline["accuracy_given"][:, 0]
    lost = np.sum([given - hits["accuracy_given"][:, 0] for hits in alone.values()], axis=0)
    return over_examples(ratio(lost, given)) | {
        "condition": "alone",
        "measure": "tokens_needed",
        "unit": "tokens",
    }
