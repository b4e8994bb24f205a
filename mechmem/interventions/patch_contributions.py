"""PatchContributions: what neurons write into the residual stream, from another forward pass."""

from __future__ import annotations

from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import LACKING
from mechmem.interventions.patch import Patch
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit, lacks
from mechmem.models.outputs import check_adds_up, output_of, weights_out
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.sweep import Swept


class PatchContributions(Patch):
    """Replaces what neurons write into the residual stream by what they write in another pass.

    A neuron writes its activation times its row of W_out. A patch of the activation keeps the
    edited model's own row; this one takes the source's row too. The two differ where training
    changed the weights out of the neurons. The bias of the MLP stays.
    Touches: mlp_out, `batch pos d_model`, at the chosen layers, positions and neurons.
    Raises: InputError for another site than `neurons`, or a model that normalises its MLP's output.
    Source: ours.
    """

    site: Swept[str] = "neurons"
    """Only `neurons`."""

    def hooks(self, model: Model) -> list[str]:
        if sites.site(self.site).name != "neurons":
            raise InputError(
                f"only neurons have contributions: write `site: neurons`, not {self.site!r}"
            )
        check_adds_up(model)
        return super().hooks(model)

    def edits(self, session: Session, model: Model, examples: Examples) -> list[Edit]:
        found: list[Edit] = []
        for hook in self.hooks(model):
            found += self._of_layer(self.at(hook, model, examples), session, model, examples)
        return found

    def _of_layer(self, at: At, session: Session, model: Model, examples: Examples) -> list[Edit]:
        """Two edits: the first only looks at the neurons of the edited run, the second exchanges
        what they write."""

        def place(rows: Examples) -> At:
            return self.at(at.hook, model, rows)

        theirs = self.source.activation(place, session, model, examples)
        session.demand(not lacks(theirs, at), f"the source {LACKING.format(at.hook)}")
        written = theirs @ weights_out(self.source.model_of(session, model), at.hook, at.units)
        own_rows = weights_out(model, at.hook, at.units)
        seen: list[Tensor] = []

        def look(own: Tensor, rows: Tensor) -> Tensor:
            seen[:] = [own]
            return own

        def exchanged(own: Tensor, rows: Tensor) -> Tensor:
            neurons = at.take(seen[0], rows)
            chosen = written if len(written) == 1 else written[rows.to(written.device)]
            return own + chosen.to(own) - neurons @ own_rows

        mlp_out = At(output_of(at.hook), at.pos)
        return [Edit(At(at.hook), look, only_reads=True), Edit(mlp_out, exchanged, only_reads=True)]
