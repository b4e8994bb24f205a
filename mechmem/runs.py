"""Runs: from an experiment to its tables, figures, answer and report, with every finished block reused."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from mechmem.analyses import Analysis
from mechmem.bench import Bench
from mechmem.checkpoints import Trained, folder_of
from mechmem.claims import Measured, sentence
from mechmem.component import InputError, digest
from mechmem.experiment import PLUGINS, Experiment
from mechmem.files import FileError, read_json, write, write_json
from mechmem.provenance import provenance
from mechmem.recipe import PHASES, Recipe
from mechmem.specs import write_spec
from mechmem.training import train

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    import pandas as pd
    import plotly.graph_objects as go

RUNS = Path("runs")
ENGINE = ("*.py", "analyses/*.py", "interventions/*.py", "measures/*.py", "tasks/*.py")
NOT_ENGINE = {"cli.py", "runs.py", "report.py", "claims.py", "specs.py", "terminal.py", "provenance.py", "__init__.py"}


@dataclass
class Watcher:
    """Told how a run goes on; the default is silent."""

    say: Callable[[str], None] = lambda _: None
    train: Callable[[str, int, int, dict[str, float]], None] = lambda *_: None


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    experiment: Experiment
    record: dict[str, Any] = field(repr=False)

    @property
    def answer(self) -> str:
        """The answer in one sentence."""
        return self.record["answer"]

    @property
    def claims(self) -> list[dict[str, Any]]:
        """id, says, verdict, reason, rule, effect, interval of every claim."""
        return self.record["claims"]

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def table(self, name: str) -> pd.DataFrame:
        """A table of the run. Raises InputError for an unknown one."""
        import pandas as pd

        path = self.folder / "tables" / f"{name}.parquet"
        if not path.exists():
            raise InputError(f"{self.folder} has no table {name!r}; it has {', '.join(self.tables)}")
        return pd.read_parquet(path)

    @property
    def tables(self) -> dict[str, Path]:
        return {path.stem: path for path in sorted((self.folder / "tables").glob("*.parquet"))}

    @property
    def figures(self) -> dict[str, Path]:
        return {path.stem: path for path in sorted((self.folder / "figures").glob("*.json"))}

    def summary(self) -> dict[str, Any]:
        """For scripts: answer, claims and paths."""
        return {
            "name": self.experiment.name,
            "answer": self.answer,
            "claims": self.claims,
            "tables": {name: str(path) for name, path in self.tables.items()},
            "figures": {name: str(path) for name, path in self.figures.items()},
            "report": str(self.report),
            "folder": str(self.folder),
            "seconds": self.record["seconds"],
        }


def run(experiment: Experiment, runs: Path = RUNS, watcher: Watcher | None = None) -> Run:
    """Answer the experiment's question: train what is missing, compute what is not at hand, report.

    Raises InputError where the spec asks for what cannot be, FileError where the machine fails.
    """
    watcher, folder = watcher or Watcher(), runs / f"{experiment.name}-{experiment.content_hash}"
    with locked(folder, watcher.say):
        started, computed = time.monotonic(), []
        subjects = list(_subjects(experiment))
        if any(not (folder_of(recipe, seed, runs) / "training.json").exists() for _, recipe, seed in subjects):
            rehearse(experiment)  # nothing is trained for a spec that cannot run
        tables: dict[str, list[pd.DataFrame]] = {analysis.table_name: [] for analysis in experiment.analyses}
        for labels, recipe, seed in subjects:
            subject = _Subject(experiment, recipe, seed, runs, watcher)
            for i, analysis in enumerate(experiment.analyses):
                table, is_new = subject.table(i, analysis)
                computed += [analysis.table_name] if is_new else []
                tables[analysis.table_name].append(_labelled(table, labels | {"seed": seed}))
        return _finish(experiment, folder, _joined(tables), computed, time.monotonic() - started)


def _subjects(experiment: Experiment) -> Iterator[tuple[dict[str, Any], Recipe, int]]:
    """(swept values of the recipe, recipe, seed) of every training of the experiment."""
    for labels, recipe in _recipes(experiment):
        for seed in experiment.seeds:
            yield labels, recipe, seed


def _recipes(experiment: Experiment) -> Iterator[tuple[dict[str, Any], Recipe]]:
    for training in (experiment.training, *experiment.also):
        named = {"training": training.name} if experiment.also else {}
        for labels, recipe in training.unfold({}):
            yield named | labels, recipe


class _Subject:
    """One training under study, and the tables that are made from it."""

    def __init__(self, experiment: Experiment, recipe: Recipe, seed: int, runs: Path, watcher: Watcher) -> None:
        self.experiment, self.recipe, self.seed, self.runs, self.watcher = experiment, recipe, seed, runs, watcher
        self.trained = self.training(recipe)
        self._bench: Bench | None = None

    def training(self, recipe: Recipe) -> Trained:
        name = f"{recipe.name} seed {self.seed}"
        return train(
            recipe, self.seed, folder_of(recipe, self.seed, self.runs), lambda *event: self.watcher.train(name, *event)
        )

    @property
    def bench(self) -> Bench:
        if self._bench is None:
            experiment, models = self.experiment, {}
            for name, ref in experiment.checkpoints.items():
                trained = self.trained if ref.training is None else self.training(ref.training)
                models[name] = trained.at(ref.at)
            self._bench = Bench(
                models=models,
                example_sets={name: chosen.of(self.recipe.task) for name, chosen in experiment.examples.items()},
                curves=self.trained.record["curves"],
                phases=self.trained.phases,
                chance=self.recipe.task.chance,
                rule=self.recipe.task.answers,
                say=self.watcher.say,
            )
        return self._bench

    def table(self, i: int, analysis: Analysis) -> tuple[pd.DataFrame, bool]:
        """The table, and whether it had to be computed."""
        import pandas as pd

        path = self.runs / "blocks" / f"{self._key(analysis)}.parquet"
        if path.exists():
            try:
                return pd.read_parquet(path), False
            except (OSError, ValueError):
                path.unlink()  # cut off by a crash of the machine: made again
        try:
            table = analysis.run(self.bench, self.experiment.universe(self.recipe))
        except InputError as error:
            raise BlockError(i, str(error)) from error
        write(path, table.to_parquet(index=False))
        return table, True

    def _key(self, analysis: Analysis) -> str:
        """Changes with all that decides the table, and with nothing else."""
        block, words = analysis.block(), set(_words(analysis.block()))
        block.pop("name")
        used = (("examples", self.experiment.examples), ("model", self.experiment.checkpoints))
        named = {
            field: {name: ref.block() for name, ref in refs.items() if name in words or _asks_for_all(block, field)}
            for field, refs in used
        }
        steps = [self.trained.phases, self.trained.record["curves"][-1]]
        return digest(
            [block, named, self.recipe.recipe_hash, steps, self.seed, engine_hash(), *_plugin_code(self.experiment)]
        )


class BlockError(InputError):
    """An analysis of the spec asks for what cannot be."""

    def __init__(self, index: int, text: str) -> None:
        super().__init__(text)
        self.loc = ("analyses", index)


def _words(block: Any) -> Iterator[str]:
    if isinstance(block, str):
        yield block
    for part in block.values() if isinstance(block, Mapping) else block if isinstance(block, list) else ():
        yield from _words(part)


def _asks_for_all(block: Any, field: str) -> bool:
    """Whether the block, or a part of it, sweeps this field over all that the experiment names."""
    if not isinstance(block, Mapping):
        return False
    return block.get(field) == {"each": "all"} or any(_asks_for_all(part, field) for part in block.values())


def _plugin_code(experiment: Experiment) -> list[str]:
    paths = {name: PLUGINS.get(name, Path(name)) for name in experiment.plugins}
    return [name + hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if path.exists()]


@cache
def engine_hash() -> str:
    """A hash of the code that makes tables, so that no table outlives the code that made it."""
    here, content = Path(__file__).parent, hashlib.sha256()
    for path in sorted(path for pattern in ENGINE for path in here.glob(pattern) if path.name not in NOT_ENGINE):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:12]


def _labelled(table: pd.DataFrame, labels: Mapping[str, Any]) -> pd.DataFrame:
    for i, (column, value) in enumerate(labels.items()):
        table.insert(i, column, value)
    return table


def _joined(tables: Mapping[str, Sequence[pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    import pandas as pd

    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def rehearse(experiment: Experiment) -> dict[str, int]:
    """The whole run on untrained models and four examples of each set: raises what a run would raise.

    Returns how many examples each analysis sends through the models of one seed in the real run.
    """
    costs = {analysis.table_name: 0 for analysis in experiment.analyses}
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in costs}
    for labels, recipe in _recipes(experiment):
        for name, (table, cost) in _rehearsed(experiment, recipe).items():
            costs[name] += cost
            tables[name] += [_labelled(table.copy(), labels | {"seed": seed}) for seed in experiment.seeds]
    joined = _joined(tables)
    sentence(experiment.answer, _measured(experiment, joined))
    for figure in experiment.figures:
        figure.draw(joined[figure.table])
    return costs


def _rehearsed(experiment: Experiment, recipe: Recipe) -> dict[str, tuple[pd.DataFrame, int]]:
    """The rehearsed table of every analysis and its cost in the real run, for one training."""
    import torch

    few, scale = {}, 1.0
    for name, chosen in experiment.examples.items():
        examples = chosen.of(recipe.task)
        few[name] = examples.select(torch.arange(min(4, len(examples)))).as_set()
        scale = max(scale, len(examples) / len(few[name]))
    models = {name: (ref.training or recipe).build(0) for name, ref in experiment.checkpoints.items()}
    curve = {"step": 0, "clean": 0.0, "memorised": 0.0, "corrected": 0.0, "held_out": 0.0}
    phases = dict.fromkeys(PHASES, 0)
    task = recipe.task
    bench = Bench(models, few, curves=[curve], phases=phases, chance=task.chance, rule=task.answers, is_rehearsal=True)
    rehearsed = {}
    for i, analysis in enumerate(experiment.analyses):
        before = bench.n_forwarded
        try:
            table = analysis.run(bench, experiment.universe(recipe))
        except InputError as error:
            raise BlockError(i, str(error)) from error
        rehearsed[analysis.table_name] = (table, int((bench.n_forwarded - before) * scale))
    return rehearsed


def _measured(experiment: Experiment, tables: Mapping[str, pd.DataFrame]) -> dict[str, Measured]:
    measured = {}
    for name, quantity in experiment.quantities.items():
        try:
            measured[name] = quantity.measure(tables)
        except InputError as error:
            raise InputError(f"quantity {name!r}: {error}") from error
    return measured


def _finish(
    experiment: Experiment, folder: Path, tables: dict[str, pd.DataFrame], computed: Sequence[str], seconds: float
) -> Run:
    measured = _measured(experiment, tables)
    record_path, record = folder / "run.json", {}
    if not computed and record_path.exists():
        record = read_json(record_path)  # nothing was computed anew: time and machine stay those of the computation
    record |= {
        "answer": sentence(experiment.answer, measured) or "See the tables: the spec states no answer.",
        "quantities": {name: vars(m) | {"labels": _readable(m.labels)} for name, m in measured.items()},
        "claims": [claim.verdict(measured) for claim in experiment.claims],
    }
    record = {"seconds": round(seconds, 1), "provenance": provenance()} | record
    for name, table in tables.items():
        write(folder / "tables" / f"{name}.parquet", table.to_parquet(index=False))
    write(folder / "experiment.yaml", write_spec(experiment))
    for name in experiment.plugins:
        if name in PLUGINS and ".." not in Path(name).parts and not Path(name).is_absolute():
            write(folder / name, PLUGINS[name].read_bytes())
    write_json(record_path, record)
    finished = Run(folder, experiment, record)
    draw(finished)
    return finished


def _readable(labels: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value if isinstance(value, (str, bool, type(None))) else _number(value) for key, value in labels.items()
    }


def _number(value: Any) -> float | int | str:
    try:
        return int(value) if float(value).is_integer() else float(value)
    except (TypeError, ValueError):
        return str(value)


def draw(finished: Run) -> list[go.Figure]:
    """Draw the figures and the report from the saved tables; no model is touched."""
    from mechmem.report import Report, render

    tables = {name: finished.table(name) for name in finished.tables}
    drawn = [figure.draw(tables[figure.table]) for figure in finished.experiment.figures]
    for i, (spec, figure) in enumerate(zip(finished.experiment.figures, drawn, strict=True)):
        write(finished.folder / "figures" / f"{i + 1}_{spec.kind}_{spec.table}.json", figure.to_json())
    experiment, record = finished.experiment, finished.record
    descriptions = {a.table_name: a.columns for a in experiment.analyses}
    report = Report(
        title=experiment.name,
        question=experiment.question,
        answer=finished.answer,
        figures=[(spec.title, spec.caption, fig) for spec, fig in zip(experiment.figures, drawn, strict=True)],
        tables=[(name, _described(descriptions.get(name, {})), table) for name, table in tables.items()],
        claims=[claim | {"low": claim["interval"][0], "high": claim["interval"][1]} for claim in finished.claims],
        setup={key: value for key, value in experiment.block().items() if key not in ("question", "answer")},
        provenance=record["provenance"] | {"seconds": record["seconds"], "seeds": list(experiment.seeds)},
        warnings=_warnings(experiment),
    )
    write(finished.report, render(report))
    return drawn


def _described(columns: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {meaning}" for name, meaning in columns.items() if name != "per_example")


def _warnings(experiment: Experiment) -> list[str]:
    if len(experiment.seeds) > 1:
        return []
    return ["One seed: intervals are over examples of a single model and say nothing about other trainings."]


def load_run(folder: Path) -> Run:
    """A finished run from its folder. Raises FileError if it is not one."""
    if not (folder / "run.json").exists():
        raise FileError(f"{folder} holds no finished run")
    return Run(folder, Experiment.from_yaml(folder / "experiment.yaml"), read_json(folder / "run.json"))


def all_runs(runs: Path = RUNS) -> list[Path]:
    """Folders of finished runs, the latest first."""
    return sorted(
        (p.parent for p in runs.glob("*/run.json")), key=lambda p: (p / "run.json").stat().st_mtime, reverse=True
    )


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
        raise FileError(f"cannot write {folder}: {error.strerror}; choose another folder with --runs") from error
    try:
        yield
    finally:
        lock.release()
