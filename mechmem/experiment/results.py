"""Results: a finished run's answer, claims, tables and figures, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechmem.experiment.spec import Experiment
from mechmem.spec.errors import InputError
from mechmem.spec.files import FileError, read_json, write

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RUNS = Path("runs")


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
    drawn = [figure.draw(tables[figure.table]) for figure in experiment.figures]
    for i, (spec, figure) in enumerate(zip(experiment.figures, drawn, strict=True)):
        write(
            finished.folder / "figures" / f"{i + 1}_{spec.kind}_{spec.table}.json", figure.to_json()
        )
    descriptions = {a.table_name: a.columns for a in experiment.analyses}
    report = Report(
        title=experiment.name,
        question=experiment.question,
        answer=finished.answer,
        figures=[
            (spec.title, spec.caption, fig)
            for spec, fig in zip(experiment.figures, drawn, strict=True)
        ],
        tables=[
            (name, _described(descriptions.get(name, {})), table) for name, table in tables.items()
        ],
        claims=[
            claim | {"low": claim["interval"][0], "high": claim["interval"][1]}
            for claim in finished.claims
        ],
        setup={
            key: value
            for key, value in experiment.block().items()
            if key not in ("question", "answer")
        },
        provenance=record["provenance"]
        | {"seconds": record["seconds"], "seeds": list(experiment.seeds)},
        warnings=_warnings(experiment),
    )
    write(finished.report, render(report))
    return drawn


def _described(columns: Mapping[str, str]) -> str:
    return "; ".join(
        f"{name}: {meaning}" for name, meaning in columns.items() if name != "per_example"
    )


def _warnings(experiment: Experiment) -> list[str]:
    if len(experiment.seeds) > 1:
        return []
    return [
        "One seed: intervals are over the examples of a single model; they do not cover the "
        "differences between trainings."
    ]


def load_run(folder: Path) -> Run:
    """A finished run from its folder. Raises FileError if it is not one."""
    if not (folder / "run.json").exists():
        raise FileError(f"{folder} holds no finished run")
    return Run(folder, read_json(folder / "run.json"))


def all_runs(runs: Path = RUNS) -> list[Path]:
    """Folders of finished runs, the latest first."""
    return sorted(
        (p.parent for p in runs.glob("*/run.json")),
        key=lambda p: (p / "run.json").stat().st_mtime,
        reverse=True,
    )
