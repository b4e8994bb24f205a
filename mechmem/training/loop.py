"""train(): the loop and its four curves; an interrupted training resumes to the same bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mechmem.data.examples import Examples, Label
from mechmem.data.tasks.task import Task
from mechmem.models.architecture import Model, moved
from mechmem.models.device import resolve_device
from mechmem.models.fast import plain_logits
from mechmem.spec.errors import InputError
from mechmem.spec.files import (
    TRAIN_AGAIN,
    FileError,
    read_note,
    read_tensors,
    sha256,
    validated,
    write,
    write_record,
    write_tensors,
)
from mechmem.spec.folders import locked
from mechmem.spec.limits import check_seed
from mechmem.spec.provenance import provenance
from mechmem.spec.yaml_file import write_spec
from mechmem.training.index import RECORD
from mechmem.training.recipe import Recipe
from mechmem.training.record import StateNote
from mechmem.training.store import RECIPE, Trained, folder_of, own_folder

StepCallback = Callable[[int, int, dict[str, float]], None]
"""Called after every step with (steps done, number of steps, the latest curves)."""
SayCallback = Callable[[str], None]
"""Called with a line of text that a person should read."""
STATE = "state.safetensors"
"""All that an interrupted training needs to go on."""


def made(
    recipe: Recipe,
    seed: int,
    runs: Path,
    on_step: StepCallback = lambda *_: None,
    say: SayCallback = lambda _: None,
) -> Trained:
    """The training of a recipe: one that was made before, or is shipped, or is made now, with the
    training that it starts from.

    Args:
        recipe: task, architecture and optimisation.
        seed: of the replication.
        runs: folder of all runs.
        on_step: called after every step and every evaluation.
        say: as for `train`.

    Raises:
        InputError, FileError, ArithmeticError: as `train`.
    """
    folder = folder_of(recipe, seed, runs)
    return train(recipe, seed, folder, on_step, runs, say)


def whole(
    recipe: Recipe,
    seed: int,
    runs: Path,
    on_step: StepCallback = lambda *_: None,
    say: SayCallback = lambda _: None,
) -> Trained:
    """The training of a recipe as `made` gives it, with every file looked at; one that was made on
    this machine and is damaged is made again.

    Args:
        recipe: task, architecture and optimisation.
        seed: of the replication.
        runs: folder of all runs.
        on_step: called after every step and every evaluation.
        say: as for `train`; it is also told of what is made again.

    Raises:
        InputError, FileError, ArithmeticError: as `train`.
    """
    folder = folder_of(recipe, seed, runs)
    if folder == own_folder(recipe, seed, runs):
        remove_if_damaged(folder, say)
    return train(recipe, seed, folder, on_step, runs, say).verified()


def remove_if_damaged(folder: Path, say: SayCallback = lambda _: None) -> None:
    """Take the record from a finished training of which a file is missing or damaged, so that
    `train` makes it again.

    Args:
        folder: of a training that was made on this machine.
        say: is told why.
    """
    if not (folder / RECORD).exists():
        return
    with locked(folder, say, f"training in {folder}"):
        try:
            Trained(folder).verified()
        except FileError as error:
            say(f"{str(error).partition(';')[0]}: it is trained again")
            (folder / RECORD).unlink(missing_ok=True)
            for name in [STATE, *(f"checkpoints/{path.name}" for path in _checkpoints(folder))]:
                (folder / name).unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob("step_*.safetensors"))


def train(
    recipe: Recipe,
    seed: int,
    folder: Path,
    on_step: StepCallback = lambda *_: None,
    runs: Path | None = None,
    say: SayCallback = lambda _: None,
) -> Trained:
    """Train a model to the end of its recipe, or resume an interrupted training.

    The same recipe, seed, machine and number of threads give the same bytes, however often it was
    interrupted.

    Args:
        recipe: task, architecture and optimisation.
        seed: of the replication: of everything that the recipe lets vary.
        folder: where checkpoints and curves are written; a finished training is not repeated.
        on_step: called after every step and every evaluation.
        runs: folder of all runs, for the training that this one starts from.
        say: is called if another process is training there, and has to be waited for.

    Raises:
        InputError: this machine lacks the device that the recipe names, or the training to start
            from has no such checkpoint.
        FileError: the folder cannot be written, or a file in it is damaged.
        ArithmeticError: a weight is no longer finite.
    """
    check_seed(seed)
    if not (folder / RECORD).exists():
        with locked(folder, say, f"training in {folder}"):
            if not (folder / RECORD).exists():  # not finished by another process meanwhile
                base = None
                if recipe.start is not None:
                    place = runs if runs is not None else folder.parents[2]
                    theirs = made(recipe.start.training, seed, place, on_step, say)
                    base = theirs.at(recipe.start.at)
                _Run(recipe, seed, folder, on_step, base).finish()
    return Trained(folder)


class _Run:
    """One training: everything that changes from step to step."""

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        folder: Path,
        on_step: StepCallback,
        base: Model | None = None,
    ) -> None:
        self.recipe, self.seed, self.folder, self.on_step = recipe, seed, folder, on_step
        self.spec, self.device = recipe.optimisation, resolve_device(recipe.optimisation.device)
        self.task = recipe.task_of(seed)
        size = len(self.task.vocabulary), self.task.n_context
        recipe.architecture.check_memory(*size, copies=4)  # weights, gradients and two moments
        self.examples = self.task.training_set().to(self.device)
        self.sequences = {
            is_true: torch.cat([self.examples.prompt, labels], dim=1)
            for is_true, labels in ((False, self.examples.given), (True, self.examples.true))
        }
        self.model = moved(self._first(base), self.device)
        self.parameters = dict(self.model.named_parameters())
        self.frozen = self._frozen()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            self.spec.learning_rate,
            self.spec.betas,
            weight_decay=self.spec.weight_decay,
        )
        self.step, self.curves, self.seconds = 0, [], 0.0
        self.checksums: dict[str, str] = {}
        sets = evaluation_sets(self.task, self.spec.n_evaluated)
        self.evaluated = {name: examples.to(self.device) for name, examples in sets.items()}
        self.batches = self._batches()
        if self.state_path.exists():
            self._restore()

    def _first(self, base: Model | None) -> Model:
        """The model before the first step."""
        if base is None:
            return self.recipe.build(self.seed)
        if self.recipe.plant is not None:
            return self.recipe.plant.widened(base, self.recipe.architecture, self.task)
        return base.requires_grad_(True)

    def _frozen(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By name, the mask of the elements that are not trained, and the values they keep."""
        n_layers = self.recipe.architecture.n_layers
        found = {}
        for name, parameter in self.parameters.items():
            is_kept = ~self.recipe.trainable.mask(name, parameter, n_layers)
            if is_kept.any():
                found[name] = is_kept, parameter.detach().clone()
        if all(name in found and found[name][0].all() for name in self.parameters):
            raise InputError(
                f"{self.recipe.name} trains nothing: the model has no such part; its layers are "
                f"0 to {n_layers - 1} and its heads 0 to {self.recipe.architecture.n_heads - 1}"
            )
        return found

    def _batches(self) -> Batches:
        seed, size = self.recipe.seed_of("batches", self.seed), self.spec.batch_size
        n = len(self.examples)
        if self.spec.noisy_share is None:
            return _Shuffled(torch.arange(n), size, seed)
        is_noisy = self.examples.is_noisy.cpu()
        n_noisy = max(1, round(self.spec.noisy_share * size))
        if not is_noisy.any() or is_noisy.all():
            raise InputError("`noisy_share` needs noisy and clean training instances")
        return _Mixed(
            _Shuffled(is_noisy.nonzero()[:, 0], n_noisy, seed),
            _Shuffled((~is_noisy).nonzero()[:, 0], max(1, size - n_noisy), seed),
        )

    @property
    def state_path(self) -> Path:
        return self.folder / STATE

    def finish(self) -> None:
        write(self.folder / RECIPE, write_spec(self.recipe), self.folder)
        started = time.monotonic() - self.seconds
        while True:
            if self.step % self.spec.evaluate_every == 0 or self.step == self.spec.n_steps:
                self.seconds = time.monotonic() - started
                self._evaluate()
                if self.step == self.spec.n_steps or self._has_met_its_stop():
                    break
            if self.recipe.plant is None:
                self._update()
            else:
                self._plant()
            self.step += 1
            self.on_step(self.step, self.spec.n_steps, self.curves[-1])
        self._close()

    @torch.no_grad()
    def _plant(self) -> None:
        """The one step of a plant: the weights are built, not trained."""
        assert self.recipe.plant is not None
        seed = self.recipe.seed_of("weights", self.seed)
        planted = self.recipe.plant.build(self.model, self.task, seed)
        for name, parameter in planted.named_parameters():
            self.parameters[name].copy_(parameter)

    def _update(self) -> None:
        sequences = self.sequences[self.recipe.has_true_labels(self.curves)]
        batch = sequences[self.batches.at(self.step).to(self.device)]
        n_answer = self.examples.n_answer
        logits = plain_logits(self.model, batch[:, :-1], n_answer)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, -n_answer:].flatten())
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.learning_rate * self.spec.schedule_factor(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.spec.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():  # after the step, because weight decay moves every element
            for name, (is_kept, values) in self.frozen.items():
                self.parameters[name].copy_(torch.where(is_kept, values, self.parameters[name]))

    def _evaluate(self) -> None:
        row = {"step": self.step} | curves_of(self.model, self.evaluated)
        if not all(math.isfinite(value) for value in row.values()) or any(
            not p.isfinite().all() for p in self.parameters.values()
        ):
            raise ArithmeticError(
                f"training diverged before step {self.step}: a weight is not finite; "
                "lower learning_rate"
            )
        self.curves.append(row)
        name = f"step_{self.step:06d}.safetensors"
        path = self.folder / "checkpoints" / name
        self.checksums[name] = write_tensors(path, self.parameters, within=self.folder)
        self._save()
        self.on_step(self.step, self.spec.n_steps, row)

    def _has_met_its_stop(self) -> bool:
        recent = self.curves[-self.spec.patience :]
        stop = self.spec.stop_at
        return (
            stop is not None
            and len(recent) == self.spec.patience
            and all(stop.is_met(row) for row in recent)
        )

    def _save(self) -> None:
        state = {f"model.{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            state |= {
                f"optimizer.{key}.{name}": value
                for key, value in self.optimizer.state.get(p, {}).items()
            }
        note = {
            "step": self.step,
            "seconds": self.seconds,
            "curves": self.curves,
            "checkpoints": self.checksums,
        }
        write_tensors(self.state_path, state, note, self.folder)

    def _restore(self) -> None:
        state, found = read_tensors(self.state_path), read_note(self.state_path)
        fits = {f"model.{name}": p.shape for name, p in self.parameters.items()}
        if {name: t.shape for name, t in state.items() if name.startswith("model.")} != fits:
            raise self._misfit("its weights are those of another model")
        note = validated(StateNote, found, self.state_path, TRAIN_AGAIN)
        if not self.spec.keeps(note.step):
            raise self._misfit(f"step {note.step} is none at which it is evaluated")
        self._restore_weights(state, note.step)
        rows = [row.model_dump() for row in note.curves]
        self.step, self.curves, self.seconds = note.step, rows[:-1], note.seconds
        # Version 0.2 kept no checksums: the files count as they are.
        self.checksums = note.checkpoints or {
            path.name: sha256(path.read_bytes()) for path in _checkpoints(self.folder)
        }

    def _restore_weights(self, state: dict[str, Tensor], step: int) -> None:
        """Raises FileError unless all weights and moments are there and finite."""
        moments: dict[int, dict[str, Tensor]] = {}
        for i, (name, parameter) in enumerate(self.parameters.items()):
            shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            kept = {key: state.get(f"optimizer.{key}.{name}") for key in shapes if step}
            own = {key: value for key, value in kept.items() if value is not None}
            tensors = [state[f"model.{name}"], *own.values()]
            if any(value.shape != shapes[key] for key, value in own.items()) or len(own) < len(
                kept
            ):
                raise self._misfit(f"it lacks the optimiser's state of {name}")
            if not all(t.is_floating_point() and t.isfinite().all() for t in tensors):
                raise self._misfit(f"{name} is not finite")
            moments[i] = own
            with torch.no_grad():
                parameter.copy_(state[f"model.{name}"])
        if step:
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})

    def _misfit(self, reason: str) -> FileError:
        return FileError(
            f"{self.state_path} does not fit {self.recipe.name}: {reason}; {TRAIN_AGAIN}"
        )

    def _close(self) -> None:
        record = {
            "recipe": self.recipe.block(),
            "seed": self.seed,
            "phases": self.spec.phases(self.curves),
            "chance": self.recipe.task.chance,
            "seconds": round(self.seconds, 1),
            "provenance": provenance(),
            "curves": self.curves,
            "checkpoints": dict(sorted(self.checksums.items())),
        }
        write_record(self.folder / RECORD, record, self.folder)
        self.state_path.unlink()


