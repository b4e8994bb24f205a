"""Attribution: how much the metric depends on each head, MLP and neuron, estimated from one
gradient and optionally checked by exact patching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechmem.analyses.circuits.contrast import Contrast, ContrastAnalysis, correlation
from mechmem.interventions.patch import Patch
from mechmem.session import Session
from mechmem.spec.limits import Index
from mechmem.statistics.intervals import interval


class Components(NamedTuple):
    """One scored activation: the embedding, or a layer's heads, MLP or neurons.

    Its units are along axis 2. The component `token` is the embedding, scored position by
    position.
    """

    component: str
    layer: int
    hook: str


N_TRIED_DRY = 8
"""Units of one kind and layer that stand for all of them in a dry run."""
SITES = {"embed": "embed", "head": "z", "mlp": "mlp_out", "neuron": "neurons"}
"""The site of each kind of component."""


class Attribution(ContrastAnalysis):
    """Attribution patching: a first-order estimate of how much the metric needs each component.

    A score is the sum over positions of (corrupted - clean activation) . gradient of the negated
    metric at the clean run: to first order, the loss of the metric when the component takes its
    corrupted value. Useful components have positive scores. The estimate fails where the model
    saturates. `exact` therefore patches the components with the largest |score| one at a time, and
    the correlation shows how far to trust the other scores.
    Touches: embed, z of each head, mlp_out and every neuron.
    Source: arXiv:2310.10348; exact: arXiv:2309.16042.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "measure": "name of the attributed metric",
        "unit": "unit of the metric, the scores and the exact effects",
        "component": "embed, head, mlp or neuron",
        "layer": "layer of the component; -1 for embed",
        "index": "number of the head or neuron; 0 for embed and mlp",
        "value": "attribution score, mean over the examples (positive: useful)",
        "low": "lower end of the bootstrap 95 % interval over examples",
        "high": "upper end of that interval",
        "exact": "loss of the metric when this component alone is patched, mean over the examples; "
        "undefined if not requested",
        "n": "number of examples",
        "pearson": "correlation of score and exact over the patched neurons of the layer, or over "
        "its patched heads and MLP (-1..1); undefined for fewer than three",
        "spearman": "rank correlation over the same components (-1..1); undefined likewise",
    }

    neurons: bool = True
    """Whether to score every MLP neuron too."""
    exact: Index | Literal["all"] = 0
    """How many neurons of each layer, and how many of its heads and MLP, are also patched exactly:
    those with the largest |score|."""

    def table(self, session: Session) -> pd.DataFrame:
        contrast = self.contrast(session)
        scored = components(contrast, self.neurons)
        scores = scores_of(contrast, scored)
        table = pd.concat([_rows(c, values) for c, values in zip(scored, scores, strict=True)])
        table = table.assign(exact=np.nan, n=len(contrast.examples))
        layers = table.groupby([table["component"] == "neuron", "layer"], sort=False)
        table = pd.concat(
            [self._with_exact(contrast, scored, rows) for _, rows in layers], ignore_index=True
        )
        shared = {
            "examples": self.examples,
            "measure": self.metric.name,
            "unit": self.metric.unit,
        }
        return table.assign(**shared)[list(self.columns)]

    def _with_exact(
        self, contrast: Contrast, scored: Sequence[Components], rows: pd.DataFrame
    ) -> pd.DataFrame:
        """The rows of a layer's neurons, or of its other components, with the exact effects of
        those with the largest scores."""
        rows = rows.reset_index(drop=True)
        n = len(rows) if self.exact == "all" else self.exact
        chosen = rows["value"].abs().nlargest(n).index
        for one in scored:
            of_one = (one.component, one.layer)
            at = [i for i in chosen if (rows["component"][i], rows["layer"][i]) == of_one]
            if at:
                rows.loc[at, "exact"] = _exact(contrast, one, rows["index"][at].tolist())
        both = rows.dropna(subset="exact")
        ranks = (both["value"].rank(), both["exact"].rank())
        pearson = correlation(both["value"], both["exact"])
        return rows.assign(pearson=pearson, spearman=correlation(*ranks))


