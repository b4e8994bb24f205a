"""Runs: from an experiment to its tables, figures, answer and report, with every finished block
reused."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from mechmem.experiment.cells import BlockError, TrainedRun, run_label
from mechmem.experiment.claims import Measured, render_answer
from mechmem.experiment.results import RUNS, Run, draw
from mechmem.experiment.spec import PLUGINS, Experiment
from mechmem.progress import ProgressCallback
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.files import FileError, read_json, write, write_json
from mechmem.spec.provenance import provenance
from mechmem.spec.yaml_file import write_spec
from mechmem.training.recipe import PHASES, Recipe
from mechmem.training.store import folder_of

if TYPE_CHECKING:
    import pandas as pd


def run(experiment: Experiment, runs: Path = RUNS, progress: ProgressCallback | None = None) -> Run:
    """Answer the experiment's question: train what is missing, compute what is not at hand, report.

    Raises InputError where the spec asks for what cannot be, FileError where the machine fails.
    """
    progress, folder = (
        progress or ProgressCallback(),
        runs / f"{experiment.name}-{experiment.content_hash}",
    )
    with locked(folder, progress.say):
        started, computed = time.monotonic(), []
        trained_runs = list(_trained_runs(experiment))
        if missing_trainings(experiment, runs):
            rehearse(experiment)  # nothing is trained for a spec that cannot run
        tables: dict[str, list[pd.DataFrame]] = {
            analysis.table_name: [] for analysis in experiment.analyses
        }
        for labels, recipe, seed in trained_runs:
            trained_run = TrainedRun(experiment, recipe, seed, runs, progress, labels)
            for i, analysis in enumerate(experiment.analyses):
                table, is_new = trained_run.table(i, analysis)
                computed += [analysis.table_name] if is_new else []
                tables[analysis.table_name].append(_labelled(table, labels | {"seed": seed}))
        return _finish(experiment, folder, _joined(tables), computed, time.monotonic() - started)


def missing_trainings(experiment: Experiment, runs: Path = RUNS) -> dict[str, Recipe]:
    """By name, every training that a run would have to make first."""
    others = [ref.training for ref in experiment.checkpoints.values() if ref.training is not None]
    wanted = [
        *_trained_runs(experiment),
        *(({}, recipe, seed) for recipe in others for seed in experiment.seeds),
    ]
    return {
        run_label(recipe, swept, seed): recipe
        for swept, recipe, seed in wanted
        if not (folder_of(recipe, seed, runs) / "training.json").exists()
    }


def _trained_runs(experiment: Experiment) -> Iterator[tuple[dict[str, Any], Recipe, int]]:
    """(swept values of the recipe, recipe, seed) of every training of the experiment."""
    for labels, recipe in _recipes(experiment):
        for seed in experiment.seeds:
            yield labels, recipe, seed


def _recipes(experiment: Experiment) -> Iterator[tuple[dict[str, Any], Recipe]]:
    for training in (experiment.training, *experiment.also):
        named = {"training": training.name} if experiment.also else {}
        for labels, recipe in training.expand({}):
            yield named | labels, recipe


def _labelled(table: pd.DataFrame, labels: Mapping[str, Any]) -> pd.DataFrame:
    for i, (column, value) in enumerate(labels.items()):
        table.insert(i, column, value)
    return table


def _joined(tables: Mapping[str, Sequence[pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    import pandas as pd

    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def rehearse(experiment: Experiment, say: Callable[[str], None] = lambda _: None) -> dict[str, int]:
    """The whole run on untrained models and four examples of each set: raises what a run would
    raise.

    Returns how many examples each analysis sends through the models of one seed in the real run.
    """
    costs = {analysis.table_name: 0 for analysis in experiment.analyses}
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in costs}
    for labels, recipe in _recipes(experiment):
        for name, (table, cost) in _rehearsed(experiment, recipe, say).items():
            costs[name] += cost
            tables[name] += [
                _labelled(table.copy(), labels | {"seed": seed}) for seed in experiment.seeds
            ]
    joined = _joined(tables)
    measured = _measured(experiment, joined)
    render_answer(experiment.answer, measured, _verdicts(_judged(experiment, measured)))
    for i, figure in enumerate(experiment.figures):
        try:
            figure.draw(joined[figure.table])
        except InputError as error:
            raise BlockError(("figures", i), str(error)) from error
    return costs


def _rehearsed(
    experiment: Experiment, recipe: Recipe, say: Callable[[str], None]
) -> dict[str, tuple[pd.DataFrame, int]]:
    """The rehearsed table of every analysis and its cost in the real run, for one training."""
    few = {
        name: chosen.of(recipe.task).select(slice(4)).as_set()
        for name, chosen in experiment.examples.items()
    }
    models = {
        name: (ref.training or recipe).build(0) for name, ref in experiment.checkpoints.items()
    }
    for model in models.values():
        model.requires_grad_(False)  # as those of checkpoints are
    curve = {"step": 0, "clean": 0.0, "memorised": 0.0, "corrected": 0.0, "held_out": 0.0}
    phases = dict.fromkeys(PHASES, 0)
    task = recipe.task
    session = Session(
        models, few, curves=[curve], phases=phases, chance=task.chance, is_rehearsal=True
    )
    session.rule, session.say = task.answers, say
    rehearsed = {}
    for i, analysis in enumerate(experiment.analyses):
        before = session.n_forwarded
        try:
            table = analysis.run(session, experiment.sweep_domain(recipe))
        except InputError as error:
            raise BlockError(("analyses", i), str(error)) from error
        rehearsed[analysis.table_name] = (table, round(session.n_forwarded - before))
    return rehearsed


def _measured(experiment: Experiment, tables: Mapping[str, pd.DataFrame]) -> dict[str, Measured]:
    measured = {}
    for name, quantity in experiment.quantities.items():
        try:
            measured[name] = quantity.measure(tables)
        except InputError as error:
            raise BlockError(("quantities", name), str(error)) from error
    return measured


def _judged(experiment: Experiment, measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    return [claim.verdict(measured) for claim in experiment.claims]


def _verdicts(claims: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {claim["id"]: claim["verdict"] for claim in claims}


def _finish(
    experiment: Experiment,
    folder: Path,
    tables: dict[str, pd.DataFrame],
    computed: Sequence[str],
    seconds: float,
) -> Run:
    measured = _measured(experiment, tables)
    claims = _judged(experiment, measured)
    record_path, record = folder / "run.json", {}
    if not computed and record_path.exists():
        record = read_json(
            record_path
        )  # nothing was computed anew: time and machine stay those of the computation
    record |= {
        "question": experiment.question,
        "answer": render_answer(experiment.answer, measured, _verdicts(claims))
        or "See the tables: the spec states no answer.",
        "quantities": {
            name: vars(m) | {"labels": _readable(m.labels)} for name, m in measured.items()
        },
        "claims": claims,
    }
    record = {"seconds": round(seconds, 1), "provenance": provenance()} | record
    for name, table in tables.items():
        write(folder / "tables" / f"{name}.parquet", table.to_parquet(index=False))
    write(folder / "experiment.yaml", write_spec(experiment))
    for name in experiment.plugins:
        if name in PLUGINS and ".." not in Path(name).parts and not Path(name).is_absolute():
            write(folder / name, PLUGINS[name].read_bytes())
    write_json(record_path, record)
    finished = Run(folder, record)
    draw(finished, experiment)
    return finished


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


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Generator[None, None, None]:
    """One run of a spec at a time; a second one waits and then finds everything made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another process is running {folder.name}; waiting for it")
            lock.acquire()
    except OSError as error:
        raise FileError(
            f"cannot write {folder}: {error.strerror}; choose another folder with --runs"
        ) from error
    try:
        yield
    finally:
        lock.release()
