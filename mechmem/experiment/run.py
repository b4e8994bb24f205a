"""Runs: from an experiment to its tables, figures, answer and report; finished cells are reused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechmem.experiment.answer import (
    Answer,
    answer_from,
    labelled,
    measure,
    one_below_the_other,
)
from mechmem.experiment.cells import TrainedRun, run_label
from mechmem.experiment.cost import fetch_or_train
from mechmem.experiment.dry_run import dry_run
from mechmem.experiment.machine import device_of
from mechmem.experiment.measured import Measured
from mechmem.experiment.results import RECORD, RUNS, SPEC, Run, draw, load_run
from mechmem.experiment.rules import timing_of_rules
from mechmem.experiment.spec import PLUGINS, Experiment
from mechmem.progress import ProgressCallback
from mechmem.spec.files import FileError, write, write_record
from mechmem.spec.folders import locked, remove_leftovers
from mechmem.spec.provenance import provenance
from mechmem.spec.yaml_file import write_spec
from mechmem.training import index
from mechmem.training.recipe import Recipe
from mechmem.training.store import folder_of

if TYPE_CHECKING:
    import pandas as pd


def run(experiment: Experiment, runs: Path = RUNS, progress: ProgressCallback | None = None) -> Run:
    """Answer the experiment's question: train what is missing, compute what is not stored, report.

    Args:
        experiment: what to run.
        runs: folder of all runs and trainings.
        progress: is called with the progress of trainings and analyses.

    Raises:
        InputError: the spec asks for something impossible.
        FileError: a file is damaged or cannot be written.
    """
    progress = progress or ProgressCallback()
    folder = run_folder(experiment, runs)
    device_of(experiment)  # refuses a device that is not there, before anything is trained for it
    remove_leftovers(runs)
    with locked(folder, progress.note, f"running {folder.name}"):
        started, work = time.monotonic(), Work()
        if missing := missing_trainings(experiment, runs):
            dry_run(experiment)  # nothing is trained for a spec that cannot run
            for line in fetch_or_train(missing.values()):
                progress.note(line)
        work.timing = timing_of_rules(experiment, runs)
        tables: dict[str, list[pd.DataFrame]] = {a.table_name: [] for a in experiment.analyses}
        for labels, recipe, seed in experiment.trainings():
            trained_run = TrainedRun(experiment, recipe, seed, runs, progress, labels)
            for i, analysis in enumerate(experiment.analyses):
                table, is_new = trained_run.table(i, analysis)
                work.computed += [analysis.table_name] if is_new else []
                tables[analysis.table_name].append(labelled(table, labels | {"seed": seed}))
            work.add_backends(trained_run.backends, progress.say)
            work.add_missing(trained_run.missing, seed)
        work.seconds = time.monotonic() - started
        return _finish(experiment, folder, one_below_the_other(tables), work, progress.note)


def run_folder(experiment: Experiment, runs: Path) -> Path:
    """The folder of an experiment's run."""
    return runs / f"{experiment.name}-{experiment.content_hash}"


@dataclass
class Work:
    """What a run had to compute, and how."""

    computed: list[str] = field(default_factory=list)
    """The names of tables of which something was computed, once for each training."""
    backends: dict[str, list[str]] = field(default_factory=dict)
    """By the name of a model, the backends that ran it, each with the reason."""
    seconds: float = 0.0
    timing: Mapping[str, str] = field(default_factory=dict)
    """By the id of a claim, when its rule was fixed."""
    missing: dict[str, dict[int, str]] = field(default_factory=dict)
    """By the name of a table, why some seeds lack rows in it."""

    def add_missing(self, found: Mapping[str, str], seed: int) -> None:
        """Record the reasons for which tables of a seed lack rows."""
        for table, reason in found.items():
            self.missing.setdefault(table, {})[seed] = reason

    def add_backends(
        self, found: Mapping[str, tuple[str, str]], say: Callable[[str], None]
    ) -> None:
        """Record and report the backends of one training's models; several trainings of one spec
        may need different ones."""
        for name, (backend, reason) in found.items():
            text = f"{backend}: {reason}"
            if text not in self.backends.setdefault(name, []):
                self.backends[name].append(text)
                say(f"model {name} ran on the backend {text}")


def missing_trainings(experiment: Experiment, runs: Path = RUNS) -> dict[str, tuple[Recipe, int]]:
    """By their labels, the trainings that a run would have to make first: recipe and seed."""
    others = [ref.training for ref in experiment.checkpoints.values() if ref.training is not None]
    named = [
        *experiment.trainings(),
        *(({}, recipe, seed) for recipe in others for seed in experiment.seeds),
    ]
    wanted = [
        part for swept, recipe, seed in named for part in _with_starts(swept, recipe, seed, runs)
    ]
    return {
        run_label(recipe, swept, seed): (recipe, seed)
        for swept, recipe, seed in wanted
        if not (folder_of(recipe, seed, runs) / index.RECORD).exists()
    }


