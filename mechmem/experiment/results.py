"""Results: a finished run's answer, claims, tables and figures, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechmem.experiment.spec import Experiment
from mechmem.report.figures.figure import Figure
from mechmem.spec.errors import InputError
from mechmem.spec.files import FileError, read_json, write

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RUNS = Path("runs")
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

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.folder.name.rsplit("-", 1)[0]

    @cached_property
    def experiment(self) -> Experiment:
        """The spec that was run. This runs the code of its `plugins:`; reading the results does
        not."""
        return Experiment.from_yaml(self.folder / "experiment.yaml")

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
        """A table of the run. Raises InputError for an unknown one."""
        import pandas as pd

        path = self.folder / "tables" / f"{name}.parquet"
        if not path.exists():
            raise InputError(
                f"{self.folder} has no table {name!r}; it has {', '.join(self.tables)}"
            )
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
    """Draw the figures and the report from the saved tables; no model is touched."""
    from mechmem.report.report import Report, render

    experiment, record = experiment or finished.experiment, finished.record
    tables = {name: finished.table(name) for name in finished.tables}
    missing = record.get("missing", {})
    drawn = {
        i: spec.draw(tables[spec.table])
        for i, spec in enumerate(experiment.figures)
        if spec.table not in missing or _can_be_drawn(spec, tables[spec.table])
    }
    for i, figure in drawn.items():
        spec = experiment.figures[i]
        name = f"{i + 1}_{spec.kind}_{spec.table}.json"
        write(finished.folder / "figures" / name, figure.to_json())
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
    write(finished.report, render(report))
    return list(drawn.values())


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


def load_run(folder: Path) -> Run:
    """A finished run from its folder. Raises FileError if it is not one."""
    if not (folder / "run.json").exists():
        raise FileError(f"{folder} holds no finished run")
    return Run(folder, read_json(folder / "run.json"))


def spreads_of_last_run(name: str, runs: Path = RUNS) -> dict[str, float]:
    """By measure, the standard deviation between seeds in the latest run of a spec that measured
    one; empty if none did.

    Args:
        name: of the experiment.
        runs: folder of all runs.
    """
    for folder in all_runs(runs):
        if folder.name.rsplit("-", 1)[0] == name:
            spreads = read_json(folder / "run.json").get("spreads")
            if spreads:
                return spreads
    return {}


def all_runs(runs: Path = RUNS) -> list[Path]:
    """Folders of finished runs, the latest first."""
    return sorted(
        (p.parent for p in runs.glob("*/run.json")),
        key=lambda p: (p / "run.json").stat().st_mtime,
        reverse=True,
    )
