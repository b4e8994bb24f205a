"""applied(): interventions on a live model through plain hooks, with checks. The only caller of
`model.hooks` on a user's model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import Intervention
from mechmem.models.architecture import Model
from mechmem.models.backend import HOOKED
from mechmem.models.edits import Edit
from mechmem.models.hooked import edit_hook
from mechmem.session import Session
from mechmem.spec.errors import InputError


class InterventionError(RuntimeError):
    """An intervention had no effect: it did not fire exactly once in every forward pass."""


@contextmanager
def applied(
    model: Model,
    interventions: Sequence[Intervention],
    examples: Examples,
    session: Session | None = None,
) -> Generator[Model, None, None]:
    """A context manager in which the model runs with the interventions, on `examples.tokens` only.

    It removes only its own hooks, also after an exception.

    Args:
        model: a HookedTransformer. Run the model that is yielded: for a swap of weights, it is
            another one.
        interventions: applied together, in this order.
        examples: the examples that the model will read.
        session: gives the checkpoints and example sets that the interventions name.

    Raises:
        InputError: on entry, for a site, layer, head or position that the model does not have;
            inside, for a forward pass on other tokens.
        InterventionError: on exit, if an edit did not fire exactly once in every forward pass.
    """
    session = session or Session()
    edits = session.edits(model, examples, interventions)
    if reason := HOOKED.refusal(model, [edit.hook for edit in edits]):
        raise InputError(reason)
    derived = model
    for part in interventions:
        derived = part.derive(session, derived)
    every, fired = torch.arange(len(examples)), Counter[Any]()
    hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = [
        (edit.hook, edit_hook(edit, every, fired, i)) for i, edit in enumerate(edits)
    ]
    with _counting(derived, examples.tokens) as forwards, derived.hooks(fwd_hooks=hooks):
        yield derived
    _check_fired(edits, fired, len(forwards), bool(interventions))


@contextmanager
def _counting(model: Model, tokens: Tensor) -> Generator[list[None], None, None]:
    """A list that grows by one with every forward pass, including those of `run_with_hooks`, which
    bypasses module hooks. A forward pass on other tokens raises InputError."""
    forwards, plain, own = [], model.forward, "forward" in vars(model)

    def counted(*arguments: Any, **options: Any) -> Any:
        given = arguments[0] if arguments else options.get("input")
        if not isinstance(given, Tensor) or not _same(given, tokens):
            raise InputError(
                "inside applied() the model may only be run on the `examples.tokens` that were "
                "passed to it: the interventions were made for these; open another applied()"
            )
        forwards.append(None)
        return plain(*arguments, **options)

    model.forward = counted
    try:
        yield forwards
    finally:
        if own:
            model.forward = plain
        else:
            del model.forward


def _same(given: Tensor, tokens: Tensor) -> bool:
    return given.shape == tokens.shape and bool((given.to(tokens.device) == tokens).all())


def _check_fired(edits: Sequence[Edit], fired: Counter[Any], n_forwards: int, is_any: bool) -> None:
    if is_any and not n_forwards:
        raise InterventionError(
            "the model was never run inside applied(), so no intervention was made; run the "
            "model that applied() yields"
        )
    for i, edit in enumerate(edits):
        if fired[i] != n_forwards:
            raise InterventionError(
                f"the edit at {edit.hook} fired {fired[i]} times in {n_forwards} forward passes"
            )
