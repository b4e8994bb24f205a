"""SwapWeights: a component computes with another checkpoint's weights."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import field_validator, model_validator

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import Indices, Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.tape import Tape, at_the_end, in_attention, in_mlp
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.fast import Edit
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.sweep import Each, Swept

Part = Literal["embed", "attn", "mlp", "unembed"]


class SwapWeights(Intervention):
    """Computes a component's output with another checkpoint's weights, on the edited run's own
    inputs to it.

    If the weights of before memorisation bring the true answers back, what was memorised lies in
    these weights; a patch of the same output would also bring back whatever its *inputs* have lost.
    A component is what stands between two readings of the residual stream: `attn` and `mlp` with
    the norm before them, `embed` tokens and positions, `unembed` with the last norm. All of them
    together make the model the other one.
    Touches: `embed` and `pos_embed`, `attn_out`, `mlp_out`, `logits`. Stands last in a list of
    interventions: it takes a component's input as the interventions listed before it have left it.
    Raises: InputError for models of two architectures, a source that is no checkpoint, a layer that
    is not there.
    Source: ours.
    """

    component: Swept[Part | tuple[Part, ...]]
    layer: Swept[Indices | None] = None
    """Layers of `attn` and `mlp`; every layer unless given."""
    source: Source
    """The other checkpoint, by name; or, from Python, the other model as it is."""

    @field_validator("source", mode="before")
    @classmethod
    def _live(cls, value: Any) -> Any:
        return Source(live=value) if isinstance(value, torch.nn.Module) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        source = self.source
        if source.pair or source.examples or source.mean_over or isinstance(source.live, Examples):
            raise InputError(
                "weights come from a checkpoint: give `source: {checkpoint: ...}` and nothing else"
            )
        if isinstance(self.component, Each) or self.layer is None:
            return self
        if not {"attn", "mlp"} & set(self._parts):
            raise InputError(f"{' and '.join(self._parts)} have no layers; leave `layer` out")
        return self

    @property
    def _parts(self) -> tuple[str, ...]:
        return self.component if isinstance(self.component, tuple) else (self.component,)

    def edits(self, model: Model, examples: Examples, session: Session) -> list[Edit]:
        other, _ = self.source.run(model, examples, session)
        _check_alike(model, other)
        layers = range(model.cfg.n_layers) if self.layer is None else self.layer
        found: list[Edit] = []
        if "embed" in self._parts:
            for site in ("embed", "pos_embed"):
                found += Patch(site=site, source=self.source).edits(model, examples, session)
        for layer in sorted({layers} if isinstance(layers, int) else set(layers)):
            found += _attention(model, other, layer) if "attn" in self._parts else []
            found += _mlp(model, other, layer) if "mlp" in self._parts else []
        return found + (_unembed(model, other) if "unembed" in self._parts else [])


def _attention(model: Model, other: Model, layer: int) -> list[Edit]:
    tape, out = Tape(), sites.checked_hook(model.cfg, "attn_out", layer)
    resid = sites.checked_hook(model.cfg, "resid_pre", layer)
    return [tape.listen(resid, lambda x: in_attention(other, layer, x, [out])), tape.play(out)]


def _mlp(model: Model, other: Model, layer: int) -> list[Edit]:
    tape, out = Tape(), sites.checked_hook(model.cfg, "mlp_out", layer)
    resid, attn_out = (
        sites.checked_hook(model.cfg, name, layer) for name in ("resid_pre", "attn_out")
    )
    return [
        tape.listen(resid, lambda x: {resid: x}),
        tape.listen(attn_out, lambda x: in_mlp(other, layer, tape[resid] + x, [out])),
        tape.play(out),
    ]


def _unembed(model: Model, other: Model) -> list[Edit]:
    tape, resid = Tape(), sites.checked_hook(model.cfg, "resid_post", model.cfg.n_layers - 1)
    return [tape.listen(resid, lambda x: at_the_end(other, x)), tape.play("unembed.hook_out")]


def _check_alike(model: Model, other: Model) -> None:
    def outline(of: Model) -> tuple[Any, ...]:
        return of.cfg.act_fn, {name: parameter.shape for name, parameter in of.named_parameters()}

    if outline(model) != outline(other):
        raise InputError("weights can be swapped between models of one architecture only")
