"""Backends: what runs a model with edits and captures, and which of them does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from mechmem.models.architecture import Model
from mechmem.models.edits import Edit
from mechmem.models.fast import Fast
from mechmem.models.hooked import Hooked
from mechmem.spec.errors import InputError

BackendChoice = Literal["auto", "hooked", "fast"]


class Backend(Protocol):
    """Runs a model on tokens, with edits and captures; `Gradients` documents the methods."""

    name: str

    def refusal(
        self, model: Model, hooks: Collection[str] = (), gradients: bool = False
    ) -> str | None: ...

    def resumes(self, model: Model) -> bool: ...

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
    ) -> tuple[Float[Tensor, "batch readout d_vocab"], dict[str, Tensor]]: ...

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
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]: ...


HOOKED, FAST = Hooked(), Fast()


def choose(
    choice: BackendChoice, model: Model, hooks: Collection[str] = (), gradients: bool = False
) -> tuple[Backend, str]:
    """The backend that runs a model, and why.

    Args:
        choice: `auto` takes `fast` unless it refuses; the others insist.
        model: a HookedTransformer.
        hooks: names of the hooks that are edited or captured.
        gradients: whether gradients at these hooks are wanted.

    Raises:
        InputError: for a hook that the model lacks, or if `fast` is insisted on and refuses.
    """
    if reason := HOOKED.refusal(model, hooks, gradients):
        raise InputError(reason)
    if choice == "hooked":
        return HOOKED, "it was asked for"
    reason = FAST.refusal(model, hooks, gradients)
    if choice == "fast" and reason:
        raise InputError(f"the backend `fast` cannot run this model: {reason}; use `auto`")
    return (HOOKED, f"`fast` refuses: {reason}") if reason else (FAST, "it implements the model")
