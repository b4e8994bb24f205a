"""Dynamics: the four accuracy curves of a training run, with chance and the phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pandas as pd

from mechmem.analyses.analysis import Analysis
from mechmem.session import Session
from mechmem.statistics.rows import DIFFERENCE, FRACTION


class Dynamics(Analysis):
    """When the rule is learnt and when the wrong labels are fitted.

    Where a model generalises before it memorises, `held_out` and `corrected` rise while
    `memorised` is still at chance: the rule has a lead. This order is not assumed. A phase that the
    curves never reach has no row, with one exception: where a model memorised and never
    generalised, the rule had no lead, so the curve `lead` has a row of 0 with the label
    `generalised`, at the step of `memorised`. The label `best` repeats the curves at the first step
    of the highest held-out accuracy.
    Source: arXiv:2507.04782, claims C1 and C2.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "step": "optimiser steps",
        "curve": "clean (given labels), memorised (noisy, given), corrected (noisy, true), "
        "held_out, chance; lead (corrected - memorised); or phase",
        "value": "accuracy of whole answers (fraction); for a phase, its step",
        "unit": "unit of the value",
        "label": "name of the phase whose step the row is at, or best for the step of the highest "
        "held-out accuracy; empty for the full curves",
    }

    def table(self, session: Session) -> pd.DataFrame:
        curves = pd.DataFrame(list(session.curves)).assign(chance=session.chance)
        curves = curves.assign(lead=curves["corrected"] - curves["memorised"])
        long = curves.melt(id_vars="step", var_name="curve", value_name="value").assign(label="")
        reached = [(name, step) for name, step in session.phases.items() if step is not None]
        best = int(curves["step"][curves["held_out"].idxmax()])  # the first, if there are several
        labelled = [*reached, ("best", best)]
        at_phases = [long[long["step"] == step].assign(label=name) for name, step in labelled]
        marks = [
            {"step": step, "curve": "phase", "value": float(step), "label": name}
            for name, step in reached
        ]
        no_lead = pd.DataFrame(_no_lead(session.phases))
        table = pd.concat([long, *at_phases, no_lead, pd.DataFrame(marks)], ignore_index=True)
        units = {"phase": "optimiser steps", "lead": DIFFERENCE}
        return table.assign(unit=table["curve"].map(units).fillna(FRACTION))


def _no_lead(phases: Mapping[str, int | None]) -> list[dict[str, Any]]:
    """The row of a rule that never came before what was memorised."""
    memorised = phases.get("memorised")
    if memorised is None or phases.get("generalised") is not None:
        return []
    return [{"step": memorised, "curve": "lead", "value": 0.0, "label": "generalised"}]
