"""NeuronShift: which neurons changed while the wrong labels were memorised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pandas as pd
from scipy import stats

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.neurons.ranking import SPREAD_FLOOR, spread_of
from mechmem.interventions.intervention import shared
from mechmem.models.edits import At
from mechmem.session import Session
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept


class NeuronShift(Analysis):
    """How far each MLP neuron shifted between two checkpoints, on memorised and clean instances.

    The shift is |after - before| at the positions from which answers are read, in units of the
    neuron's standard deviation over clean instances at `before`. The AUC measures how well the size
    of the shift separates memorised from clean instances (0.5: not at all). A shift alone does not
    show a causal role; see NeuronTopK.
    Source: ours, for claim C7 of arXiv:2507.04782.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "layer": "layer of the neuron",
        "neuron": "index of the neuron in its layer",
        "shift_noisy": "mean shift on the noisy instances (standard deviations)",
        "shift_clean": "mean shift on the clean instances (standard deviations)",
        "signed_noisy": "mean signed shift on the noisy instances (standard deviations)",
        "auc": "probability that a noisy instance's shift exceeds a clean one's (0..1)",
        "p": "two-sided Mann-Whitney p-value of the AUC",
        "q": "Benjamini-Hochberg false discovery rate over all neurons",
    }

    before: CheckpointName = CheckpointName("before")
    """The checkpoint from which shifts are measured."""
    after: CheckpointName = CheckpointName("after")
    """The checkpoint to which shifts are measured."""
    examples: Swept[ExampleSetName] = ExampleSetName("noisy")
    """The noisy set."""
    matched: ExampleSetName = ExampleSetName("clean")
    """The clean set with which the noisy one is compared."""

    def table(self, session: Session) -> pd.DataFrame:
        tables = [
            self._layer(session, layer) for layer in range(session.model(self.after).cfg.n_layers)
        ]
        table = pd.concat(tables, ignore_index=True)
        return table.assign(q=stats.false_discovery_control(table["p"]))

    def kept(self, session: Session) -> pd.DataFrame:
        """The table, cached on the session for all analyses that rank neurons by it."""
        key = ("shift", self, *session.referred(self))
        return session.cached(key, lambda: self.table(session))

    def _layer(self, session: Session, layer: int) -> pd.DataFrame:
        hook = f"blocks.{layer}.mlp.hook_post"
        change, at_before = {}, None
        for name in (self.examples, self.matched):
            examples = session.examples(name)
            at = At(hook, shared(examples.indices("readout")))
            before, after = (
                session.activation(session.model(m), examples, at).double().cpu().numpy()
                for m in (self.before, self.after)
            )
            change[name], at_before = after - before, before
        spread = spread_of(at_before, SPREAD_FLOOR)
        noisy, clean = (
            np.abs(change[name] / spread).mean(axis=1) for name in (self.examples, self.matched)
        )
        test = stats.mannwhitneyu(noisy, clean, axis=0, method="asymptotic")
        return pd.DataFrame(
            {
                "layer": layer,
                "neuron": np.arange(noisy.shape[1]),
                "shift_noisy": noisy.mean(axis=0),
                "shift_clean": clean.mean(axis=0),
                "signed_noisy": (change[self.examples] / spread).mean(axis=(0, 1)),
                "auc": test.statistic / (len(noisy) * len(clean)),
                "p": np.nan_to_num(test.pvalue, nan=1.0),
            }
        )
