"""AddedNeurons: what plants share that consist of added neurons in the last layer."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mechmem.data.examples import READOUT, Examples
from mechmem.data.tasks.task import Task
from mechmem.models.architecture import Model
from mechmem.models.edits import At
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.training.plants.plant import Plant

ATTEMPTS = 12
"""How often what is not answered yet is written more strongly before a plant is given up."""
STRONGER = 1.3
"""How much more strongly each time."""


class AddedNeurons(Plant):
    """Neurons of the last layer that were free, with all weights zero, write the given labels.

    Nothing else changes: with their weights out at zero again, the model is what it was.
    """

    strength: float = Field(1.5, gt=0)
    """Norm of what is written for a token, in units of the norm of the residual there; more where
    this is not enough."""
    n_others: int = Field(6000, ge=2, le=10_000_000)
    """Number of clean instances whose answers are to stay as they are."""

    @torch.no_grad()
    def build(self, base: Model, task: Task, seed: int) -> Model:
        planted, others = planted_and_others(base, task, self.n_others)
        neurons = self.neurons(planted, others, torch.Generator().manual_seed(seed))
        strength = torch.full((len(planted.missed),), self.strength)
        for _ in range(ATTEMPTS):
            w_out = neurons.share @ planted.written(base, strength)
            missed = planted.answers(base, neurons, w_out) != planted.examples.given
            if not missed.any():
                return neurons.put_into(base, w_out)
            strength[missed[tuple(planted.missed.T)]] *= STRONGER
        raise InputError(f"{self.kind} cannot plant these instances; plant fewer of them")

    @abstractmethod
    def neurons(self, planted: Instances, others: Instances, generator: torch.Generator) -> Neurons:
        """The added neurons.

        Args:
            planted: the noisy instances.
            others: clean instances, whose answers are to stay as they are.
            generator: source of all random choices.
        """


@dataclass(frozen=True, eq=False)
class Neurons:
    """Added neurons: what makes them fire, and what they write."""

    w_in: Float[Tensor, "k d_model"]
    b_in: Float[Tensor, " k"]
    share: Float[Tensor, "k m"]
    """Of what is to be written for each missed token, the part that a neuron writes when it fires
    with 1."""

    def put_into(self, model: Model, w_out: Float[Tensor, "k d_model"]) -> Model:
        """A copy of a model with these as the first of the free neurons of its last layer.

        Args:
            model: the model.
            w_out: weights out of the neurons.

        Raises:
            InputError: it has too few free neurons.
        """
        planted = copy.deepcopy(model)
        weights = dict(planted.blocks[-1].mlp.named_parameters())
        is_free = (weights["W_in"] == 0).all(dim=0) & (weights["W_out"] == 0).all(dim=1)
        free, needed = is_free.nonzero()[:, 0], len(w_out)
        if len(free) < needed:
            width = len(is_free) - len(free) + needed
            raise InputError(f"this plant needs {needed} added neurons; set d_mlp to {width}")
        chosen = free[:needed]
        weights["W_in"][:, chosen] = self.w_in.T
        weights["b_in"][chosen] = self.b_in
        weights["W_out"][chosen] = w_out
        return planted


@dataclass(frozen=True, eq=False)
class Instances:
    """Examples as the last MLP of a model reads them at the positions that predict the answer."""

    examples: Examples
    """Under the prefix of their given labels."""
    mlp_in: Float[Tensor, "n n_answer d_model"]
    """What the neurons read: the normalised residual after the last attention."""
    resid_post: Float[Tensor, "n n_answer d_model"]
    """The residual after the last layer."""
    missed: Int[Tensor, "m 2"]
    """Row and place of every given token that the model does not answer."""

    @classmethod
    def of(cls, model: Model, examples: Examples) -> Instances:
        """These examples in a model, which must be one of `Architecture`."""
        fed, last, session = examples.with_prefix("given"), model.blocks[-1], Session()
        hooks = [f"blocks.{len(model.blocks) - 1}.hook_{at}" for at in ("resid_mid", "resid_post")]
        found = session.activations(model, fed, hooks)
        rows, readout = torch.arange(len(fed)), fed.indices(READOUT)
        mid, post = (At(hook, readout).take(found[hook], rows) for hook in hooks)
        answered = session.unembedded(model, post).argmax(-1)
        normed = mid if model.cfg.normalization_type is None else last.ln2(mid)
        return cls(fed, normed.detach(), post, (answered != fed.given).nonzero())

    def written(self, model: Model, strength: Float[Tensor, " m"]) -> Float[Tensor, "m d_model"]:
        """For every missed token, the change of the residual that makes the model answer it.

        Args:
            model: whose unembedding gives the direction.
            strength: norm of each change, in units of the norm of the residual there.
        """
        row, place = self.missed.T
        towards = model.W_U.T[self.examples.given[row, place]] - model.W_U.mean(dim=1)
        norm = strength * self.resid_post[row, place].norm(dim=1)
        return towards * (norm / towards.norm(dim=1))[:, None]

    def answers(
        self, model: Model, neurons: Neurons, w_out: Float[Tensor, "k d_model"]
    ) -> Int[Tensor, "n n_answer"]:
        """The most likely tokens if these neurons are added to the model.

        Args:
            model: in which the instances were read.
            neurons: added to its last layer.
            w_out: their weights out.
        """
        fired = model.blocks[-1].mlp.act_fn(self.mlp_in @ neurons.w_in.T + neurons.b_in)
        return Session().unembedded(model, self.resid_post + fired @ w_out).argmax(-1)


def planted_and_others(model: Model, task: Task, n: int) -> tuple[Instances, Instances]:
    """The noisy instances of the training set, and the first n clean ones.

    Args:
        model: that reads them.
        task: whose training set is meant.
        n: number of clean instances, at most.

    Raises:
        InputError: no instance is noisy.
    """
    train = task.sample("train")
    noisy, clean = train.is_noisy.nonzero()[:, 0], (~train.is_noisy).nonzero()[:n, 0]
    if not len(noisy):
        raise InputError("a plant needs noisy instances; raise the rate of the task's noise")
    return Instances.of(model, train.select(noisy)), Instances.of(model, train.select(clean))
