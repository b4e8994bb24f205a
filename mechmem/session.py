"""Session: the models and example sets of an experiment under their names, with the activations
they share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.models.architecture import Model
from mechmem.models.fast import Edit, forward
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.registry import Component


@dataclass
class Session:
    """What analyses work on. Activations are computed once and kept while they fit into `memory`
    bytes."""

    models: Mapping[str, Model] = field(default_factory=dict)
    example_sets: Mapping[str, Examples] = field(default_factory=dict)
    memory: int = 2_000_000_000
    curves: Sequence[Mapping[str, float]] = ()
    """The four curves of the training, a row an evaluation."""
    phases: Mapping[str, int | None] = field(default_factory=dict)
    """The step of each phase."""
    chance: float = 0.0
    """Accuracy of a guess (fraction)."""
    rule: Callable[[Tensor], Tensor] | None = None
    """The task's true answers to any prompts, also ones that no example set holds; -1 where it has
    none."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Results that several analyses share."""
    n_forwarded: float = 0
    """Examples that went through a model so far: the cost of what was done, or of what is
    rehearsed."""
    say: Callable[[str], None] = lambda _: None
    """Told what is being worked on."""
    is_rehearsal: bool = False
    """A few examples and untrained models stand for the real ones: what hangs on their values is
    not to be refused."""
    _kept: OrderedDict[tuple[int, str, str], Tensor] = field(default_factory=OrderedDict)
    _alive: dict[int, Model] = field(default_factory=dict)

    def model(self, name: str) -> Model:
        """Raises InputError for a name that the experiment does not give."""
        if name not in self.models:
            raise InputError(f"there is no checkpoint {name!r}; {suggest(name, self.models)}")
        return self.models[name]

    def examples(self, name: str) -> Examples:
        """Raises InputError for a name that the experiment does not give."""
        if name not in self.example_sets:
            raise InputError(
                f"there is no example set {name!r}; {suggest(name, self.example_sets)}"
            )
        return self.example_sets[name]

    def named(self, *components: Component) -> tuple[Any, ...]:
        """The models and example sets that these components name: what, beside them, decides a
        result of theirs."""
        words = sorted(set().union(*(component.words() for component in components)))
        return tuple(
            kind[word]
            for word in words
            for kind in (self.models, self.example_sets)
            if word in kind
        )

    def count(self, examples: Examples, times: int = 1) -> None:
        """Counts these examples as forwarded."""
        self.n_forwarded += times * len(examples)

    def activation(self, model: Model, examples: Examples, hook: str) -> Tensor:
        """The activation at one hook, unedited."""
        return self.activations(model, examples, [hook])[hook]

    @torch.no_grad()
    def activations(
        self, model: Model, examples: Examples, hooks: Collection[str]
    ) -> dict[str, Tensor]:
        """The activations at these hooks, unedited; one forward for those that are not at hand."""
        self._alive[id(model)] = model
        missing = [hook for hook in hooks if (id(model), examples.key, hook) not in self._kept]
        if missing:
            self.count(examples)
            _, found = forward(model, examples.tokens, 0, capture=missing)
            self._kept.update({(id(model), examples.key, hook): found[hook] for hook in missing})
        result = {}
        for hook in hooks:
            self._kept.move_to_end((id(model), examples.key, hook))
            result[hook] = self._kept[id(model), examples.key, hook]
        while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > self.memory:
            self._kept.popitem(last=False)
        return result

    @torch.no_grad()
    def logits(self, model: Model, examples: Examples, edits: Iterable[Edit] = ()) -> Tensor:
        """Logits of every answer token, `n n_answer d_vocab`; resumes at the first edited layer
        where it can."""
        edits = list(edits)
        layer = min((edit.layer for edit in edits), default=0)
        layer = min(layer, model.cfg.n_layers - 1)
        resid = f"blocks.{layer}.hook_resid_pre"
        start = None
        if layer > 0 and (id(model), examples.key, resid) in self._kept:
            start = (layer, self.activation(model, examples, resid))
        self.count(examples)
        return forward(model, examples.tokens, examples.n_answer, edits, start=start)[0]
