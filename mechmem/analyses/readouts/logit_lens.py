"""LogitLens: what the residual stream would say if the model stopped there."""

from __future__ import annotations

from collections.abc import Mapping

from mechmem.analyses.readouts.lens import Lens, LensAnalysis
from mechmem.models.architecture import Model
from mechmem.session import Session


class LogitLens(LensAnalysis):
    """Unembeds the residual stream before, between and after the layers: final norm and
    unembedding, nothing learnt.

    A label that is likely in the middle of the model and unlikely at its end was computed and then
    overridden. Nothing follows from a label that is not seen: middle layers need not speak the
    language of the last one (see tuned_lens). The control is the label of another example. Source:
    nostalgebraist 2020, *interpreting GPT: the logit lens*.
    """

    def lenses(self, session: Session, model: Model) -> Mapping[str, Lens]:
        return {"lens": lambda layer, resid: session.unembedded(model, resid)}
