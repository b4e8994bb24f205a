"""Cells: one training under study, and the rows of each member of its sweeps.

The rows of a cell are computed once and kept, until something changes that decides them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mechmem.analyses.analysis import Analysis, joined
from mechmem.experiment.cell_store import CellStore
from mechmem.experiment.code import code_hash
from mechmem.experiment.machine import conditions, session_options
from mechmem.experiment.spec import CheckpointRef, Experiment
from mechmem.progress import ProgressCallback
from mechmem.session import Session
from mechmem.spec.errors import BlockError, InputError
from mechmem.spec.files import FileError, digest
from mechmem.training.loop import made
from mechmem.training.recipe import Recipe
from mechmem.training.store import Trained

if TYPE_CHECKING:
    import pandas as pd

CHUNK_SECONDS = 30.0
"""Work after which the cells that are finished are written: what a kill can cost at most."""


@dataclass(frozen=True)
class Cell:
    """A member of a sweep: an analysis in which nothing is swept any more."""

    key: str
    """Changes with all that decides the rows, and with nothing else."""
    labels: Mapping[str, Any]
    """The swept values by field name."""
    analysis: Analysis
    progress: str
    """The line of progress while it is computed."""


class TrainedRun:
    """One training under study, and the tables that are made from it.

    Args:
        experiment: whose analyses are run.
        recipe: of the training, without a sweep.
        seed: of the training.
        runs: folder of all runs, where trainings and cells are kept.
        progress: is called with the progress of training and analyses.
        swept: the swept values of the recipe, by field name.
    """

    def __init__(
        self,
        experiment: Experiment,
        recipe: Recipe,
        seed: int,
        runs: Path,
        progress: ProgressCallback,
        swept: Mapping[str, Any],
    ) -> None:
        self.experiment, self.recipe, self.seed = experiment, recipe, seed
        self.runs, self.progress = runs, progress
        self.trained = self.training(recipe, swept)
        self.missing: dict[str, str] = {}
        """By the name of a table, why it lacks rows: a checkpoint that this training never had."""
        self._session: Session | None = None

    def training(self, recipe: Recipe, swept: Mapping[str, Any] = MappingProxyType({})) -> Trained:
        name = run_label(recipe, swept, self.seed)
        return made(
            recipe,
            self.seed,
            self.runs,
            lambda *event: self.progress.train(name, *event),
            self.progress.note,
        )

    @property
    def session(self) -> Session:
        if self._session is None:
            task = self.trained.task
            chosen = self.experiment.examples
            sets = {name: spec.of(task).with_name(name) for name, spec in chosen.items()}
            self._session = Session(
                models=self._models(),
                example_sets=sets,
                curves=self.trained.record["curves"],
                phases=self.trained.phases,
                chance=task.chance,
                rule=task.answers,
                say=self.progress.say,
                **session_options(self.experiment),
            )
        return self._session

    def _models(self) -> dict[str, Any]:
        return {
            name: self._trained(ref).at(
                ref.at if ref.same_step_as is None else self.trained.step(ref.same_step_as)
            )
            for name, ref in self.experiment.checkpoints.items()
            if name not in self._never_reached
        }

    def _trained(self, ref: CheckpointRef) -> Trained:
        return self.trained if ref.training is None else self.training(ref.training)

    @cached_property
    def _never_reached(self) -> dict[str, str]:
        """By the name of a checkpoint, its phase, if this training never reached it."""
        found = {}
        for name, ref in self.experiment.checkpoints.items():
            if ref.same_step_as is not None:
                is_there, of = self.trained.reached(ref.same_step_as), ""
            else:
                is_there = ref.phase is None or self._trained(ref).reached(ref.phase)
                of = f" of {ref.training.name}" if ref.training is not None else ""
            if not is_there:
                found[name] = f"never reached phase {(ref.same_step_as or ref.phase)!r}{of}"
        return found

    @property
    def backends(self) -> dict[str, tuple[str, str]]:
        """By the name of a model, the backend that ran it and why; empty if nothing was run."""
        return dict(getattr(self._session, "backends", {}))

    def table(self, i: int, analysis: Analysis) -> tuple[pd.DataFrame, bool]:
        """The table of an analysis, and whether a cell of it had to be computed.

        Cells that need a phase which this training never reached have no rows; `missing` then has
        the reason.

        Args:
            i: the place of the analysis in the experiment, named by errors.
            analysis: with its sweeps.

        Raises:
            BlockError: the analysis asks for something that is not possible.
            FileError: the cells cannot be written or read.
        """
        try:
            cells = self._possible(list(self._cells(analysis)), analysis.table_name)
            store = CellStore(self._folder(analysis))
            is_new = self._compute([cell for cell in cells if cell.key not in store], store)
            rows = store.read([cell.key for cell in cells])
            # Only a chunk that turns out to be damaged leaves something to do here.
            lost = [cell for cell in cells if cell.key not in rows]
            for path in store.damaged:
                self.progress.note(f"{path} was damaged: its cells are computed again")
            is_new |= self._compute(lost, store)
            rows |= store.read([cell.key for cell in lost])
        except InputError as error:
            raise BlockError(("analyses", i), str(error)) from error
        if len(rows) < len(cells):
            raise FileError(f"{store.folder} cannot be read back; check the disk and run again")
        tables = [rows.pop(cell.key) for cell in cells]
        if not tables:
            import pandas as pd

            return pd.DataFrame(), False
        return joined(tables, [cell.labels for cell in cells]), is_new

    def has_cells(self, analysis: Analysis) -> bool:
        """Whether a cell of an analysis has been computed before."""
        try:
            store = CellStore(self._folder(analysis))
            return any(cell.key in store for cell in self._cells(analysis))
        except InputError:  # the run will say what is wrong
            return False

    def _possible(self, cells: Sequence[Cell], table: str) -> list[Cell]:
        """The cells whose checkpoints this training has."""
        possible = []
        for cell in cells:
            names = self.experiment.references_of(cell.analysis).checkpoints
            never = [reason for name, reason in self._never_reached.items() if name in names]
            if never:
                self.missing[table] = never[0]
            else:
                possible.append(cell)
        return possible

    def _compute(self, cells: Sequence[Cell], store: CellStore) -> bool:
        """Compute and keep these cells, in chunks; False if there was nothing to do."""
        finished: dict[str, pd.DataFrame] = {}
        started = time.monotonic()
        try:
            for cell in cells:
                before = time.monotonic()
                self.progress.say(cell.progress)
                with self.session.declaring(self.experiment.references_of(cell.analysis)):
                    finished[cell.key] = cell.analysis.table(self.session)
                now = time.monotonic()
                # Written now if the next cell, taking as long as this one, would take too long.
                if now - started + (now - before) > CHUNK_SECONDS:
                    store.write(finished)
                    finished, started = {}, now
        finally:  # an error or an interruption does not cost the cells before it
            if finished:
                store.write(finished)
        return bool(cells)

    def _cells(self, analysis: Analysis) -> Iterator[Cell]:
        members = analysis.expand(self.experiment.sweep_domain(self.recipe))
        background = self._background()
        for i, (labels, member) in enumerate(members):
            progress = analysis.progress(i, len(members), labels)
            yield Cell(self._key(member, background), labels, member, progress)

    def _folder(self, analysis: Analysis) -> Path:
        group = digest([analysis.kind, self.recipe.recipe_hash, self.seed])
        return self.runs / "cells" / group

    def _background(self) -> list[Any]:
        """The part of a key that all cells of this training share."""
        trained = [self.trained.phases, self.trained.record["curves"][-1]]
        return [self.recipe.recipe_hash, self.seed, trained, conditions(self.experiment)]

    def _key(self, analysis: Analysis, background: Sequence[Any]) -> str:
        block = analysis.block()
        del block["name"]
        names = self.experiment.references_of(analysis)
        checkpoints = {name: self.experiment.checkpoints[name] for name in names.checkpoints}
        examples = {name: self.experiment.examples[name] for name in names.examples}
        used = [*checkpoints.values(), *examples.values(), self.recipe.task]
        return digest(
            [
                block,
                {name: ref.block() for name, ref in checkpoints.items()},
                {name: chosen.block() for name, chosen in examples.items()},
                code_hash([analysis, *used, self.recipe.architecture]),
                *background,
            ]
        )


def run_label(recipe: Recipe, swept: Mapping[str, Any], seed: int) -> str:
    """`fda_capacity d_model 32 seed 0`: how progress and errors name a training.

    Args:
        recipe: of the training.
        swept: the swept values of the recipe, by field name.
        seed: of the training.
    """
    values = {key: value for key, value in swept.items() if key != "training"} | {"seed": seed}
    return " ".join([recipe.name, *(f"{key} {value}" for key, value in values.items())])
