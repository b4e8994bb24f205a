"""Attribution: how much each head, MLP and neuron is needed, by one gradient, with exact patching
beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeInt
from torch import Tensor

from mechmem.analyses.circuits.contrast import Contrast, ContrastAnalysis, correlation
from mechmem.data.examples import Examples
from mechmem.models.architecture import Model
from mechmem.models.fast import Edit, forward
from mechmem.session import Session
from mechmem.statistics.intervals import interval

BATCH = 128
MOST_ROWS = 1024
"""Examples times neurons that go through the model at once."""


class Units(NamedTuple):
    """The embedding, the heads, the MLP or the neurons of a layer: one activation, its units along
    axis 2.

    As `token` the embedding is scored position by position.
    """

    component: str
    layer: int
    hook: str


class Attribution(ContrastAnalysis):
    """Attribution patching: what the metric loses, to first order, if a node is replaced by its
    corrupted value.

    A score is the sum over positions of (corrupted - clean activation) . gradient of the negated
    metric at the clean run, so that positive parts are useful. First order fails where the model
    saturates: `exact` patches the parts of the largest scores one at a time, and the correlation
    says how far to trust the rest.
    Touches: embed, z of each head, mlp_out and every neuron. Source: arXiv:2310.10348; exact:
    arXiv:2309.16042.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "measure": "the metric that the scores are of",
        "unit": "unit of the metric, of the scores and of the exact effects",
        "component": "embed, head, mlp or neuron",
        "layer": "layer of the component; -1 for embed",
        "index": "number of the head or neuron; 0 for embed and mlp",
        "value": "attribution score, mean over the examples (positive: useful)",
        "low": "lower end of the bootstrap 95 % interval over examples",
        "high": "upper end of it",
        "exact": "loss of the metric when this part alone is patched, mean over the examples; undefined if not asked for",
        "n": "number of examples",
        "pearson": "correlation of score and exact among those of the layer's neurons, or of its heads and MLP, that were "
        "patched (-1..1); undefined for fewer than three",
        "spearman": "their rank correlation (-1..1); undefined likewise",
    }

    neurons: bool = True
    """Score every MLP neuron too."""
    exact: NonNegativeInt | Literal["all"] = 0
    """How many neurons of each layer (and of its heads and MLP), of the largest |score|, are
    patched exactly too."""

    def table(self, session: Session) -> pd.DataFrame:
        contrast = self.contrast(session)
        units = parts(contrast, self.neurons)
        table = pd.concat(
            [_rows(u, scores) for u, scores in zip(units, scores_of(contrast, units), strict=True)]
        )
        table = table.assign(exact=np.nan, n=len(contrast.examples))
        layers = table.groupby([table["component"] == "neuron", "layer"], sort=False)
        table = pd.concat(
            [self._beside_exact(contrast, units, rows) for _, rows in layers], ignore_index=True
        )
        shared = {"examples": self.examples, "measure": self.metric.name, "unit": self.metric.unit}
        return table.assign(**shared)[list(self.columns)]

    def _beside_exact(
        self, contrast: Contrast, units: list[Units], rows: pd.DataFrame
    ) -> pd.DataFrame:
        """The neurons of a layer, or its other parts, with what patching the largest of them
        does."""
        rows = rows.reset_index(drop=True)
        chosen = (
            rows["value"].abs().nlargest(len(rows) if self.exact == "all" else self.exact).index
        )
        for unit in units:
            at = [
                i
                for i in chosen
                if (rows["component"][i], rows["layer"][i]) == (unit.component, unit.layer)
            ]
            rows.loc[at, "exact"] = (
                _exact(contrast, unit, torch.tensor(rows["index"][at].tolist())) if at else np.nan
            )
        both = rows.dropna(subset="exact")
        pearson = correlation(both["value"], both["exact"])
        return rows.assign(
            pearson=pearson, spearman=correlation(both["value"].rank(), both["exact"].rank())
        )


def parts(contrast: Contrast, neurons: bool = True) -> list[Units]:
    """What is scored, in the order of the model."""
    graph, units = contrast.graph, [Units("embed", -1, "hook_embed")]
    for layer in range(graph.n_layers):
        units.append(Units("head", layer, f"blocks.{layer}.attn.hook_z"))
        if graph.has_mlp:
            units += [Units("neuron", layer, f"blocks.{layer}.mlp.hook_post")] if neurons else []
            units.append(Units("mlp", layer, f"blocks.{layer}.hook_mlp_out"))
    return units


def scores_of(contrast: Contrast, units: list[Units]) -> list[Float[Tensor, "n unit"]]:
    """The score of every unit for every example; kept on the session."""
    key = ("attribution", *contrast.key, *units)
    if key not in contrast.session.cache:
        _, corrupted = contrast.both_runs([u.hook for u in units])
        every = torch.arange(len(contrast.examples))
        batches = [_scores(contrast, units, corrupted, rows) for rows in every.split(BATCH)]
        contrast.session.count(contrast.examples)
        scores = [torch.cat(of_unit) for of_unit in zip(*batches, strict=True)]
        contrast.check_change(*scores)
        contrast.session.cache[key] = scores
    return contrast.session.cache[key]


