"""Dose: two sites patched equally far, so that the larger one has no advantage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
from pydantic import AfterValidator, NonNegativeFloat
from torch import Tensor

from mechmem.analyses.effects.effect import EffectAnalysis, Interventions
from mechmem.data.examples import Examples
from mechmem.interventions.patch import Source
from mechmem.interventions.patch_within import PatchWithin
from mechmem.models.outputs import OUTPUTS
from mechmem.session import Session
from mechmem.spec.references import CheckpointName
from mechmem.spec.selection import Indices, Names, distinct
from mechmem.spec.sweep import Swept


class Dose(EffectAnalysis):
    """Patches a site of a layer towards another checkpoint by equal norms in the residual stream.

    A site whose change is larger may restore more for that reason alone. Here each site is moved
    at most `norm` far in each example and position, and no further than any of the compared sites
    could be. Sweep `norm` for the curve, `site` for the comparison and `examples` for clean
    instances under the same patch.
    Source: ours, for claim C7.
    """

    columns: ClassVar[Mapping[str, str]] = {
        **EffectAnalysis.columns,
        "norm": "largest L2 norm of the change in the residual stream",
        "moved": "L2 norm of the change there, mean over examples, readouts and layers (of several "
        "layers, later ones also respond to earlier ones); undefined for the source",
    }

    site: Swept[str] = "neurons"
    """The patched site: `neurons`, `z`, `attn_out`, `mlp_out` or a residual."""
    layer: Swept[Indices]
    """One layer or several; each is moved by the dose."""
    norm: Swept[NonNegativeFloat]
    """The largest L2 norm of the change in the residual stream."""
    compared: Annotated[tuple[str, ...], AfterValidator(distinct)] = ("neurons", "attn_out")
    """The sites that are compared: no one is moved further than the others could be."""
    before: CheckpointName = CheckpointName("before")
    """The checkpoint towards whose values the site is moved."""
    position: Swept[Names | None] = None
    """Named positions; by default, all."""

    def interventions(self, session: Session) -> Interventions:
        return [self._patch]

    @property
    def _patch(self) -> PatchWithin:
        return PatchWithin(
            site=self.site,
            layer=self.layer,
            position=self.position,
            norm=self.norm,
            within=self.compared,
            source=Source(checkpoint=self.before),
        )

    def target(self, session: Session, examples: Examples) -> Tensor | None:
        return session.baseline(session.model(self.before), examples)

    def table(self, session: Session) -> pd.DataFrame:
        table = super().table(session)
        moved = self._moved(session)
        by_condition = {"baseline": 0.0, "intervened": moved, "control": moved}
        return table.assign(norm=self.norm, moved=table["condition"].map(by_condition))

    def _moved(self, session: Session) -> float:
        """How far the patch moves the residual stream; its control moves it as far."""
        model, examples = session.model(self.model), session.examples(self.examples)
        edits = session.edits(model, examples, [self._patch])
        units = tuple(hook for hook, _ in OUTPUTS.values())
        hooks = [edit.hook for edit in edits if not edit.hook.endswith(units)]  # those only look
        plain = session.activations(model, examples, hooks)
        patched = session.edited_activations(model, examples, edits, hooks)
        change = [(patched[hook] - plain[hook])[:, -examples.n_answer :] for hook in hooks]
        return float(np.mean([moved.double().norm(dim=-1).mean().item() for moved in change]))
