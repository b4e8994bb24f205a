"""Gradients: what a backend makes of its forward and one backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit


class Gradients(ABC):
    """A backend whose gradients are those of its own forward."""

    @abstractmethod
    def run(
        self,
        model: Model,
        tokens: Int[Tensor, "batch pos"],
        rows: Int[Tensor, " batch"],
        readout: int,
        *,
        edits: Iterable[Edit] = (),
        capture: Collection[str] = (),
        resume: tuple[int, Float[Tensor, "batch pos d_model"]] | None = None,
    ) -> tuple[Float[Tensor, "batch readout d_vocab"], dict[str, Tensor]]:
        """Logits at the last `readout` positions, and the captured activations after their edits.

        Args:
            model: a HookedTransformer.
            tokens: what it reads.
            rows: numbers of these rows in the set of examples, which edits are given.
            readout: number of positions at the end whose logits are wanted; 0 for none.
            edits: applied at their hooks in this order, after the model's own hooks.
            capture: names of the hooks whose activations are returned.
            resume: (layer, residual before it), to start there; nothing before it can be touched.

        Raises:
            InputError: for a hook that never fired, at which an edit would silently do nothing.
        """

    def gradients(
        self,
        model: Model,
        tokens: Int[Tensor, "batch pos"],
        rows: Int[Tensor, " batch"],
        readout: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        wrt: Sequence[str],
        *,
        edits: Iterable[Edit] = (),
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Logits, and the activations at `wrt` with the gradients of the loss at them.

        The parameters need no gradient of their own: the graph starts at the embedding.

        Args:
            model: a HookedTransformer.
            tokens: what it reads.
            rows: numbers of these rows in the set of examples.
            readout: number of positions at the end that the loss reads the logits of.
            loss: (logits, rows) -> a single number.
            wrt: names of the hooks.
            edits: as in `run`.
        """
        leaf = Edit(At("hook_embed"), lambda own, _: own.detach().requires_grad_())
        with torch.enable_grad():
            logits, found = self.run(
                model, tokens, rows, readout, edits=[*edits, leaf], capture=wrt
            )
            value = loss(logits, rows)
            gradients = torch.autograd.grad(
                value, [found[hook] for hook in wrt], allow_unused=True, materialize_grads=True
            )
        activations = {hook: found[hook].detach() for hook in wrt}
        return logits.detach(), activations, dict(zip(wrt, gradients, strict=True))
