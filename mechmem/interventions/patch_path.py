"""PatchPath: patch a component for some of its readers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import field_validator, model_validator
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.ablate import Ablate
from mechmem.interventions.intervention import Indices, Intervention, Names, SiteIntervention
from mechmem.interventions.tape import Tape, at_the_end, in_attention, in_mlp
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.fast import Edit
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.registry import Component
from mechmem.spec.sweep import Swept

SENDERS = {"embed": -1, "pos_embed": -1, "z": 0, "attn_out": 0, "neurons": 1, "mlp_out": 1}
"""Sites that write to the residual stream, and when in their layer: with attention (0), with the
MLP (1)."""
RECEIVERS = {"q": 0, "k": 0, "v": 0, "mlp_pre": 1, "logits": 0}
"""Sites that read it, and when."""


class Receiver(Component):
    """A reader of the residual stream: queries, keys or values of heads, an MLP, or the logits.
    `logits` for short."""

    site: Literal["q", "k", "v", "mlp_pre", "logits"]
    layer: Indices | None = None
    """One layer or several; every layer behind the sender unless given."""
    head: Indices | None = None
    """Heads, for q, k and v; every head unless given."""
    position: Names | None = None
    """Named positions; every position unless given."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"site": value} if isinstance(value, str) else value

    def __str__(self) -> str:
        """`q`, `k layer 1`: how tables call it."""
        chosen = [f"{name} {getattr(self, name)}" for name in ("layer", "head", "position")]
        return " ".join([self.site, *(text for text in chosen if not text.endswith(" None"))])


class PatchPath(Intervention):
    """Path patching: a component has its patched value for the chosen receivers, its own for all
    other readers.

    A receiver reads the residual stream as it is in the edited run, with the sender's output
    exchanged. So with one receiver, or several of which none feeds another, the receivers' values
    are those of a run with the sender patched and all other components frozen (the direct effect of
    arXiv:2211.00593). Where a receiver feeds another, the later one sees what the earlier one has
    changed. Through every receiver behind the sender it is the sender's own patch. If the answer
    follows, the sender informs the answer by way of these receivers.
    Touches: the receivers' sites; the sender's own activation stays as it is. Stands last in a list
    of interventions.
    Raises: InputError for a sender that does not write to the residual stream, or a receiver before
    it.
    Source: arXiv:2304.05969.
    """

    sender: SiteIntervention
    """What the receivers are to see: a `patch` (or any other intervention) at embed, pos_embed,
    attn_out, z, mlp_out or neurons."""
    receivers: Swept[tuple[Receiver, ...]]

    @field_validator("receivers")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("a path needs at least one receiver")
        return value

    def edits(self, model: Model, examples: Examples, session: Session) -> list[Edit]:
        if self.sender.site not in SENDERS:
            raise InputError(
                f"a path starts at one of {', '.join(SENDERS)}, not at {self.sender.site!r}"
            )
        sent = self.sender.edits(model, examples, session)
        path = _Path(
            model, Tape(), {edit.hook: _time(edit, SENDERS[self.sender.site]) for edit in sent}
        )
        masks: dict[str, Tensor] = {}
        for receiver in self.receivers:
            for hook, mask in path.chosen(receiver, examples).items():
                masks[hook] = mask | masks[hook] if hook in masks else mask
        return [*(path.told(edit, self.sender.site) for edit in sent), *path.received(masks)]


@dataclass(frozen=True)
class _Path:
    model: Model
    tape: Tape
    """By hook: of each sender what its change adds to the residual stream; of each receiver what it
    then is."""
    sent: Mapping[str, int]
    """When each sender writes: 2 layer with its attention, 2 layer + 1 with its MLP."""

    def change(self, time: int) -> Tensor | float:
        """What the senders before this time would change in the residual stream."""
        return sum(self.tape[hook] for hook, at in self.sent.items() if at < time)

    def told(self, edit: Edit, site: str) -> Edit:
        written = _written(site, self.model, edit.layer)
        return self.tape.listen(edit.hook, lambda x: {edit.hook: written(edit.function(x) - x)})

    def chosen(self, receiver: Receiver, examples: Examples) -> dict[str, Tensor]:
        n_layers, offset = self.model.cfg.n_layers, RECEIVERS[receiver.site]
        first = min(self.sent.values())
        layers: Any = receiver.layer
        if layers is None and receiver.site != "logits":
            layers = tuple(layer for layer in range(n_layers) if 2 * layer + offset > first)
        like = Ablate(
            method="zero",
            site=receiver.site,
            layer=layers,
            head=receiver.head,
            position=receiver.position,
        )
        for hook in (hooks := like.hooks(self.model)):
            if _time(Edit(hook, _same), offset) <= first:
                raise InputError(
                    f"the receiver {receiver.site!r} at {hook} comes before the sender"
                )
        if not hooks:
            raise InputError(f"no receiver {receiver.site!r} comes behind the sender")
        return dict.fromkeys(hooks, like.mask(self.model, examples))

    def received(self, masks: Mapping[str, Tensor]) -> list[Edit]:
        edits = []
        for layer in range(self.model.cfg.n_layers):
            hooks = [
                hook for hook in (sites.site(name).hook(layer) for name in "qkv") if hook in masks
            ]
            mlp = sites.site("mlp_pre").hook(layer)
            edits += [self._attention(layer, hooks)] if hooks else []
            edits += self._mlp(layer, mlp) if mlp in masks else []
        if "unembed.hook_out" in masks:
            last = f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"
            edits.append(
                self.tape.listen(last, lambda x: at_the_end(self.model, x + self.change(10**6)))
            )
        return [*edits, *(self.tape.play(hook, mask) for hook, mask in masks.items())]

    def _attention(self, layer: int, hooks: list[str]) -> Edit:
        resid = f"blocks.{layer}.hook_resid_pre"
        return self.tape.listen(
            resid, lambda x: in_attention(self.model, layer, x + self.change(2 * layer), hooks)
        )

    def _mlp(self, layer: int, hook: str) -> Sequence[Edit]:
        resid, tape = f"blocks.{layer}.hook_resid_pre", self.tape
        return tape.listen(resid, lambda x: {resid: x}), tape.listen(
            f"blocks.{layer}.hook_attn_out",
            lambda x: in_mlp(
                self.model, layer, tape[resid] + x + self.change(2 * layer + 1), [hook]
            ),
        )


def _time(edit: Edit, offset: int) -> int:
    return 2 * edit.layer + offset


def _same(activation: Tensor) -> Tensor:
    return activation


def _written(site: str, model: Model, layer: int) -> Callable[[Tensor], Tensor]:
    """What a change at a sender's site adds to the residual stream."""
    if site == "z":
        return lambda change: change.flatten(-2) @ model.blocks[layer].attn.W_O.flatten(0, 1)
    if site == "neurons":
        return lambda change: change @ model.blocks[layer].mlp.W_out
    return _same
