"""Budget: how many examples go through a model at once, and what is kept of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.models.architecture import Model
from mechmem.spec.errors import InputError

MEMORY = 2 * 2**30
"""Default budget in bytes."""
CACHED, AT_ONCE, BULKY = 1 / 2, 1 / 4, 1 / 4
"""Shares of the budget: for kept activations, for one forward, and from which on a set is bulky."""

QUICK = 64 * 2**20
"""Bytes of one forward on a CPU from which on rows take longer: its tensors leave the caches."""


@dataclass(frozen=True)
class Budget:
    """The bytes by which resident memory may grow."""

    memory: int

    def batches(
        self, model: Model, examples: Examples, gradients: bool = False, apart: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(row numbers, tokens) of parts that fit the budget, each of one length.

        Args:
            model: what is to read them.
            examples: of one or of several lengths.
            gradients: whether a backward follows the forward.
            apart: whether rows are known not to depend on each other.
        """
        for numbers, part in examples.buckets():
            tokens = part.tokens
            check_tokens(model, part, tokens)
            at_once = self.rows_at_once(model, part, gradients, apart)
            for rows in torch.arange(len(part)).split(at_once):
                yield numbers[rows], tokens[rows]

    def rows_at_once(
        self, model: Model, examples: Examples, gradients: bool = False, apart: bool = False
    ) -> int:
        """Examples whose forward (or backward) fits into the share of the budget for it.

        Args:
            model: what is to read them.
            examples: for their number of positions.
            gradients: whether a backward follows the forward.
            apart: whether rows are known not to depend on each other. Then no more go through a
                CPU at once than are quick.
        """
        config, n_pos = model.cfg, int(examples.n_positions.max())
        widths = 8 * config.d_model + 5 * int(config.d_mlp or 0) + 3 * config.n_heads * n_pos
        layers = 4 * config.n_layers if gradients else 1
        per_position = widths * layers + 2 * config.d_vocab_out
        parameter, most = next(model.parameters()), self.memory * AT_ONCE
        if apart and parameter.device.type == "cpu":
            most = min(most, QUICK)
        return max(1, int(most / (parameter.element_size() * n_pos * per_position)))

    def is_bulky(self, model: Model, examples: Examples) -> bool:
        """Whether one whole activation of these examples takes too much of the budget."""
        widest = max(int(model.cfg.d_mlp or 0), model.cfg.d_model)
        n_positions = int(examples.n_positions.sum())
        size = next(model.parameters()).element_size()
        return n_positions * widest * size > self.memory * BULKY


@dataclass
class Kept:
    """Activations that are kept while they fit; the longest unused ones go first."""

    most: float
    """Bytes that are kept at most."""
    _tensors: OrderedDict[Any, tuple[Tensor, int]] = field(default_factory=OrderedDict)

    def get(self, key: Any) -> Tensor | None:
        """The tensor of a key; none if it is not kept, or someone has changed it in place."""
        if key is None or key not in self._tensors:
            return None
        tensor, version = self._tensors[key]
        if tensor._version != version:
            del self._tensors[key]
            return None
        self._tensors.move_to_end(key)
        return tensor

    def put(self, key: Any, tensor: Tensor) -> None:
        """Keep a tensor, unless its key is None."""
        if key is None:
            return
        self._tensors[key] = (tensor, tensor._version)
        size = sum(kept.nbytes for kept, _ in self._tensors.values())
        while self._tensors and size > self.most:
            oldest, _ = self._tensors.popitem(last=False)[1]
            size -= oldest.nbytes


def check_tokens(model: Model, examples: Examples, tokens: Tensor) -> None:
    """Raises InputError for examples that the model cannot read or answer."""
    config = model.cfg
    if tokens.shape[1] > config.n_ctx:
        raise InputError(
            f"the examples have {tokens.shape[1]} input positions, the model reads {config.n_ctx}"
        )
    largest = max(int(tokens.max()), int(examples.given.max()), int(examples.true.max()))
    if largest >= min(config.d_vocab, config.d_vocab_out):
        raise InputError(
            f"the examples have the token {largest}, the model knows {config.d_vocab} tokens and "
            f"answers with {config.d_vocab_out}"
        )
