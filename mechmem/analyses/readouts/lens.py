"""LensAnalysis: the base of analyses that decode the residual stream between layers into the
vocabulary."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.effects.effect import Prefixes, prefixes
from mechmem.data.examples import Examples
from mechmem.interventions.ablate import derangement
from mechmem.measures.rank import Rank, mean_rank
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.limits import Seed
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import interval

Residual = Float[Tensor, "n pos d_model"]
Logits = Float[Tensor, "n pos d_vocab"]
Lens = Callable[[int, Residual], Logits]
"""(number of layers passed, residual) -> logits."""
KEY = ("position", "place", "token", "condition", "measure")
Values = dict[tuple[str, str, str, str, str], Float[Tensor, " n"]]
"""The values of the examples, by `KEY`."""
UNITS = {"probability": "probability", "rank": Rank.unit, "kl": "nats"}


class LensAnalysis(Analysis):
    """An analysis that turns the residual stream before, between and after the layers into
    probabilities of tokens.

    It reports the tokens of each label, and of variables whose values are tokens, at every
    position. The control is the token of another example (`shuffled`): the value expected for an
    unrelated example.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "prefix": "label whose earlier tokens the model is fed: given or true",
        "layer": "number of layers that the residual has passed: k is the residual before layer k, "
        "the last one is the output",
        "position": "input position that is read; readout: the position from which each place is "
        "read",
        "place": "answer place whose token is sought; all: the mean over places; any: a variable, "
        "which has no place",
        "token": "the token that is sought: of the given label, the true label or the variable; "
        "every: the whole distribution",
        "condition": "lens; shuffled: the token of another example; untrained: before translators "
        "are fitted",
        "measure": "probability or rank of the token, or kl: KL(model output || lens)",
        "unit": "unit of the measure",
        "value": "mean over the examples",
        "low": "lower end of the bootstrap 95 % interval over examples",
        "high": "upper end of that interval",
        "n": "number of examples",
        "per_example": "the values of the examples, in the order of the set",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint that is read."""
    examples: Swept[ExampleSetName] = ExampleSetName("noisy")
    """The example set."""
    variables: tuple[str, ...] = ()
    """Variables whose tokens are sought too; their values must be tokens (`bridge` in THR, `out_2`
    in FDA)."""
    prefixes: Prefixes = ("given", "true")
    """The labels whose earlier tokens the model is fed; only one where both have the same ones."""
    seed: Seed = 0
    """Seed of the permutation of examples in the condition `shuffled`."""

    @abstractmethod
    def lenses(self, session: Session, model: Model) -> Mapping[str, Lens]:
        """The lenses by condition. Of the one called `lens` all measures are reported, of the
        others only the KL."""

    @torch.no_grad()
    def table(self, session: Session) -> pd.DataFrame:
        model, examples = session.model(self.model), session.examples(self.examples)
        sought, lenses = self._sought(examples), self.lenses(session, model)
        shuffled = {
            name: tokens[derangement(len(examples), self.seed)] for name, tokens in sought.items()
        }
        tables = []
        chosen = tuple(p for p in self.prefixes if p in prefixes(examples))
        for prefix in chosen or self.prefixes[:1]:
            fed = examples.with_prefix(prefix)
            output = session.baseline(model, fed)
            for layer, resid in enumerate(residuals(session, model, fed)):
                logits = {name: lens(layer, resid).cpu() for name, lens in lenses.items()}
                found = _of_tokens(logits["lens"], sought, fed, "lens")
                found |= _of_tokens(logits["lens"], shuffled, fed, "shuffled")
                for condition, of_lens in logits.items():
                    found |= _kl(output, of_lens, fed, condition)
                tables.append(_rows(found).assign(prefix=prefix, layer=layer))
        table = pd.concat(tables, ignore_index=True).assign(examples=self.examples, n=len(examples))
        return table.assign(unit=table["measure"].map(UNITS))[[*self.columns]]

    def _sought(self, examples: Examples) -> dict[tuple[str, str], Int[Tensor, " n"]]:
        """The tokens that are sought, by (label or variable, place)."""
        if len(examples) < 2:
            raise InputError(
                f"set {self.examples!r} has one example: the shuffled control needs another"
            )
        labels = {
            (label, place): examples.labels(label)[:, i]
            for label in ("given", "true")
            for i, place in enumerate(examples.places)
        }
        for name in self.variables:
            if name not in examples.token_variables:
                known = ", ".join(examples.token_variables)
                hint = f"choose from {known}" if known else "this task has no such variable"
                raise InputError(
                    f"a lens needs variables whose values are tokens, unlike {name!r}; {hint}"
                )
        return labels | {(name, "any"): examples.variables[name] for name in self.variables}


def _kl(output: Tensor, logits: Logits, fed: Examples, condition: str) -> Values:
    """KL(model output || lens) at the positions from which answers are read."""
    kl = divergence(output, logits[:, -fed.n_answer :])
    places = zip(readout_names(fed), fed.places, kl.T, strict=True)
    found = {
        (position, place, "every", condition, "kl"): values for position, place, values in places
    }
    return found | {("readout", "all", "every", condition, "kl"): kl.mean(1)}


def readout_names(examples: Examples) -> list[str]:
    """The names of the positions from which the answer tokens are read; `position i` for one
    without a name."""
    names = {}
    for name in examples.positions:
        indices = examples.indices(name)[:, 0]
        if (indices == indices[0]).all():
            names[int(indices[0])] = name
    readout = examples.indices("readout")[0].tolist()
    return [names.get(index, f"position {index}") for index in readout]


def residuals(session: Session, model: Model, examples: Examples) -> list[Residual]:
    """The residual stream before each layer and after the last, `n pos d_model`.

    Args:
        session: gives the activations.
        model: the model that is read.
        examples: the examples, with the prefix that the model is fed.
    """
    last = model.cfg.n_layers - 1
    hooks = [f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)] + [
        f"blocks.{last}.hook_resid_post"
    ]
    return [*session.activations(model, examples, hooks).values()]


def divergence(
    logits: Float[Tensor, "... d_vocab"], lens: Float[Tensor, "... d_vocab"]
) -> Float[Tensor, "..."]:
    """KL(softmax(logits) || softmax(lens)) in nats."""
    log_p, log_q = logits.log_softmax(-1), lens.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _of_tokens(
    logits: Logits, sought: Mapping[tuple[str, str], Tensor], fed: Examples, condition: str
) -> Values:
    """Probability and rank of each token at every position, and for labels also their mean over the
    positions from which the answer is read."""
    found: Values = {}
    for measure, of in (("probability", _probability), ("rank", _rank)):
        at_readout: dict[str, list[Tensor]] = {}
        for (token, place), tokens in sought.items():
            values = of(logits, tokens)
            for name in fed.positions:
                index = fed.indices(name)
                if (index >= 0).all():  # else not every example has such a position
                    key = (name, place, token, condition, measure)
                    found[key] = values.gather(1, index)[:, 0]
            if place in fed.places:
                at_readout.setdefault(token, []).append(
                    values[:, fed.places.index(place) - fed.n_answer]
                )
        for token, of_places in at_readout.items():
            found["readout", "all", token, condition, measure] = torch.stack(of_places).mean(0)
    return found


def _probability(logits: Logits, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n pos"]:
    return _at(logits.softmax(-1), tokens)


def _rank(logits: Logits, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n pos"]:
    return mean_rank(logits, _at(logits, tokens))


def _at(
    values: Float[Tensor, "n pos d_vocab"], tokens: Int[Tensor, " n"]
) -> Float[Tensor, "n pos"]:
    return values.gather(-1, tokens[:, None, None].expand(-1, values.shape[1], 1))[..., 0]


def _rows(found: Values) -> pd.DataFrame:
    matrix = torch.stack([*found.values()]).double().cpu().numpy()
    low, high = interval(matrix)
    results = {
        "value": matrix.mean(1),
        "low": low,
        "high": high,
        "per_example": [*matrix.astype(np.float32)],
    }
    return pd.concat([pd.DataFrame([*found], columns=[*KEY]), pd.DataFrame(results)], axis=1)
