"""PatchPath: patch a component for some of its readers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import field_validator, model_validator
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.ablate import Ablate
from mechmem.interventions.intervention import Intervention, SiteIntervention, Stage
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.edits import LATE, At, Edit, layer_of, replacing
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.registry import Component
from mechmem.spec.selection import Indices, Names
from mechmem.spec.sweep import Swept

SENDERS = {"embed": -1, "pos_embed": -1, "z": 0, "attn_out": 0, "neurons": 1, "mlp_out": 1}
"""Sites that write to the residual stream, and their time within the layer: with attention (0) or
with the MLP (1)."""
RECEIVERS = {"q": 0, "k": 0, "v": 0, "mlp_pre": 1, "logits": 0}
"""Sites that read the residual stream, and their time within the layer."""


class Receiver(Component):
    """A reader of the residual stream: queries, keys or values of heads, an MLP, or the logits. A
    bare word such as `logits` is short for its site."""

    site: Literal["q", "k", "v", "mlp_pre", "logits"]
    """The site of the reader."""
    layer: Indices | None = None
    """One layer or several; by default, every layer after the sender."""
    head: Indices | None = None
    """Heads, for q, k and v; by default, every head."""
    position: Names | None = None
    """Named positions; by default, every position."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"site": value} if isinstance(value, str) else value

    def __str__(self) -> str:
        """Its name in tables, such as `q` or `k layer 1`."""
        chosen = [f"{name} {getattr(self, name)}" for name in ("layer", "head", "position")]
        return " ".join([self.site, *(text for text in chosen if not text.endswith(" None"))])


