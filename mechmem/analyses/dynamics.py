"""Dynamics: the four accuracy curves of a training run, with chance and the phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pandas as pd

from mechmem.analyses.analysis import Analysis
from mechmem.session import Session


class Dynamics(Analysis):
    """When the rule is learnt and when the wrong labels are fitted.

    Where a model generalises before it memorises, `held_out` and `corrected` rise while
    `memorised` is still at chance. This order is not assumed: a phase that the curves never reach
    has no row.
    Source: arXiv:2507.04782, claims C1 and C2.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "step": "optimiser steps",
        "curve": "clean (given labels), memorised (noisy, given), corrected (noisy, true), "
        "held_out, chance; or phase",
        "value": "accuracy of whole answers (fraction); for a phase, its step",
        "unit": "unit of the value",
        "label": "name of the phase whose step the row is at; empty for the full curves",
    }

    def table(self, session: Session) -> pd.DataFrame:
        curves = pd.DataFrame(list(session.curves)).assign(chance=session.chance)
        long = curves.melt(id_vars="step", var_name="curve", value_name="value").assign(label="")
        reached = [(name, step) for name, step in session.phases.items() if step is not None]
        at_phases = [long[long["step"] == step].assign(label=name) for name, step in reached]
        marks = [
            {"step": step, "curve": "phase", "value": float(step), "label": name}
            for name, step in reached
        ]
        table = pd.concat([long, *at_phases, pd.DataFrame(marks)], ignore_index=True)
        return table.assign(
            unit=table["curve"].map({"phase": "optimiser steps"}).fillna("fraction")
        )
