"""TunedLens: a logit lens with a translator for each layer, fitted to say what the model will
say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, NonNegativeInt
from torch import Tensor

from mechmem.analyses.readouts.lens import Lens, LensAnalysis, Residual, divergence, residuals
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.references import ExampleSetName


class Translators(NamedTuple):
    """x -> x + x change + shift, for each residual; zero is the identity."""

    change: Float[Tensor, "layer d_model d_model"]
    shift: Float[Tensor, "layer 1 d_model"]

    def __call__(self, x: Float[Tensor, "layer row d_model"]) -> Float[Tensor, "layer row d_model"]:
        return x + x @ self.change + self.shift


class TunedLens(LensAnalysis):
    """A logit lens that first translates each layer's residual, affinely, into that of the last
    layer.

    The translators start at the identity and learn, on `fit_on`, to make the lens's distribution
    that of the model's output (least KL). One a layer for all positions, as in the paper, fitted
    where answers are read: elsewhere the output was never trained and says nothing. At other
    positions it thus says what the residual would say at a readout. The last residual is the
    output's own and is not translated. The KL of the lens, beside that of the untrained one, is
    held out on sets that share no example with `fit_on` (`skip` makes such a set): where it is the
    larger one there, the translators have learnt `fit_on` by heart. What is read was there to be
    read linearly; that the model reads it does not follow. The control is the label of another
    example. Source: arXiv:2303.08112.
    """

    fit_on: ExampleSetName = ExampleSetName("clean")
    """The example set of the fit, under its own prefix: clean instances, others than those that are
    read, and many (a translator has d_model (d_model + 1) numbers)."""
    n_steps: NonNegativeInt = 300
    """Steps of Adam; the learning rate falls to 0 in a straight line."""
    learning_rate: float = Field(2e-3, gt=0)
    batch_size: int = Field(512, ge=1)
    """Residuals a step."""

    def lenses(self, session: Session, model: Model) -> Mapping[str, Lens]:
        translators = self.translators(session, model)

        def tuned(layer: int, resid: Residual) -> Tensor:
            if layer == model.cfg.n_layers:
                return session.unembedded(model, resid)
            change, shift = translators.change[layer], translators.shift[layer]
            return session.unembedded(model, resid + resid @ change + shift)

        return {"lens": tuned, "untrained": lambda layer, resid: session.unembedded(model, resid)}

    def translators(self, session: Session, model: Model) -> Translators:
        """The fitted translators of all residuals but the last."""
        chosen = (self.n_steps, self.learning_rate, self.batch_size, self.seed)
        key = ("tuned lens", model, session.examples(self.fit_on), *chosen)
        return session.cached(key, lambda: self._fitted(session, model))

    def _fitted(self, session: Session, model: Model) -> Translators:
        examples = session.examples(self.fit_on)
        *middle, last = (
            rearrange(resid[:, -examples.n_answer :], "n place d_model -> (n place) d_model")
            for resid in residuals(session, model, examples)
        )
        x = torch.stack(middle)
        with torch.no_grad():
            target = session.unembedded(model, last[None])[0]
        n_layers, n, d_model = x.shape
        found = Translators(
            x.new_zeros(n_layers, d_model, d_model), x.new_zeros(n_layers, 1, d_model)
        )
        generator = torch.Generator().manual_seed(self.seed)
        optimiser = torch.optim.Adam([*found], lr=self.learning_rate)
        n_steps = session.few(self.n_steps, 2)
        for step in range(n_steps):
            size = (min(self.batch_size, n),)
            rows = torch.randint(n, size, generator=generator).to(x.device)
            optimiser.param_groups[0]["lr"] = self.learning_rate * (1 - step / n_steps)
            _step(session, optimiser, found, model, x[:, rows], target[rows])
        return Translators(*(part.detach() for part in found))


@torch.enable_grad()
def _step(
    session: Session,
    optimiser: torch.optim.Optimizer,
    translators: Translators,
    model: Model,
    x: Tensor,
    target: Tensor,
) -> None:
    """One step down the KL; the model's own parameters get no gradient."""
    for part in translators:
        part.requires_grad_()
    lens = session.unembedded(model, translators(x))
    loss = divergence(target, lens).mean(-1).sum()
    for part, gradient in zip(translators, torch.autograd.grad(loss, [*translators]), strict=True):
        part.grad = gradient
    optimiser.step()
