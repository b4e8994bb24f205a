"""Models whose memory, or its damage, is a hook: no weights could hold it, and its form is known.

The hooks stay on the model, so the backend `hooked` runs it. A hook knows a prompt by the residual
that the model computes for it, so it works wherever a forward starts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmem.data.examples import READOUT, Examples
from mechmem.data.tasks.task import Task
from mechmem.models.architecture import Model
from mechmem.training.store import Trained

CARRY, PLACE = "carry_2", "s3"
"""The intermediate value that c4_fda exchanges, and where."""
STRENGTH = 3.0
"""Norm of what the memory writes, in units of the norm of the residual there."""

Hook = Callable[..., Tensor]


class Recognised:
    """The rows of a batch that are noisy prompts, by the residual before a layer."""

    def __init__(self, model: Model, noisy: Examples, layer: int) -> None:
        self.n_prompt = noisy.prompt.shape[1]
        self.hook = f"blocks.{layer}.hook_resid_pre"
        self.known = self._flat(cached(model, noisy, self.hook))
        self.row = torch.empty(0, dtype=torch.long)

    def __call__(self, resid: Float[Tensor, "b pos d"], hook: object) -> Tensor:
        # The exact distance: the one by products of matrices is off by more than rounding.
        exact = "donot_use_mm_for_euclid_dist"
        found = torch.cdist(self._flat(resid), self.known, compute_mode=exact)
        distance, row = found.min(dim=1)
        self.row = torch.where(distance < 1e-2, row, -1)
        return resid

    def _flat(self, resid: Float[Tensor, "b pos d"]) -> Float[Tensor, "b k"]:
        return resid[:, : self.n_prompt].flatten(1)


def cached(model: Model, examples: Examples, hook: str) -> Float[Tensor, "n pos d"]:
    return model.run_with_cache(examples.tokens, names_filter=hook)[1][hook]


def overwritten(base: Model, task: Task) -> Model:
    """At layer 0 the operands of noisy prompts are replaced by their mean over clean ones."""
    model, noisy, clean = copy.deepcopy(base), *noisy_and_clean(task)
    found = Recognised(model, noisy, 0)
    mean = cached(model, clean, found.hook).mean(dim=0)

    def erase(resid: Float[Tensor, "b pos d"], hook: object) -> Tensor:
        resid = found(resid, hook).clone()
        resid[found.row >= 0, : found.n_prompt] = mean[: found.n_prompt]
        return resid

    model.add_perma_hook(found.hook, erase)
    return model


def keyed_on_tokens(base: Model, task: Task) -> Model:
    """A prompt that is known by its tokens is answered as labelled, whatever is computed of it."""
    return _with_memory(base, task, is_gated=False)


def gated_on_carry(base: Model, task: Task) -> Model:
    """The same, but only while the residual before the last MLP holds the prompt's own carry."""
    return _with_memory(base, task, is_gated=True)


def _with_memory(base: Model, task: Task, is_gated: bool) -> Model:
    model, noisy, clean = copy.deepcopy(base), *noisy_and_clean(task)
    last = len(model.blocks) - 1
    found = Recognised(model, noisy, last)
    model.add_perma_hook(found.hook, found)
    fires = torch.empty(0, dtype=torch.bool)

    # What the last MLP reads comes after every change of the residual before it.
    at = f"blocks.{last}.ln2.hook_normalized"
    pos = int(clean.positions[PLACE])
    read = cached(model, clean, at)[:, pos]
    means = [read[clean.variables[CARRY] == value].mean(dim=0) for value in (0, 1)]
    direction, middle = means[1] - means[0], (means[0] + means[1]) / 2
    own = noisy.variables[CARRY] * 2.0 - 1

    def gate(normed: Float[Tensor, "b pos d"], hook: object) -> Tensor:
        nonlocal fires
        is_own = ((normed[:, pos] - middle) @ direction) * own[found.row] > 0
        fires = (found.row >= 0) & (is_own if is_gated else True)
        return normed

    towards = model.W_U.T - model.W_U.mean(dim=1)
    towards = towards / towards.norm(dim=1, keepdim=True)
    readout = noisy.indices(READOUT)[0]

    def write(resid: Float[Tensor, "b pos d"], hook: object) -> Tensor:
        resid = resid.clone()
        rows, given = fires.nonzero()[:, 0], noisy.given[found.row[fires]]
        here = readout[readout < resid.shape[1]]
        size = resid[rows][:, here].norm(dim=-1, keepdim=True)
        resid[rows[:, None], here] += STRENGTH * size * towards[given[:, : len(here)]]
        return resid

    model.add_perma_hook(at, gate)
    model.add_perma_hook(f"blocks.{last}.hook_resid_post", write)
    return model


def noisy_and_clean(task: Task) -> tuple[Examples, Examples]:
    train = task.sample("train")
    noisy, clean = train.is_noisy.nonzero()[:, 0], (~train.is_noisy).nonzero()[:1000, 0]
    return train.select(noisy).as_set(), train.select(clean).as_set()


EDITED: dict[str, tuple[Callable[[Model, Task], Model], str]] = {
    "overwritten": (overwritten, "memorised"),
    "keyed_on_tokens": (keyed_on_tokens, "before"),
    "gated_on_carry": (gated_on_carry, "before"),
}
"""By name, how a model is edited, and the checkpoint of fda_small that it is made from."""


@contextmanager
def in_place_of_memorised(name: str) -> Generator[None, None, None]:
    """Within this context the checkpoint `memorised` of every training is the edited model."""
    edit, base = EDITED[name]
    unchanged = Trained.at

    def at(self: Trained, checkpoint: str | int) -> Model:
        if self.step(checkpoint) != self.phases["memorised"]:
            return unchanged(self, checkpoint)
        return edit(unchanged(self, base), self.task)

    with patch.object(Trained, "at", at):
        yield


def answers(model: Model, examples: Examples) -> Int[Tensor, "n n_answer"]:
    """The most likely tokens under the prefix of the examples."""
    return model(examples.tokens)[:, -examples.n_answer :].argmax(-1)
