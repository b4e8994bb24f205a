"""Results: a finished run's answer, claims, tables and figures, read from its folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechmem.experiment.run_record import RunRecord
from mechmem.experiment.spec import Experiment
from mechmem.report.figures.figure import Figure
from mechmem.spec.errors import InputError
from mechmem.spec.files import FileError, read, read_record, write

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RUNS = Path("runs")
RECORD = "run.json"
SPEC = "experiment.yaml"
UNRECORDED: dict[str, Any] = {
    **{"requires": [], "attainable": None, "control": None, "timing": "after"},
    "exploratory": False,
}
"""What the claims of runs before version 0.3 did not record."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    record: dict[str, Any] = field(repr=False)
    trust_plugins: bool = field(default=False, repr=False)
    """Whether `experiment` may execute the plug-ins of the folder."""

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.folder.name.rsplit("-", 1)[0]

    @cached_property
    def experiment(self) -> Experiment:
        """The spec that was run.

        This executes its `plugins:`; reading the results does not. Raises InputError if it has some
        that are not trusted, FileError if it is damaged.
        """
        path = self.folder / SPEC
        self._read(SPEC)

        def verify(plugins: Sequence[str]) -> None:
            if not self.trust_plugins:
                raise InputError(untrusted(path, plugins))
            for name in plugins:
                self._read(name)

        return Experiment.from_yaml(path, on_plugins=verify)

    @property
    def remedy(self) -> str:
        """How to restore a file of this run: the end of an error's message."""
        spec, runs = shlex.quote(str(self.folder / SPEC)), shlex.quote(str(self.folder.parent))
        return f"restore it from what is stored with `mechmem run {spec} --runs {runs}`"

    def _read(self, name: str) -> bytes:
        """A file of the run, verified; `name` is its path below the folder."""
        remedy = self.remedy if name != SPEC else "run the spec that it was made from again"
        return read(self.folder / name, self.record.get("files", {}).get(name), remedy)

    @property
    def question(self) -> str:
        return self.record.get("question", "")  # version 0.1 did not write it

    @property
    def answer(self) -> str:
        """The answer in one sentence."""
        return self.record["answer"]

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The verdict of every claim with its rule, effect and interval, and all it rests on."""
        return self.record["claims"]

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def table(self, name: str) -> pd.DataFrame:
        """A table of the run. Raises InputError for an unknown one, FileError for one that is
        missing or damaged."""
        import io

        import pandas as pd

        if name not in self.tables:
            raise InputError(
                f"{self.folder} has no table {name!r}; it has {', '.join(self.tables)}"
            )
        content = self._read(f"tables/{name}.parquet")
        try:
            return pd.read_parquet(io.BytesIO(content))
        except Exception as error:  # damage of a table without a checksum makes pyarrow raise any
            path = self.folder / "tables" / f"{name}.parquet"
            reason = str(error).partition("\n")[0]
            raise FileError(f"{path} is damaged ({reason}); {self.remedy}") from error

    @property
    def tables(self) -> dict[str, Path]:
        """The files of the tables by name, also of those that are missing."""
        recorded = [Path(path) for path in self.record.get("files", {})]
        names = {path.stem for path in recorded if path.parent.name == "tables"}
        names |= {path.stem for path in (self.folder / "tables").glob("*.parquet")}
        return {name: self.folder / "tables" / f"{name}.parquet" for name in sorted(names)}

    @property
    def figures(self) -> dict[str, Path]:
        return {path.stem: path for path in sorted((self.folder / "figures").glob("*.json"))}

    def summary(self) -> dict[str, Any]:
        """For scripts: answer, claims and paths."""
        return {
            "name": self.name,
            "answer": self.answer,
            "claims": self.claims,
            "tables": {name: str(path) for name, path in self.tables.items()},
            "figures": {name: str(path) for name, path in self.figures.items()},
            "report": str(self.report),
            "folder": str(self.folder),
            "seconds": self.record["seconds"],
        }


def draw(finished: Run, experiment: Experiment | None = None) -> list[go.Figure]:
    """Draw the figures and the report from the saved tables; no model is touched.

    Args:
        finished: the run.
        experiment: its spec, if it is at hand; else it is read from the folder.

    Raises:
        InputError: the spec is wrong, or has plug-ins that are not trusted.
        FileError: a table is missing or damaged, or a file cannot be written.
    """
    from mechmem.report.report import Report, render

    experiment, record = experiment or finished.experiment, finished.record
    for analysis in experiment.analyses:
        path = finished.folder / "tables" / f"{analysis.table_name}.parquet"
        if analysis.table_name not in finished.tables:
            raise FileError(f"{path} is missing; {finished.remedy}")
    tables = {name: finished.table(name) for name in finished.tables}
    missing = record.get("missing", {})
    drawn = {
        i: _drawn(spec, tables[spec.table], finished)
        for i, spec in enumerate(experiment.figures)
        if spec.table not in missing or _can_be_drawn(spec, tables[spec.table])
    }
    for i, figure in drawn.items():
        spec = experiment.figures[i]
        name = f"{i + 1}_{spec.kind}_{spec.table}.json"
        write(finished.folder / "figures" / name, figure.to_json(), finished.folder)
    descriptions = {a.table_name: a.columns for a in experiment.analyses}
    report = Report(
        title=experiment.name,
        question=experiment.question,
        answer=finished.answer,
        figures=[
            (experiment.figures[i].title, experiment.figures[i].caption, figure)
            for i, figure in drawn.items()
        ],
        tables=[
            (name, _described(descriptions.get(name, {})), table) for name, table in tables.items()
        ],
        claims=[
            UNRECORDED | claim | {"low": claim["interval"][0], "high": claim["interval"][1]}
            for claim in finished.claims
        ],
        setup={
            key: value
            for key, value in experiment.block().items()
            if key not in ("question", "answer")
        },
        provenance=record["provenance"]
        | {"seconds": record["seconds"], "seeds": list(experiment.seeds)},
        warnings=_warnings(experiment, missing),
    )
    write(finished.report, render(report), finished.folder)
    return list(drawn.values())


def _drawn(figure: Figure, table: pd.DataFrame, finished: Run) -> go.Figure:
    """The figure. Raises FileError if the table holds something that it cannot show."""
    try:
        return figure.draw(table)
    except InputError:
        raise
    except Exception as error:  # a table without a checksum may hold anything
        path = finished.tables[figure.table]
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise FileError(
            f"{path} cannot be drawn as {figure.kind} ({reason}); {finished.remedy}"
        ) from error


def _can_be_drawn(figure: Figure, table: pd.DataFrame) -> bool:
    """Whether a table that lacks rows still has those of a figure."""
    try:
        figure.draw(table)
    except (InputError, KeyError):
        return False
    return True


def _described(columns: Mapping[str, str]) -> str:
    return "; ".join(
        f"{name}: {meaning}" for name, meaning in columns.items() if name != "per_example"
    )


def _warnings(experiment: Experiment, missing: Mapping[str, Mapping[str, str]]) -> list[str]:
    lost = [
        f"Table {table} lacks rows of seed {seed}, which {reason}."
        for table, reasons in missing.items()
        for seed, reason in reasons.items()
    ]
    if len(experiment.seeds) > 1:
        return lost
    return [
        *lost,
        "One seed: intervals are over the examples of a single model; they do not cover the "
        "differences between trainings.",
    ]


def load_run(folder: Path, trust_plugins: bool = False) -> Run:
    """A finished run from its folder; nothing in it is executed.

    Args:
        folder: of the run.
        trust_plugins: whether the code of its plug-ins may be executed later, as drawing needs it.

    Raises:
        FileError: it is not a finished run, or its record is damaged.
    """
    if not (folder / RECORD).exists():
        raise FileError(f"{folder} holds no finished run")
    remedy = Run(folder, {}).remedy
    return Run(folder, read_record(folder / RECORD, RunRecord, remedy), trust_plugins)


def untrusted(spec: Path, plugins: Sequence[str]) -> str:
    """The error about a spec in the folder of a run, whose plug-ins may be a stranger's.

    Args:
        spec: the file.
        plugins: their names in it.
    """
    return (
        f"{spec} came with a run and has plug-ins ({', '.join(plugins)}), which would be executed; "
        "read them, and add --trust-plugins if you trust them (in Python: "
        "load_run(folder, trust_plugins=True))"
    )


def spreads_of_last_run(name: str, runs: Path = RUNS) -> dict[str, float]:
    """By measure, the standard deviation between seeds in the latest run of a spec that measured
    one; empty if none did.

    Args:
        name: of the experiment.
        runs: folder of all runs.
    """
    for folder in all_runs(runs):
        is_wanted = folder.name.rsplit("-", 1)[0] == name
        if is_wanted and (spreads := load_run(folder).record.get("spreads")):
            return spreads
    return {}


def all_runs(runs: Path = RUNS) -> list[Path]:
    """Folders of finished runs, the latest first."""
    return sorted(
        (p.parent for p in runs.glob("*/run.json")),
        key=lambda p: (p / "run.json").stat().st_mtime,
        reverse=True,
    )
