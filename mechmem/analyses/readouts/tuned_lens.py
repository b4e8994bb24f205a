"""TunedLens: a logit lens with a translator for each layer, fitted to predict the model's
output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechmem.analyses.readouts.lens import Lens, LensAnalysis, Residual, divergence, residuals
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.limits import Instances
from mechmem.spec.references import ExampleSetName


class Translators(NamedTuple):
    """x -> x + x change + shift, for each residual; zeros are the identity."""

    change: Float[Tensor, "layer d_model d_model"]
    shift: Float[Tensor, "layer 1 d_model"]

    def __call__(self, x: Float[Tensor, "layer row d_model"]) -> Float[Tensor, "layer row d_model"]:
        return x + x @ self.change + self.shift


class TunedLens(LensAnalysis):
    """A logit lens that first maps each layer's residual to that of the last, by an affine map.

    The maps (translators) start at the identity and are fitted on `fit_on` so that the lens
    predicts the model's output distribution (minimum KL). There is one translator per layer for all
    positions, as in the paper. It is fitted at the positions from which answers are read: elsewhere
    the model's output was never trained. At other positions the lens thus shows how the residual
    would be decoded where answers are read. The last residual is not translated. On sets that share
    no example with `fit_on` (see `skip`), the KL of the lens is a held-out value: if it is larger
    than that of the untrained lens, the translators have overfitted. If the lens finds a label, the
    label is linearly decodable; it does not follow that the model uses it. The control is the label
    of another example.
    Source: arXiv:2303.08112.
    """

    fit_on: ExampleSetName = ExampleSetName("clean")
    """The example set of the fit, under its own prefix: many clean instances other than those that
    are read (a translator has d_model (d_model + 1) parameters)."""
    n_steps: int = Field(300, ge=0, le=1_000_000)
    """Number of steps of Adam; the learning rate decays linearly to 0."""
    learning_rate: float = Field(2e-3, gt=0)
    """Learning rate of the first step."""
    batch_size: Instances = 512
    """Number of residuals per step."""

    def lenses(self, session: Session, model: Model) -> Mapping[str, Lens]:
        translators = self.translators(session, model)

        def tuned(layer: int, resid: Residual) -> Tensor:
            if layer == model.cfg.n_layers:
                return session.unembedded(model, resid)
            change, shift = translators.change[layer], translators.shift[layer]
            return session.unembedded(model, resid + resid @ change + shift)

        return {"lens": tuned, "untrained": lambda layer, resid: session.unembedded(model, resid)}

    def translators(self, session: Session, model: Model) -> Translators:
        """The fitted translators of all residuals except the last; cached on the session."""
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
    """One optimiser step on the KL; the model's own parameters get no gradient."""
    for part in translators:
        part.requires_grad_()
    lens = session.unembedded(model, translators(x))
    loss = divergence(target, lens).mean(-1).sum()
    for part, gradient in zip(translators, torch.autograd.grad(loss, [*translators]), strict=True):
        part.grad = gradient
    optimiser.step()
