"""Session: the models and example sets of an experiment, and everything that may be asked of them.

Analyses and interventions never run a model themselves. They ask the session, which chooses the
backend, keeps to the memory budget, and computes nothing twice that it still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from mechmem.data.examples import Examples, Label
from mechmem.models import backend as backends
from mechmem.models.architecture import Model, moved
from mechmem.models.backend import Backend, BackendChoice
from mechmem.models.edits import LATE, At, Edit, layer_of
from mechmem.session.budget import CACHED, MEMORY, Budget, Kept
from mechmem.session.state import Looks, first_difference
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.references import References
from mechmem.spec.registry import Component

T = TypeVar("T")
Logits = Float[Tensor, "n n_answer d_vocab"]
SourcePrefix = Literal["own", "given", "true"]

MOST_STACKED = 1024
"""Rows up to which several cells of a sweep go through the model together."""


class SessionIntervention(Protocol):
    """What a session asks of an intervention."""

    def is_by_example(self) -> bool: ...

    def edits_after(
        self, earlier: Sequence[Edit], session: Session, model: Model, examples: Examples
    ) -> list[Edit]: ...

    def derive(self, session: Session, model: Model) -> Model: ...


class Differentiated(NamedTuple):
    """A batch of a backward pass."""

    rows: Int[Tensor, " batch"]
    logits: Float[Tensor, "batch n_answer d_vocab"]
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Session:
    """Models and example sets under their names, run within a memory budget.

    Args:
        models: HookedTransformers by name.
        example_sets: examples by name.
        curves: the four curves of the training, one row per evaluation.
        phases: step of each phase of the training; None for one that never came.
        chance: accuracy of a guess (fraction).
        rule: the task's true answers to any prompts, also ones that no set holds; -1 for none.
        device: where models are moved to; `auto` leaves them where they are.
        memory: budget in bytes by which resident memory may grow; every forward is chunked to it.
        backend: `auto` runs on `fast` what it implements; `hooked` and `fast` insist.
        say: is told what is being worked on.
    """

    def __init__(
        self,
        models: Mapping[str, Model] | None = None,
        example_sets: Mapping[str, Examples] | None = None,
        *,
        curves: Sequence[Mapping[str, float]] = (),
        phases: Mapping[str, int | None] | None = None,
        chance: float = 0.0,
        rule: Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device = "auto",
        memory: int = MEMORY,
        backend: BackendChoice = "auto",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.models, self.example_sets = dict(models or {}), dict(example_sets or {})
        if device != "auto":
            where = torch.device(device)
            self.models = {name: moved(model, where) for name, model in self.models.items()}
        self.curves, self.phases, self.chance, self.rule = curves, dict(phases or {}), chance, rule
        self.budget, self.backend, self.say = Budget(memory), backend, say
        self.backends: dict[str, tuple[str, str]] = {}
        """By name of the model, which backend ran it last and why."""
        self.n_forwarded: float = 0
        """Examples that went through a model so far."""
        self._declared: References | None = None
        self._activations = Kept(memory * CACHED)
        self._results: dict[Any, Any] = {}
        self._looks = Looks()

    # What there is, by name

    def model(self, ref: str | Model) -> Model:
        """The model of this name. Raises InputError for one that is unknown or not declared."""
        if not isinstance(ref, str):
            return ref
        return self._named(ref, self.models, "checkpoint", "checkpoints")

    def examples(self, ref: str | Examples) -> Examples:
        """The set of this name. Raises InputError for one that is unknown or not declared."""
        if not isinstance(ref, str):
            return ref
        return self._named(ref, self.example_sets, "example set", "examples")

    def _named(self, name: str, known: Mapping[str, T], kind: str, field: str) -> T:
        if name not in known:
            raise InputError(f"there is no {kind} {name!r}; {suggest(name, known)}")
        if self._declared is not None and name not in getattr(self._declared, field):
            raise InputError(
                f"the {kind} {name!r} is used without being declared: the field that names it must "
                "be a CheckpointName or an ExampleSetName"
            )
        return known[name]

    def referred(self, *components: Component) -> tuple[Any, ...]:
        """The models and example sets that these components name, for the keys of results."""
        found: list[Any] = []
        for component in components:
            references = component.references()
            found += [self.models[name] for name in sorted(references.checkpoints)]
            found += [self.example_sets[name] for name in sorted(references.examples)]
        return tuple(found)

    @contextmanager
    def declaring(self, references: References) -> Generator[None]:
        """Only these checkpoints and example sets may be asked for, as a result depends on them."""
        before, self._declared = self._declared, references
        try:
            yield
        finally:
            self._declared = before

    # What a dry run answers otherwise

    def demand(self, is_met: bool, message: str) -> None:
        """Raises InputError unless this is met. Only for what depends on values or numbers of
        examples: a dry run, whose models are untrained and whose sets are small, lets it pass."""
        if not is_met:
            raise InputError(message)

    def few(self, n: int, most: int) -> int:
        """How many steps or units to work through: all `n`, or `most` of them in a dry run."""
        return n

    def count(self, examples: Examples, times: int = 1) -> None:
        """Counts these examples as forwarded."""
        self.n_forwarded += times * len(examples)

    # Running models

    def logits(
        self,
        model: Model,
        examples: Examples,
        interventions: Sequence[SessionIntervention] = (),
        made_for: Examples | None = None,
    ) -> Logits:
        """Logits of every answer token under the interventions, on the CPU.

        Args:
            model: what is run.
            examples: what it reads.
            interventions: applied together, in this order.
            made_for: the same examples under another prefix, whose activations the interventions
                are to take; those that are read unless given.
        """
        with self.steady():
            return self._logits(model, examples, interventions, made_for)

    def _logits(
        self,
        model: Model,
        examples: Examples,
        interventions: Sequence[SessionIntervention],
        made_for: Examples | None,
    ) -> Logits:
        if not interventions:
            return self.baseline(model, examples)
        derived = self._derived(model, interventions)
        made_for = examples if made_for is None else made_for
        at_once = self.budget.rows_at_once(model, examples)
        is_split = all(part.is_by_example() for part in interventions) and self.budget.is_bulky(
            model, examples
        )
        if is_split and len(examples) > at_once:
            parts = torch.arange(len(examples)).split(at_once)
            pieces = (
                self.logits(model, examples.select(r), interventions, made_for.select(r))
                for r in parts
            )
            return torch.cat([*pieces])
        edits = self._edits(model, made_for, interventions)
        trusted = all(part.is_by_example() for part in interventions)
        return self._forward(derived, examples, edits, base=model, trusted=trusted)[0]

    def logits_of_each(
        self,
        model: Model,
        examples: Examples,
        cells: Sequence[Sequence[SessionIntervention]],
    ) -> Iterator[Logits]:
        """The logits under each of these lists of interventions, in their order.

        Cells that change some neurons of one layer to known values go through the model together:
        a neuron moves the residual after its layer along its own row of W_out, and the forward
        starts there.

        Args:
            model: what is run.
            examples: what it reads.
            cells: for each cell, the interventions that are applied together.
        """
        waiting: list[Edit] = []
        for cell in cells:
            with self.steady():
                edit = self._of_neurons_only(model, examples, cell)
            is_full = (len(waiting) + 1) * len(examples) > MOST_STACKED
            if waiting and (edit is None or edit.hook != waiting[0].hook or is_full):
                yield from self._of_neurons(model, examples, waiting)
                waiting = []
            if edit is None:
                yield self.logits(model, examples, cell)
            else:
                waiting.append(edit)
        if waiting:
            yield from self._of_neurons(model, examples, waiting)

    def _of_neurons_only(
        self, model: Model, examples: Examples, cell: Sequence[SessionIntervention]
    ) -> Edit | None:
        """The edit of a cell that does nothing but set neurons to known values, else None."""
        edits = self._edits(model, examples, cell) if len(cell) == 1 else []
        is_one = len(edits) == 1 and self._moves_neurons(model, edits[0], examples)
        return edits[0] if is_one else None

    @torch.no_grad()
    def baseline(self, model: Model, examples: Examples) -> Logits:
        """Logits without intervention. Keeps the residual before each layer too, where edited
        forwards resume, if there is room for it."""
        kept: list[str] = []
        if examples.is_rectangular and not self.budget.is_bulky(model, examples):
            kept = [f"blocks.{layer}.hook_resid_pre" for layer in range(1, model.cfg.n_layers)]

        def make() -> Logits:
            logits, found = self._forward(model, examples, capture=kept)
            self._keep(model, examples, found)
            return logits

        return self.cached(("baseline", model, examples.key, examples.n_answer), make)

    @torch.no_grad()
    def activations(
        self, model: Model, examples: Examples, hooks: Collection[str]
    ) -> dict[str, Tensor]:
        """The whole activations at these hooks, without intervention, on the model's device.

        Args:
            model: what is run.
            examples: what it reads; all of one length.
            hooks: TransformerLens's names.
        """
        self._check_rectangular(examples)
        names = list(dict.fromkeys(hooks))
        with self.steady():
            kept = {hook: self._kept(model, examples, hook) for hook in names}
            found = {hook: tensor for hook, tensor in kept.items() if tensor is not None}
            if missing := [hook for hook in names if hook not in found]:
                _, new = self._forward(model, examples, capture=missing, readout=0)
                self._keep(model, examples, new)
                found |= new
        return {hook: found[hook] for hook in names}

    @torch.no_grad()
    def edited_activations(
        self, model: Model, examples: Examples, edits: Sequence[Edit], hooks: Collection[str]
    ) -> dict[str, Tensor]:
        """The whole activations at these hooks in a run with edits, as a first pass of two.

        Args:
            model: what is run.
            examples: what it reads; all of one length.
            edits: applied in this order; the activations are those after them.
            hooks: TransformerLens's names.
        """
        self._check_rectangular(examples)
        names = list(dict.fromkeys(hooks))
        # The forward ends with the last layer that is read; later edits can't reach it.
        last = max(map(layer_of, names), default=-1)
        early = [edit for edit in edits if edit.layer <= last]
        return self._forward(model, examples, early, trusted=False, capture=names, readout=0)[1]

    @torch.no_grad()
    def activation(self, model: Model, examples: Examples, at: At | str) -> Tensor:
        """The activation at one place, without intervention, on the model's device.

        Args:
            model: what is run.
            examples: what it reads; `at` was resolved for them.
            at: a hook for the whole activation, or a place. Where an example does not have the
                position, the value is NaN.
        """
        place = At(at) if isinstance(at, str) else at
        every = torch.arange(len(examples))
        if place.is_whole or (
            examples.is_rectangular and not self.budget.is_bulky(model, examples)
        ):
            whole = self.activations(model, examples, [place.hook])[place.hook]
            return whole if place.is_whole else place.known(place.take(whole, every), every)
        pieces: list[Tensor] = []
        order: list[Tensor] = []
        for rows, tokens in self.budget.batches(model, examples, apart=True):
            runner = self._choose(model, [place.hook])
            _, found = runner.run(model, tokens, rows, 0, capture=[place.hook])
            pieces.append(place.known(place.take(found[place.hook], rows), rows))
            order.append(rows)
        self.count(examples)
        return torch.cat(pieces)[torch.cat(order).argsort().to(pieces[0].device)]

    def unembedded(
        self, model: Model, resid: Float[Tensor, "n pos d_model"]
    ) -> Float[Tensor, "n pos d_vocab"]:
        """The logits if this were the last residual: final norm, unembedding, soft cap.

        Gradients pass through it.
        """
        runner = self._choose(model, [])
        n, n_pos, _ = resid.shape
        tokens = torch.zeros(n, n_pos, dtype=torch.long)  # not read: the forward starts later
        start = (model.cfg.n_layers, resid)
        return runner.run(model, tokens, torch.arange(n), n_pos, resume=start)[0]

    def gradients(
        self,
        model: Model,
        examples: Examples,
        loss: Callable[[Tensor, Int[Tensor, " batch"]], Tensor],
        wrt: Sequence[str],
        edits: Sequence[Edit] = (),
    ) -> Iterator[Differentiated]:
        """Activations and gradients of a loss at hooks, batch by batch.

        Args:
            model: what is run.
            examples: what it reads; all of one length.
            loss: (logits of the answer tokens on the model's device, row numbers) -> one number.
            wrt: TransformerLens's names of the hooks.
            edits: applied in this order; activations and gradients are those after them. They must
                not mix rows.
        """
        self._check_rectangular(examples)
        runner = self._choose(model, [*wrt, *(edit.hook for edit in edits)], gradients=True)
        n_answer = examples.n_answer
        for rows, tokens in self.budget.batches(model, examples, gradients=True):
            found = runner.gradients(model, tokens, rows, n_answer, loss, wrt, edits=edits)
            yield Differentiated(rows, *found)
        self.count(examples)

    def greedy(
        self,
        model: Model,
        examples: Examples,
        interventions: Sequence[SessionIntervention] = (),
        known: Mapping[Label, Tensor] | None = None,
        source_prefix: SourcePrefix = "own",
    ) -> Int[Tensor, "n n_answer"]:
        """The greedy answer under the interventions: the one definition of a decoded answer.

        A guess of the answer is fed, and what the model makes of it fed again, until nothing
        changes: the first t tokens are final after t rounds, and an answer that was guessed right
        costs one forward instead of `n_answer`.

        Args:
            model: what is run.
            examples: whose prompts it answers.
            interventions: applied together, at every step.
            known: the most likely tokens under the given or the true prefix, where they are at
                hand, as first guesses that cost nothing.
            source_prefix: the earlier answer tokens that sources of activations are fed: those of
                the edited model's own answer so far, or of the given or the true label.
        """
        answer, n_right = examples.given.clone(), torch.full((len(examples),), -1)
        for label, tokens in (known or {}).items():
            agreeing = tokens[:, :-1] == examples.labels(label)[:, :-1]
            n_agreeing = agreeing.cumprod(dim=1).sum(dim=1)
            is_better = n_agreeing > n_right
            answer[is_better], n_right = tokens[is_better], n_agreeing.maximum(n_right)
        apart = all(part.is_by_example() for part in interventions)
        every = torch.arange(len(examples))
        open_rows = (n_right < examples.n_answer - 1).nonzero()[:, 0] if apart else every
        for _ in range(examples.n_answer):
            if not len(open_rows):
                break
            new = self._continued(model, examples, interventions, answer, open_rows, source_prefix)
            is_final = (new[:, :-1] == answer[open_rows][:, :-1]).all(dim=1)
            answer[open_rows] = new
            # Where examples depend on each other, none is final before all are.
            open_rows = open_rows[~is_final] if apart or is_final.all() else every
        return answer

    def _continued(
        self,
        model: Model,
        examples: Examples,
        interventions: Sequence[SessionIntervention],
        answer: Tensor,
        rows: Tensor,
        source_prefix: SourcePrefix,
    ) -> Tensor:
        """The most likely answer tokens of these rows if the model is fed this answer so far."""
        part = examples.select(rows)
        fed = part.continued_with(answer[rows])
        made_for = fed if source_prefix == "own" else part.with_prefix(source_prefix)
        return self.logits(model, fed, interventions, made_for).argmax(-1)

    # Results

    def steady(self) -> AbstractContextManager[None]:
        """Within it, each model is looked at once, for its state and for its backend. Only around
        code that changes no model."""
        return self._looks.steady()

    def cached(self, key: Sequence[Any], make: Callable[[], T]) -> T:
        """A result that several analyses share: made once for the same key.

        Models and examples in the key count as they are now: after a change in place, or where a
        model carries hooks of its user, the result is made anew.

        Args:
            key: all that decides the result.
            make: makes it.
        """
        state = self._looks.state_of(key)
        if state is None:
            return make()
        if state not in self._results:
            self._results[state] = make()
        return self._results[state]

    # The parts of the above

    def _edits(
        self, model: Model, examples: Examples, interventions: Sequence[SessionIntervention]
    ) -> list[Edit]:
        edits: list[Edit] = []
        for part in interventions:
            new = part.edits_after(edits, self, model, examples)
            mixing = next((edit for edit in new if not edit.rowwise), None)
            if part.is_by_example() and mixing is not None:
                raise InputError(
                    f"{type(part).__name__} declares `by_example`, but its edit at {mixing.hook} "
                    "is not `rowwise`; leave `by_example` False"
                )
            edits += new
        return edits

    def edits(
        self, model: Model, examples: Examples, interventions: Sequence[SessionIntervention]
    ) -> list[Edit]:
        """The edits of several interventions applied together.

        Args:
            model: the unedited model.
            examples: what it is to read.
            interventions: in their order.
        """
        with self.steady():
            return self._edits(model, examples, interventions)

    def _derived(self, model: Model, interventions: Sequence[SessionIntervention]) -> Model:
        for part in interventions:
            model = part.derive(self, model)
        return model

    @torch.no_grad()
    def _forward(
        self,
        model: Model,
        examples: Examples,
        edits: Sequence[Edit] = (),
        *,
        base: Model | None = None,
        trusted: bool = True,
        capture: Sequence[str] = (),
        readout: int | None = None,
    ) -> tuple[Logits, dict[str, Tensor]]:
        """Runs all examples, in chunks that fit the budget.

        Args:
            model: what is run.
            examples: what it reads.
            edits: applied in this order.
            base: the model that it was derived from, whose kept residuals it may start at.
            trusted: whether the edits are known not to mix rows.
            capture: hooks whose whole activations are returned, after their edits.
            readout: number of positions at the end that are read out; the answer's by default.
        """
        readout = examples.n_answer if readout is None else readout
        hooks = [*(edit.hook for edit in edits), *capture]
        runner = self._choose(model, hooks)
        apart = trusted and all(edit.rowwise for edit in edits)
        batches = [*self.budget.batches(model, examples, apart=apart)]
        if len(batches) > 1:
            self._check_rowwise(runner, model, examples, edits, trusted)
        resume = self._resumed(runner, model, base or model, examples, hooks)
        whole: dict[str, Tensor] = {}
        logits: Tensor | None = None
        for rows, tokens in batches:
            start = None if resume is None else (resume[0], resume[1][rows.to(resume[1].device)])
            found, activations = runner.run(
                model, tokens, rows, readout, edits=edits, capture=capture, resume=start
            )
            if len(batches) == 1:
                logits, whole = found.cpu(), activations
                break
            if logits is None:
                logits = torch.empty(len(examples), *found.shape[1:], dtype=found.dtype)
            logits[rows] = found.cpu()
            for hook, activation in activations.items():
                if hook not in whole:
                    whole[hook] = activation.new_empty(len(examples), *activation.shape[1:])
                whole[hook][rows.to(activation.device)] = activation
        self.count(examples)
        assert logits is not None
        return logits, whole

    def _choose(self, model: Model, hooks: Collection[str], gradients: bool = False) -> Backend:
        wanted = tuple(sorted(set(hooks)))
        runner, reason = self._looks.once(
            ("backend", model, wanted, gradients),
            lambda: backends.choose(self.backend, model, wanted, gradients),
        )
        name = next((n for n, known in self.models.items() if known is model), "another model")
        if self.backends.get(name) != (runner.name, reason):
            self.backends[name] = (runner.name, reason)
            if runner.name == "hooked" and self.backend == "auto":
                self.say(f"{name} runs on the backend `hooked`: {reason}")
        return runner

    def _check_rowwise(
        self,
        runner: Backend,
        model: Model,
        examples: Examples,
        edits: Sequence[Edit],
        trusted: bool,
    ) -> None:
        """Raises InputError for an edit that mixes rows, whose numbers chunks would change."""
        mixing = next((edit for edit in edits if not edit.rowwise), None)
        if mixing is not None:
            raise InputError(
                f"the edit at {mixing.hook} looks at several rows together, and {len(examples)} "
                f"examples do not fit into {self.budget.memory / 2**30:.3g} GiB at once; raise "
                "`memory` "
                "or "
                "take fewer examples"
            )
        if trusted:
            return
        # Code of the user's may mix rows without having said so: two rows must not know each other.
        pairs = [(rows, part) for rows, part in examples.buckets() if len(part) > 1]
        if not pairs:
            return
        rows, tokens = pairs[0][0][:2], pairs[0][1].select([0, 1]).tokens
        readout = examples.n_answer
        both, _ = runner.run(model, tokens, rows, readout, edits=edits)
        alone, _ = runner.run(model, tokens[:1], rows[:1], readout, edits=edits)
        if not torch.allclose(both[:1], alone, rtol=1e-3, atol=1e-4):
            raise InputError(
                "an edit of these interventions gives a row other numbers when it is run with "
                "another row; make it an Edit with `rowwise=False`, or take fewer examples"
            )

    def _resumed(
        self,
        runner: Backend,
        model: Model,
        base: Model,
        examples: Examples,
        hooks: Sequence[str],
    ) -> tuple[int, Tensor] | None:
        """The layer that a forward can start at, with the kept residual before it."""
        if not runner.resumes(model) or not examples.is_rectangular:
            return None
        first = min(map(layer_of, hooks), default=LATE)
        first = min(first, first_difference(base, model), model.cfg.n_layers - 1)
        if first <= 0:
            return None
        kept = self._kept(base, examples, f"blocks.{first}.hook_resid_pre")
        return None if kept is None else (first, kept)

    def _moves_neurons(self, model: Model, edit: Edit, examples: Examples) -> bool:
        """Whether an edit sets neurons to known values in a model that `fast` implements."""
        return (
            edit.constant is not None
            and edit.hook.endswith("mlp.hook_post")
            and examples.is_rectangular
            and not self.budget.is_bulky(model, examples)
            and len(examples) <= self.budget.rows_at_once(model, examples)
            and self._choose(model, [edit.hook]).name == "fast"
        )

    @torch.no_grad()
    def _of_neurons(
        self, model: Model, examples: Examples, edits: Sequence[Edit]
    ) -> Iterator[Logits]:
        """The logits under each of these edits of neurons of one layer, all in one forward."""
        layer, n, every = edits[0].layer, len(examples), torch.arange(len(examples))
        resid = f"blocks.{layer}.hook_resid_post"
        is_last = layer == model.cfg.n_layers - 1
        keep = examples.n_answer if is_last else examples.tokens.shape[1]
        found = self.activations(model, examples, [edits[0].hook, resid])
        starts = []
        for edit in edits:
            own = edit.at.take(found[edit.hook], every)
            change = edit.function(own.clone(), every) - own
            weights = model.blocks[layer].mlp.W_out
            chosen = weights if edit.at.units is None else weights[list(edit.at.units)]
            moved_at = At(resid, edit.at.pos)
            before = moved_at.take(found[resid], every)
            after = moved_at.put(found[resid], before + change @ chosen, every)
            # After the last layer nothing but the positions that are read out matters.
            starts.append(after[:, -keep:])
        start = rearrange(torch.stack(starts), "cell n pos d_model -> (cell n) pos d_model")
        tokens = repeat(examples.tokens[:, -keep:], "n pos -> (cell n) pos", cell=len(edits))
        rows = repeat(every, "n -> (cell n)", cell=len(edits))
        logits, _ = backends.FAST.run(
            model, tokens, rows, examples.n_answer, resume=(layer + 1, start)
        )
        self.count(examples, len(edits))
        yield from logits.cpu().unflatten(0, (len(edits), n))

    def _check_rectangular(self, examples: Examples) -> None:
        if not examples.is_rectangular:
            raise InputError(
                "these examples have prompts of several lengths, so whole activations do not fit "
                "together; name the positions that are read or changed"
            )

    def _kept(self, model: Model, examples: Examples, hook: str) -> Tensor | None:
        return self._activations.get(self._looks.state_of((model, examples.key, hook)))

    def _keep(self, model: Model, examples: Examples, found: Mapping[str, Tensor]) -> None:
        for hook, activation in found.items():
            state = self._looks.state_of((model, examples.key, hook))
            self._activations.put(state, activation)