def _with_starts(
    swept: dict[str, Any], recipe: Recipe, seed: int, runs: Path
) -> Iterator[tuple[dict[str, Any], Recipe, int]]:
    """A training and, unless it is finished, those that it starts from, the first of them first."""
    is_finished = (folder_of(recipe, seed, runs) / index.RECORD).exists()
    if recipe.start is not None and not is_finished:
        yield from _with_starts({}, recipe.start.training, seed, runs)
    yield swept, recipe, seed


def _finish(
    experiment: Experiment,
    folder: Path,
    tables: dict[str, pd.DataFrame],
    work: Work,
    note: Callable[[str], None],
) -> Run:
    answer = answer_from(tables, experiment, missing=work.missing)
    record = {} if work.computed else _earlier(folder, note)
    # If nothing was computed, the time and the machine stay those of the computation.
    record |= _judged(answer, work.timing) | {
        "question": experiment.question,
        "missing": {
            table: {str(seed): reason for seed, reason in reasons.items()}
            for table, reasons in work.missing.items()
        },
        "files": _written(experiment, folder, tables),
    }
    made = provenance() | {"backends": work.backends}
    record = {"seconds": round(work.seconds, 1), "provenance": made} | record
    write_record(folder / RECORD, record, folder)
    finished = Run(folder, record, trust_plugins=True)  # they were executed for this run
    draw(finished, experiment)
    return finished


def _earlier(folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """The record of an earlier run of the same spec; empty if there is none that is whole."""
    if not (folder / RECORD).exists():
        return {}
    try:
        return load_run(folder).record
    except FileError as error:
        note(f"{str(error).partition(';')[0]}: it is written anew")
        return {}


def _written(
    experiment: Experiment, folder: Path, tables: Mapping[str, pd.DataFrame]
) -> dict[str, str]:
    """Write the tables, the spec and its plug-ins; by path below the folder, their SHA-256."""
    content: dict[str, bytes | str] = {
        f"tables/{name}.parquet": table.to_parquet(index=False) for name, table in tables.items()
    }
    content[SPEC] = write_spec(experiment)
    content |= {name: PLUGINS[name].read_bytes() for name in experiment.plugins if name in PLUGINS}
    return {name: write(folder / name, data, folder) for name, data in content.items()}


def _judged(answer: Answer, timing: Mapping[str, str]) -> dict[str, Any]:
    """The part of a run's record that depends on the spread between seeds that is assumed."""
    return {
        "answer": answer.text or "See the tables: the spec states no answer.",
        "quantities": {
            name: m.record() | {"labels": _readable(m.labels)}
            for name, m in answer.quantities.items()
        },
        "claims": [claim | {"timing": timing[claim["id"]]} for claim in answer.claims],
        "spreads": dict(answer.spreads),
    }


def measured_in(finished: Run, experiment: Experiment) -> dict[str, Measured]:
    """The quantities of a finished run, with the spread of its own seeds alone."""
    return measure(_tables(finished), experiment, missing=_missing(finished))


def judge_again(finished: Run, experiment: Experiment, spreads: Mapping[str, float]) -> Run:
    """A finished run, judged with the spread between seeds of a whole study; no model is run.

    Args:
        finished: the run.
        experiment: its spec.
        spreads: by measure, the standard deviation between seeds (`pooled_spreads`).
    """
    answer = answer_from(_tables(finished), experiment, spreads, _missing(finished))
    timing = {claim["id"]: claim["timing"] for claim in finished.claims}
    record = finished.record | _judged(answer, timing)
    if record == finished.record:
        return finished
    write_record(finished.folder / RECORD, record, finished.folder)
    judged = Run(finished.folder, record, finished.trust_plugins)
    draw(judged, experiment)
    return judged


def _tables(finished: Run) -> dict[str, pd.DataFrame]:
    return {name: finished.table(name) for name in finished.tables}


def _missing(finished: Run) -> dict[str, dict[int, str]]:
    return {
        table: {int(seed): reason for seed, reason in reasons.items()}
        for table, reasons in finished.record.get("missing", {}).items()
    }


def _readable(labels: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value if isinstance(value, (str, bool, type(None))) else _number(value)
        for key, value in labels.items()
    }


def _number(value: Any) -> float | int | str:
    try:
        return int(value) if float(value).is_integer() else float(value)
    except (TypeError, ValueError):
        return str(value)