class Batches(Protocol):
    """The rows of every batch."""

    def at(self, step: int) -> Tensor: ...


class _Shuffled:
    """Batches of some rows in a new order each epoch: a function of the seed and the step alone, so
    that nothing has to be saved."""

    def __init__(self, rows: Tensor, batch_size: int, seed: int) -> None:
        self.rows, self.size, self.seed = rows, min(batch_size, len(rows)), seed
        self.n_per_epoch = len(rows) // self.size
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def at(self, step: int) -> Tensor:
        epoch, batch = divmod(step, self.n_per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            drawn = torch.randperm(len(self.rows), generator=generator)
            self.epoch, self.order = epoch, self.rows[drawn]
        return self.order[batch * self.size : (batch + 1) * self.size]


class _Mixed:
    """Batches of a fixed number of noisy and of clean instances."""

    def __init__(self, noisy: _Shuffled, clean: _Shuffled) -> None:
        self.noisy, self.clean = noisy, clean

    def at(self, step: int) -> Tensor:
        return torch.cat([self.noisy.at(step), self.clean.at(step)])


def evaluation_sets(task: Task, n: int) -> dict[str, Examples]:
    """The instances on which the four curves are measured: the first `n` of each group."""
    train, held_out = task.sample("train"), task.sample("held_out")
    groups = {"clean": (~train.is_noisy).nonzero()[:, 0], "noisy": train.is_noisy.nonzero()[:, 0]}
    return {name: train.select(rows[:n]) for name, rows in groups.items()} | {
        "held_out": held_out.select(torch.arange(min(n, len(held_out))))
    }


def curves_of(model: Model, sets: dict[str, Examples]) -> dict[str, float]:
    """The four curves of a model (fractions; 0 where a group is empty)."""
    measured: dict[str, tuple[str, Label]] = {
        "clean": ("clean", "given"),
        "memorised": ("noisy", "given"),
        "corrected": ("noisy", "true"),
        "held_out": ("held_out", "true"),
    }
    return {
        curve: accuracy(model, sets[group].with_prefix(label))
        for curve, (group, label) in measured.items()
    }


@torch.no_grad()
def accuracy(model: Model, examples: Examples, batch_size: int = 2000) -> float:
    """Share of examples whose whole answer is the label of their prefix (fraction).

    Fed the right earlier tokens, an answer is right exactly if greedy decoding gives it.

    Args:
        model: the model, on the device of the examples.
        examples: the examples, with the prefix of the label that is counted.
        batch_size: number of examples per forward.
    """
    right = 0
    for rows in torch.arange(len(examples), device=examples.prompt.device).split(batch_size):
        batch = examples.select(rows)
        logits = plain_logits(model, batch.tokens, batch.n_answer)
        right += int((logits.argmax(-1) == batch.labels(batch.prefix)).all(dim=1).sum())
    return right / max(len(examples), 1)
