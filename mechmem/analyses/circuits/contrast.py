"""ContrastAnalysis: the base of analyses of which components make a clean run differ from a
corrupted one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.circuits.edges import MOST_ROWS, attributed, patched
from mechmem.analyses.circuits.graph import Graph
from mechmem.analyses.circuits.wiring import Wiring, check_implemented, source_hooks, source_values
from mechmem.data.examples import Examples
from mechmem.interventions.patch import Source
from mechmem.measures.kl import KL
from mechmem.measures.logit import Logit
from mechmem.measures.measure import Measure
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept

Method = Literal["eap", "eap_ig", "exact"]
Endpoint = Literal["clean", "corrupted", "midpoint"]

FIRST = {"clean": 1.0, "corrupted": 0.0, "midpoint": 0.5}
"""Position of the first of the m inputs of EAP-IG on the line from corrupted (0) to clean (m)."""


@dataclass(frozen=True)
class Batch:
    """Some of the examples, with the values of the sources in both runs."""

    examples: Examples
    wiring: Wiring
    clean: Float[Tensor, "source batch pos d_model"]
    baseline: Float[Tensor, "batch n_answer d_vocab"]
    """Logits of the clean run."""


@dataclass(frozen=True)
class Contrast:
    """A model, its clean and its corrupted run on a set of examples, and the metric that compares
    them."""

    session: Session
    model: Model
    examples: Examples
    metric: Measure
    corrupted: Source
    key: tuple[Any, ...]
    """Key under which results are cached on the session."""

    @property
    def graph(self) -> Graph:
        return Graph.of(self.model)

    def measured(self, logits: Tensor, examples: Examples, baseline: Tensor) -> Float[Tensor, " n"]:
        """The metric of the whole answer of each example, under the examples' own prefix.

        Args:
            logits: logits of the answer tokens, on any device, `n n_answer d_vocab`.
            examples: the examples that were answered.
            baseline: logits of the clean run, `n n_answer d_vocab`.
        """
        return self.metric.whole(self.metric(logits.cpu(), examples, baseline.cpu()))

    def losses(self, examples: Examples, baseline: Tensor) -> Callable[[Tensor], Tensor]:
        """The negated metric of each example as a function of their logits."""
        return lambda logits: -self.measured(logits, examples, baseline)

    def loss(self, examples: Examples, baseline: Tensor) -> Callable[[Tensor], Tensor]:
        """The negated metric, summed over the examples, as a function of their logits."""
        return lambda logits: self.losses(examples, baseline)(logits).sum()

    def check_gradient(self, examples: Examples, baseline: Tensor, at_clean: bool = True) -> None:
        """Check that the metric has a gradient.

        Args:
            examples: the examples that were answered.
            baseline: logits of the clean run, `n n_answer d_vocab`.
            at_clean: whether gradients are taken at the clean run only.

        Raises:
            InputError: for a metric without a gradient, or whose gradient is zero at the clean run
                if `at_clean` is set.
        """
        loss = self.loss(examples, baseline)(baseline.detach().requires_grad_())
        if not loss.requires_grad:
            raise InputError(
                f"{self.metric.name} has no gradient; attribute a logit or a probability instead"
            )
        if isinstance(self.metric, KL) and at_clean:
            raise InputError(
                "the gradient of kl is zero at the clean run, its minimum; choose eap_ig, exact or "
                "another metric"
            )

    def check_change(self, *scores: Tensor) -> None:
        """Raises InputError if all scores are 0, as for the logit difference on clean examples."""
        if not any(s.any() for s in scores):
            raise InputError(
                f"the gradient of {self.metric.name} is zero on these examples, so every score is "
                "0; choose another metric"
            )

    def both_runs(
        self, hooks: Collection[str]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The clean and the corrupted activations at these hooks; corrupted ones that are a mean
        over a set have a batch of 1."""
        model, rows = self.corrupted.run(self.session, self.model, self.examples)
        clean = self.session.activations(self.model, self.examples, hooks)
        if self.corrupted.mean_over is None:
            return clean, self.session.activations(model, rows, hooks)
        rows = self.session.examples(self.corrupted.mean_over).with_prefix(self.examples.prefix)
        theirs = self.session.activations(model, rows, hooks)
        return clean, {
            hook: activation.mean(0, keepdim=True) for hook, activation in theirs.items()
        }

    def batches(self) -> Iterator[Batch]:
        """The examples in batches, with the values of the sources in both runs.

        Raises:
            InputError: if the corrupted run is of another model, whose edges are not this one's, or
                if circuits are not implemented for the model.
        """
        check_implemented(self.model)
        if self.corrupted.run(self.session, self.model, self.examples)[0] is not self.model:
            raise InputError(
                "the corrupted run of a circuit must be the same model on another input, not "
                "another checkpoint; leave `checkpoint` out"
            )
        clean, corrupted = self.both_runs(source_hooks(self.graph))
        for rows in torch.arange(len(self.examples)).split(MOST_ROWS):
            theirs = {hook: t if len(t) == 1 else t[rows] for hook, t in corrupted.items()}
            yield self._batch(
                self.examples.select(rows), {hook: t[rows] for hook, t in clean.items()}, theirs
            )

    @torch.no_grad()
    def _batch(
        self, examples: Examples, clean: Mapping[str, Tensor], corrupted: Mapping[str, Tensor]
    ) -> Batch:
        wiring = Wiring(self.model, source_values(self.model, corrupted), examples.n_answer)
        values = source_values(self.model, clean)
        return Batch(examples, wiring, values, wiring.logits(values)[0])

    def scores(
        self, method: Method, steps: int = 5, endpoint: Endpoint = "clean"
    ) -> Float[Tensor, "source target"]:
        """The score of each edge, mean over the examples; arguments as for `scores_by_example`."""
        return self.scores_by_example(method, steps, endpoint).mean(0)

    def scores_by_example(
        self, method: Method, steps: int = 5, endpoint: Endpoint = "clean"
    ) -> Float[Tensor, "n source target"]:
        """The score of each edge for each example, in the unit of the metric.

        Args:
            method: gradients at the clean input (eap) or averaged over inputs between corrupted
                and clean (eap_ig), or patching each edge (exact).
            steps: number of inputs over which EAP-IG averages gradients.
            endpoint: the end of the line from corrupted to clean that is one of these inputs.
        """
        chosen = (steps, endpoint) if method == "eap_ig" else ()

        def make() -> Tensor:
            m = steps if method == "eap_ig" else 1
            first = FIRST[endpoint] if method == "eap_ig" else 1.0
            points = [(k + first) / m for k in range(m)]
            batches = [self._batch_scores(batch, method, points) for batch in self.batches()]
            scores = torch.cat(batches)
            self.session.count(self.examples, self.graph.n_edges if method == "exact" else m)
            if method != "exact":
                self.check_change(scores)
            return scores

        return self.session.cached(("edge scores", *self.key, method, *chosen), make)

    def _batch_scores(self, batch: Batch, method: Method, points: list[float]) -> Tensor:
        losses = self.losses(batch.examples, batch.baseline)
        if method == "exact":
            return patched(batch.wiring, batch.clean, losses)
        self.check_gradient(batch.examples, batch.baseline, at_clean=points == [1.0])
        return attributed(batch.wiring, batch.clean, losses, points)

    @torch.no_grad()
    def values(self, circuits: Bool[Tensor, "circuit source target"]) -> Float[Tensor, "circuit n"]:
        """The metric of each example when all edges outside the circuit carry corrupted values."""
        unlike, back = circuits.flatten(1).unique(dim=0, return_inverse=True)
        found = []
        for batch in self.batches():
            edges = unlike.unflatten(1, circuits.shape[1:]).to(batch.clean)
            for_each = [
                self.measured(logits, batch.examples, batch.baseline)
                for part in edges.split(max(1, MOST_ROWS // len(batch.examples)))
                for logits in batch.wiring.logits(batch.clean[:1], part)
            ]
            found.append(torch.stack(for_each))
        self.session.count(self.examples, len(unlike))
        return torch.cat(found, dim=1)[back]


class ContrastAnalysis(Analysis):
    """An analysis of which components make the metric differ between each example and its
    corrupted run.

    The clean run reads the example. The corrupted run reads its minimal pair (with the pair's own
    answer as prefix), or the input that `corrupted` names. The metric is that of the whole answer
    under the prefix of the example set: for logits the mean over the answer tokens, for
    probabilities their product.
    """

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint that is analysed."""
    examples: Swept[ExampleSetName] = ExampleSetName("noisy")
    """The example set; it needs `pair:` if the metric or the corrupted run uses minimal pairs."""
    metric: Measure = Logit(label="given", against="pair")
    """The metric of each example's whole answer."""
    corrupted: Source = Source(pair=True)
    """The corrupted run; by default, the minimal pair of each example."""

    def contrast(
        self,
        session: Session,
        model: str | None = None,
        examples: str | None = None,
        metric: Measure | None = None,
    ) -> Contrast:
        """The clean and the corrupted run, with their metric.

        Args:
            session: gives models and example sets.
            model: name of a model; by default, the field `model`.
            examples: name of an example set; by default, the field `examples`.
            metric: a metric; by default, the field `metric`.

        Raises:
            InputError: for a metric that is the same for every model on these examples.
        """
        metric = metric or self.metric
        name = examples or self.examples
        runs = session.model(model or self.model), session.examples(name)
        if instead := metric.constant_on(runs[1]):
            raise InputError(f"{metric.name} on {name!r}: {instead}")
        source = self.corrupted
        named = (source.live,) if source.live is not None else (source, *session.referred(source))
        return Contrast(session, *runs, metric, source, (*runs, metric, *named))


def correlation(x: pd.Series, y: pd.Series) -> float:
    """Pearson's r (Spearman's, if the values are ranks). NaN for fewer than three values, or if one
    of the two series is constant."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.pearsonr(x, y).statistic)
