"""applied(): the plain hook path, with guards. The only caller of `model.hooks`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import Intervention
from mechmem.models.architecture import Model
from mechmem.models.fast import Edit
from mechmem.session import Session
from mechmem.spec.errors import InputError


class InterventionError(RuntimeError):
    """An intervention did not do what it says: it never fired, or not once in every forward."""


@contextmanager
def applied(
    model: Model,
    interventions: Sequence[Intervention],
    examples: Examples,
    session: Session | None = None,
) -> Generator[Model, None, None]:
    """The model with the interventions in force, for forwards on `examples.tokens`.

    Site, layer, head and position are checked before the body runs (InputError). On leaving, every
    edit must have fired once in every forward (InterventionError otherwise). Removes its own hooks
    only, also after an exception.
    """
    edits = [
        edit for part in interventions for edit in part.edits(model, examples, session or Session())
    ]
    fired: Counter[int] = Counter()
    hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = [
        (edit.hook, _counted(edit, i, fired)) for i, edit in enumerate(edits)
    ]
    missing = [edit.hook for edit in edits if edit.hook not in model.hook_dict]
    if missing:
        raise InputError(f"this model has no hook {missing[0]!r}")
    with _counting(model) as forwards, model.hooks(fwd_hooks=hooks):
        yield model
    _check_fired(edits, fired, len(forwards))


@contextmanager
def _counting(model: Model) -> Generator[list[None], None, None]:
    """A list that grows by one with every forward, also with those of `run_with_hooks`, which goes
    past module hooks."""
    forwards, plain, own = [], model.forward, "forward" in vars(model)

    def counted(*arguments: Any, **options: Any) -> Any:
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


def _counted(edit: Edit, i: int, fired: Counter[int]) -> Callable[..., Tensor]:
    def hook_function(activation: Tensor, hook: Any) -> Tensor:
        fired[i] += 1
        edited = edit.function(activation)
        if edited.shape != activation.shape:
            raise InterventionError(
                f"an edit at {edit.hook} turned {tuple(activation.shape)} into {tuple(edited.shape)}"
            )
        return edited

    return hook_function


def _check_fired(edits: Sequence[Edit], fired: Counter[int], n_forwards: int) -> None:
    if edits and not n_forwards:
        raise InterventionError(
            "the model was never run inside applied(), so no intervention took place"
        )
    for i, edit in enumerate(edits):
        if fired[i] != n_forwards:
            raise InterventionError(
                f"the edit at {edit.hook} fired {fired[i]} times in {n_forwards} forwards"
            )