def components(contrast: Contrast, neurons: bool = True) -> list[Components]:
    """The components that are scored, in the order of the model."""
    graph, found = contrast.graph, [Components("embed", -1, "hook_embed")]
    for layer in range(graph.n_layers):
        found.append(Components("head", layer, f"blocks.{layer}.attn.hook_z"))
        if graph.has_mlp:
            if neurons:
                found.append(Components("neuron", layer, f"blocks.{layer}.mlp.hook_post"))
            found.append(Components("mlp", layer, f"blocks.{layer}.hook_mlp_out"))
    return found


def scores_of(contrast: Contrast, scored: Sequence[Components]) -> list[Float[Tensor, "n unit"]]:
    """The score of every unit for every example."""
    key = ("attribution", *contrast.key, *scored)
    return contrast.session.cached(key, lambda: _scores(contrast, scored))


def _scores(contrast: Contrast, scored: Sequence[Components]) -> list[Tensor]:
    examples, hooks = contrast.examples, [one.hook for one in scored]
    first = examples.select([0])
    contrast.check_gradient(first, contrast.session.baseline(contrast.model, first))

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        part = examples.select(rows)
        return contrast.loss(part, logits.detach())(logits)

    _, corrupted = contrast.both_runs(hooks)
    batches = []
    for batch in contrast.session.gradients(contrast.model, examples, loss, hooks):
        of_batch = []
        for one in scored:
            theirs = corrupted[one.hook]
            theirs = theirs if len(theirs) == 1 else theirs[batch.rows.to(theirs.device)]
            change = theirs - batch.activations[one.hook]
            of_batch.append(_summed(one.component, change * batch.gradients[one.hook]).cpu())
        batches.append(of_batch)
    scores = [torch.cat(of_one) for of_one in zip(*batches, strict=True)]
    contrast.check_change(*scores)
    return scores


def _summed(component: str, product: Float[Tensor, "n pos ..."]) -> Float[Tensor, "n unit"]:
    """The sum over positions (unless they are the units) and over the dimensions of each unit."""
    if component == "token":
        return product.sum(-1)
    if component == "neuron":
        return product.sum(1)
    return product.sum(1).sum(-1, keepdim=component in ("embed", "mlp"))


def _rows(one: Components, scores: Float[Tensor, "n unit"]) -> pd.DataFrame:
    matrix = scores.double().numpy().T
    low, high = interval(matrix)
    columns: dict[str, Any] = {
        "component": one.component,
        "layer": one.layer,
        "index": np.arange(len(matrix)),
    }
    return pd.DataFrame(columns | {"value": matrix.mean(1), "low": low, "high": high})


def _exact(contrast: Contrast, one: Components, chosen: Sequence[int]) -> list[float]:
    """How much the metric loses when each of the chosen units is patched alone."""
    patch = Patch(
        site=SITES[one.component],
        layer=None if one.component == "embed" else one.layer,
        source=contrast.corrupted,
    )
    field = {"head": "head", "neuron": "neurons"}.get(one.component)
    session, examples = contrast.session, contrast.examples
    n_tried = session.few(len(chosen), N_TRIED_DRY)
    cells = [[patch.model_copy(update={field: (i,)}) if field else patch] for i in chosen[:n_tried]]
    session.count(examples, len(chosen) - n_tried)
    baseline = contrast.session.baseline(contrast.model, contrast.examples)
    clean = contrast.measured(baseline, contrast.examples, baseline)
    found = contrast.session.logits_of_each(contrast.model, contrast.examples, cells)
    lost = [
        (clean - contrast.measured(logits, examples, baseline)).mean().item() for logits in found
    ]
    return lost + [float("nan")] * (len(chosen) - n_tried)
