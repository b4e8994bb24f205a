"""State: what a model computes from now, so that nothing is kept beyond a change of it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.models.architecture import Model
from mechmem.models.edits import LATE
from mechmem.models.fast import has_hooks, replaced_methods

T = TypeVar("T")

SUMMED = 5_000_000
"""Parameters up to which a model's weights are summed to notice a change behind torch's back."""


class Looks:
    """Looks at models: each time anew, or once within `steady`."""

    def __init__(self) -> None:
        self._found: dict[Any, Any] | None = None

    @contextmanager
    def steady(self) -> Generator[None]:
        """Within it, each model is looked at once. Only around code that changes no model."""
        if self._found is not None:
            yield
            return
        self._found = {}
        try:
            yield
        finally:
            self._found = None

    def once(self, key: Any, look: Callable[[], T]) -> T:
        """What a look finds; within `steady`, what the first one found."""
        if self._found is None:
            return look()
        if key not in self._found:
            self._found[key] = look()
        return self._found[key]

    def state_of(self, key: Any) -> Any:
        """A key in which models and examples stand for what they hold now; None if that can't be
        known."""
        if isinstance(key, (tuple, list)):
            parts = tuple(self.state_of(part) for part in key)
            return None if any(part is None for part in parts) else parts
        if isinstance(key, torch.nn.Module):
            return self.once(("state", key), lambda: state_of_model(key))
        if isinstance(key, Examples):
            return key.content_key
        return ("none",) if key is None else key


def state_of_model(model: torch.nn.Module) -> tuple[Any, ...] | None:
    """The model with what it computes from; None if a user's code takes part in it, whose results
    can't be foretold."""
    modules = [*model.modules()]
    if any(has_hooks(module) or replaced_methods(module) for module in modules):
        return None
    functions = [getattr(module, "act_fn", None) for module in modules]
    buffers = [(buffer.data_ptr(), buffer._version) for buffer in model.buffers()]
    config = repr(vars(model.cfg)) if hasattr(model, "cfg") else ""
    return (model, config, *map(type, modules), *functions, *buffers, *_weights_of(model))


def _weights_of(model: torch.nn.Module) -> tuple[Any, ...]:
    """What changes when weights do: addresses and versions, and for small models weighted sums.

    torch's versions do not count what is written through `.data`, as TransformerLens's users do.
    """
    parameters = [*model.parameters()]
    state: tuple[Any, ...] = tuple((p.data_ptr(), p._version) for p in parameters)
    if sum(p.numel() for p in parameters) <= SUMMED:
        with torch.no_grad():
            state += tuple(torch.stack([_weighted_sum(p) for p in parameters]).tolist())
    return state


def _weighted_sum(parameter: Tensor) -> Tensor:
    """A sum that changes, unlike the plain one, if heads or neurons change places."""
    rows = parameter.reshape(-1, parameter.shape[-1])
    left, right = (_uneven(n, parameter.dtype, parameter.device) for n in rows.shape)
    return left @ (rows @ right)


@cache
def _uneven(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(n, device=device).cos().to(dtype)


def first_difference(base: Model, derived: Model) -> int:
    """The first layer whose weights are not shared; -1 if the embeddings are not."""
    if base is derived:
        return LATE
    theirs = dict(derived.named_parameters())
    layers = []
    for name, parameter in base.named_parameters():
        if theirs[name] is not parameter:
            inside, late = name.startswith("blocks."), name.startswith(("ln_final", "unembed"))
            layers.append(int(name.split(".")[1]) if inside else LATE if late else -1)
    return min(layers, default=LATE)