class PatchPath(Intervention):
    """Path patching: only the chosen receivers see a component's patched value.

    A receiver reads the residual stream of the edited run with the sender's output replaced by its
    patched value; all other readers see the unpatched value. If no receiver feeds another, the
    receivers' values are those of a run with the sender patched and all other components frozen
    (the direct effect of arXiv:2211.00593). If a receiver feeds another, the later one sees the
    changes of the earlier one. With every receiver after the sender, the result is a plain patch of
    the sender. If the answer follows the patch, the sender affects the answer through these
    receivers. It takes one forward pass for each layer of the sender and one for each layer of
    receivers.
    Touches: the receivers' sites; the sender's own activation is unchanged. Must be the last in a
    list of interventions.
    Raises: InputError for a sender that does not write to the residual stream, or a receiver before
    it.
    Source: arXiv:2304.05969.
    """

    sender: SiteIntervention
    """The change that the receivers see: a `patch` (or any other intervention) at embed, pos_embed,
    attn_out, z, mlp_out or neurons."""
    receivers: Swept[tuple[Receiver, ...]]
    """The readers that see the change."""

    @field_validator("receivers")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("a path needs at least one receiver")
        return value

    def is_by_example(self) -> bool:
        return self.sender.is_by_example()

    def edits(self, session: Session, model: Model, examples: Examples) -> list[Edit]:
        return self.edits_after((), session, model, examples)

    def edits_after(
        self, earlier: Sequence[Edit], session: Session, model: Model, examples: Examples
    ) -> list[Edit]:
        found: list[Edit] = []
        for stage in self.stages(session, model, examples):
            found += stage([*earlier, *found])
        return found

    def stages(self, session: Session, model: Model, examples: Examples) -> list[Stage]:
        places = self._places(model, examples, first=min(self._times(model)))
        # Shared by the stages: the sender's patches and their changes, by the time of writing.
        sent: dict[int, Edit] = {}
        changes: dict[int, Tensor] = {}
        run = (session, model, examples)
        return [partial(self._stage, *run, *place, sent, changes) for place in places]

    def _stage(
        self,
        session: Session,
        model: Model,
        examples: Examples,
        time: int,
        entry: str,
        chosen: Sequence[At],
        sent: dict[int, Edit],
        changes: dict[int, Tensor],
        earlier: Sequence[Edit],
    ) -> list[Edit]:
        """The edits of the receivers that read the residual at one time: their values with the
        sender's output replaced."""
        if not sent:
            sent |= self._sent(earlier, session, model, examples)
        # A sender after a receiver has another unpatched value in the edited run.
        new = {at: edit for at, edit in sent.items() if at < time and at not in changes}
        if new:
            changes |= self._changes(new, earlier, session, model, examples)
        # The rest of this pass, after the changed residual, is discarded.
        seen = Edit(At(entry), _plus(sum(changes.values())))
        hooks = [at.hook for at in chosen]
        values = session.edited_activations(model, examples, [*earlier, seen], hooks)
        every = torch.arange(len(examples))
        return [replacing(at, at.take(values[at.hook], every)) for at in chosen]

    def _times(self, model: Model) -> list[int]:
        """The times at which the sender writes. Raises InputError for a site that does not write to
        the residual stream."""
        name = sites.site(self.sender.site).name
        if name not in SENDERS:
            raise InputError(f"a path must start at one of {', '.join(SENDERS)}, not at {name!r}")
        if name in ("z", "neurons") and sites.normalises_outputs(model.cfg):
            raise InputError(
                f"this model normalises the output of {name!r} before adding it to the residual "
                "stream; start the path at attn_out or mlp_out"
            )
        if name == "pos_embed" and model.cfg.positional_embedding_type == "shortformer":
            raise InputError("this model does not add its positions to the residual stream")
        return [2 * layer_of(hook) + SENDERS[name] for hook in self.sender.hooks(model)]

    def _sent(
        self, earlier: Sequence[Edit], session: Session, model: Model, examples: Examples
    ) -> dict[int, Edit]:
        """The sender's patches, by the time at which they write to the residual stream."""
        offset = SENDERS[sites.site(self.sender.site).name]
        sent = self.sender.edits_after(earlier, session, model, examples)
        return {2 * edit.layer + offset: edit for edit in sent}

    def _changes(
        self,
        sent: Mapping[int, Edit],
        before: Sequence[Edit],
        session: Session,
        model: Model,
        examples: Examples,
    ) -> dict[int, Tensor]:
        """The changes that these patches of the sender make to the residual stream of the edited
        run, by time."""
        hooks = [edit.hook for edit in sent.values()]
        own = session.edited_activations(model, examples, before, hooks)
        every, changes = torch.arange(len(examples)), {}
        for time, edit in sent.items():
            x = own[edit.hook]
            written = _written(sites.site(self.sender.site).name, model, edit.layer)
            changes[time] = written(edit(x, every) - x)
        return changes

    def _places(
        self, model: Model, examples: Examples, first: int
    ) -> list[tuple[int, str, list[At]]]:
        """(time, hook of the residual that is read, receivers to replace), in the order of the
        forward pass."""
        found: dict[int, list[At]] = {}
        for receiver in self.receivers:
            for at in self._chosen(receiver, model, examples, first):
                found.setdefault(_time(at.hook, _offset(receiver, model)), []).append(at)
        n = model.cfg.n_layers
        last = f"blocks.{n - 1}.hook_resid_post"
        entries: Mapping[int, str] = {
            **{2 * layer: f"blocks.{layer}.hook_resid_pre" for layer in range(n)},
            **{2 * layer + 1: f"blocks.{layer}.hook_resid_mid" for layer in range(n)},
        }
        return [(time, entries.get(time, last), found[time]) for time in sorted(found)]

    def _chosen(self, receiver: Receiver, model: Model, examples: Examples, first: int) -> list[At]:
        offset = _offset(receiver, model)
        layers: Any = receiver.layer
        if layers is None and receiver.site != "logits":
            every = range(model.cfg.n_layers)
            layers = tuple(layer for layer in every if 2 * layer + offset > first)
            if not layers:
                raise InputError(
                    f"no receiver {receiver.site!r} comes after the sender; choose an earlier "
                    "sender"
                )
        # A gated MLP reads the residual stream through both of its factors.
        is_gated = receiver.site == "mlp_pre" and model.cfg.gated_mlp
        names = ("mlp_pre", "mlp_pre_linear") if is_gated else (receiver.site,)
        found = []
        for name in names:
            like = Ablate(
                method="zero",
                site=name,
                layer=layers,
                head=receiver.head,
                position=receiver.position,
            )
            found += [like.at(hook, model, examples) for hook in like.hooks(model)]
        for at in found:
            if _time(at.hook, offset) <= first:
                raise InputError(
                    f"the receiver {receiver.site!r} at {at.hook} comes before the sender; choose "
                    "later layers"
                )
        return found


def _plus(change: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda own, rows: own + change[rows.to(own.device)]


def _offset(receiver: Receiver, model: Model) -> int:
    """The time within its layer at which a receiver reads. A parallel MLP reads the same residual
    as attention."""
    return 0 if model.cfg.parallel_attn_mlp else RECEIVERS[receiver.site]


def _time(hook: str, offset: int) -> int:
    """The time of a hook: 2 layer with attention, 2 layer + 1 with the MLP."""
    layer = layer_of(hook)
    return LATE if layer == LATE else 2 * layer + offset


def _written(site: str, model: Model, layer: int) -> Callable[[Tensor], Tensor]:
    """A function from a change at a sender's site to the change of the residual stream."""
    if site == "z":
        weight = rearrange(
            model.blocks[layer].attn.W_O, "head d_head d_model -> (head d_head) d_model"
        )
        return lambda change: change.flatten(-2) @ weight
    if site == "neurons":
        return lambda change: change @ model.blocks[layer].mlp.W_out
    return lambda change: change
