"""Plant: a memory that is built into a model by construction, so that its place is known."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mechmem.data.tasks.task import Task
from mechmem.models.architecture import Architecture, Model
from mechmem.spec.errors import InputError
from mechmem.spec.registry import Component


class Plant(Component, registry="plant"):
    """Builds a memory of the noisy instances of a task into a model that does not have it."""

    @abstractmethod
    def build(self, base: Model, task: Task, seed: int) -> Model:
        """A copy of the model with the memory.

        Args:
            base: the model without it, with room for the new neurons: their weights are zero.
            task: whose noisy instances are to be memorised.
            seed: of all random choices.
        """

    def widened(self, base: Model, architecture: Architecture, task: Task) -> Model:
        """The same model with the number of neurons of another architecture. The weights of the
        new neurons are zero, so it computes what it did before.

        Args:
            base: the model.
            architecture: the same shape, with at least as many neurons in each layer.
            task: gives the sizes of the vocabulary and of the context.
        """
        model = architecture.build(len(task.vocabulary), task.n_context)
        theirs = dict(base.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                old = theirs.get(name)
                if old is None or any(
                    a > b for a, b in zip(old.shape, parameter.shape, strict=True)
                ):
                    raise InputError(
                        f"{name} of the model to start from does not fit into the architecture; "
                        "only `d_mlp` may be larger"
                    )
                parameter.zero_()
                parameter[tuple(slice(n) for n in old.shape)] = old
        return model


def _fits(small: Tensor, large: Tensor) -> bool:
    """Whether a tensor fits into the corner of another one."""
    return small.dim() == large.dim() and all(
        n <= m for n, m in zip(small.shape, large.shape, strict=True)
    )
