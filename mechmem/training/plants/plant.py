"""Plant: the interface of memory that is put into a trained model by construction."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mechmem.data.tasks.task import Task
from mechmem.models.architecture import Architecture, Model
from mechmem.spec.errors import InputError
from mechmem.spec.registry import Component


class Plant(Component, registry="plant"):
    """Memory of known form: a construction that makes a model give the noisy instances of a task
    their given labels, without training."""

    @torch.no_grad()
    def widened(self, base: Model, architecture: Architecture, task: Task) -> Model:
        """The same model with the number of neurons of another architecture. The weights of the
        added neurons are zero, so it computes what it did before.

        Args:
            base: the trained model.
            architecture: that of the base, or one with a larger `d_mlp`.
            task: gives the sizes of the vocabulary and of the context.

        Raises:
            InputError: the architecture differs from that of the base in anything else.
        """
        wide = architecture.build(len(task.vocabulary), task.n_context)
        trained = dict(base.named_parameters())
        for name, parameter in wide.named_parameters():
            if name not in trained or not _fits(name, trained[name], parameter):
                raise InputError(
                    f"{name} of the model to start from does not fit into the architecture; only "
                    "`d_mlp` may be larger"
                )
            corner = tuple(slice(size) for size in trained[name].shape)
            parameter.zero_()[corner] = trained[name]
        return wide

    @abstractmethod
    def build(self, base: Model, task: Task, seed: int) -> Model:
        """A new model that gives the noisy instances of the task their given labels.

        Args:
            base: the model without the memory; the weights of the neurons that were added to it are
                zero.
            task: its noisy instances are planted.
            seed: of all random choices.

        Raises:
            InputError: the plant cannot be built into this model.
        """


def _fits(name: str, small: Tensor, large: Tensor) -> bool:
    """Whether a parameter differs in nothing but a larger number of neurons."""
    if name.endswith(("mlp.W_in", "mlp.b_in")):
        return small.shape[:-1] == large.shape[:-1] and small.shape[-1] <= large.shape[-1]
    if name.endswith("mlp.W_out"):
        return small.shape[1:] == large.shape[1:] and len(small) <= len(large)
    return small.shape == large.shape