def _scores(
    contrast: Contrast, units: list[Units], corrupted: Mapping[str, Tensor], rows: Tensor
) -> list[Tensor]:
    examples, hooks = contrast.examples.select(rows), [u.hook for u in units]
    leaf = Edit("hook_embed", lambda x: x.detach().requires_grad_())
    logits, clean = forward(contrast.model, examples.tokens, examples.n_answer, [leaf], hooks)
    contrast.check_gradient(examples, logits)
    loss = contrast.loss(examples, logits.detach())(logits)
    gradients = torch.autograd.grad(loss, [clean[hook] for hook in hooks])
    scores = []
    for unit, gradient in zip(units, gradients, strict=True):
        theirs = (
            corrupted[unit.hook] if len(corrupted[unit.hook]) == 1 else corrupted[unit.hook][rows]
        )
        scores.append(_summed(unit.component, (theirs - clean[unit.hook].detach()) * gradient))
    return scores


def _summed(component: str, product: Float[Tensor, "n pos ..."]) -> Float[Tensor, "n unit"]:
    """Over the positions, unless they are the units, and over what belongs to one unit."""
    if component == "token":
        return product.sum(-1)
    whole = {"embed": (-1, True), "mlp": (-1, True), "head": (-1, False)}.get(component)
    return product.sum(1) if whole is None else product.sum(1).sum(*whole)


def _rows(unit: Units, scores: Float[Tensor, "n unit"]) -> pd.DataFrame:
    matrix = scores.double().cpu().numpy().T
    low, high = interval(matrix)
    columns: dict[str, Any] = {
        "component": unit.component,
        "layer": unit.layer,
        "index": np.arange(len(matrix)),
    }
    return pd.DataFrame(columns | {"value": matrix.mean(1), "low": low, "high": high})


@torch.no_grad()
def _exact(contrast: Contrast, unit: Units, chosen: Tensor) -> list[float]:
    """What the metric loses when each of the chosen units alone is patched."""
    logits = contrast.session.logits(contrast.model, contrast.examples)
    effects = _neurons_patched if unit.component == "neuron" else _nodes_patched
    clean = contrast.measured(logits, contrast.examples, logits)
    return [(clean - patched).mean().item() for patched in effects(contrast, unit, chosen, logits)]


def _nodes_patched(
    contrast: Contrast, unit: Units, chosen: Tensor, baseline: Tensor
) -> list[Tensor]:
    (theirs,), found = contrast.both_runs([unit.hook])[1].values(), []
    for i in chosen.tolist():
        edit = Edit(
            unit.hook, lambda x, i=i: _replaced(x, theirs, i if unit.component == "head" else None)
        )
        logits = contrast.session.logits(contrast.model, contrast.examples, [edit])
        found.append(contrast.measured(logits, contrast.examples, baseline))
    return found


def _replaced(x: Tensor, theirs: Tensor, head: int | None) -> Tensor:
    if head is None:
        return theirs.expand_as(x)
    return torch.where(torch.arange(x.shape[2], device=x.device)[:, None] == head, theirs, x)


def _neurons_patched(
    contrast: Contrast, unit: Units, chosen: Tensor, baseline: Tensor
) -> list[Tensor]:
    clean, theirs = contrast.both_runs([unit.hook])
    change, session, model = theirs[unit.hook] - clean[unit.hook], contrast.session, contrast.model
    patched = patched_one_by_one(session, model, contrast.examples, unit.layer, change, chosen)
    return [contrast.measured(logits, contrast.examples, baseline) for logits in patched]


def patched_one_by_one(
    session: Session,
    model: Model,
    examples: Examples,
    layer: int,
    change: Float[Tensor, "n pos d_mlp"],
    chosen: Int[Tensor, " k"],
) -> Iterator[Float[Tensor, "n n_answer d_vocab"]]:
    """The logits when each of the chosen neurons of a layer alone is changed by this much.

    A neuron moves the residual after its layer along its own column of W_out, and the forward
    starts there.
    """
    after = session.activation(model, examples, f"blocks.{layer}.hook_resid_post")
    keep = examples.n_answer if layer == model.cfg.n_layers - 1 else after.shape[1]
    after, change, tokens = after[:, -keep:], change[:, -keep:], examples.tokens[:, -keep:]
    session.count(examples, len(chosen))
    for part in chosen.split(max(1, MOST_ROWS // len(examples))):
        moved = (
            change[..., part].permute(2, 0, 1)[..., None]
            * model.blocks[layer].mlp.W_out[part, None, None]
        )
        start = (layer + 1, (after + moved).flatten(0, 1))
        logits, _ = forward(model, tokens.repeat(len(part), 1), examples.n_answer, start=start)
        yield from logits.unflatten(0, (len(part), -1))
