"""LogitLens: the output if the model stopped after some layers."""

from __future__ import annotations

from collections.abc import Mapping

from mechmem.analyses.readouts.lens import Lens, LensAnalysis
from mechmem.models.architecture import Model
from mechmem.session import Session


class LogitLens(LensAnalysis):
    """Decodes the residual stream between layers with the final norm and the unembedding.

    If a label is likely in the middle of the model and unlikely at its end, it was computed and
    then overridden. If a label does not appear, nothing follows: middle layers need not encode it
    as the last layer does (see tuned_lens). The control is the label of another example.
    Source: nostalgebraist 2020, *interpreting GPT: the logit lens*.
    """

    def lenses(self, session: Session, model: Model) -> Mapping[str, Lens]:
        return {"lens": lambda layer, resid: session.unembedded(model, resid)}
