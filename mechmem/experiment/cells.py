"""Subjects: one training under study, and its tables, each made once and kept until something that
decides it changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mechmem.analyses.analysis import Analysis
from mechmem.experiment.spec import PLUGINS, Experiment
from mechmem.progress import ProgressCallback
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.files import digest, write
from mechmem.training.loop import train
from mechmem.training.recipe import Recipe
from mechmem.training.store import Trained, folder_of

if TYPE_CHECKING:
    import pandas as pd

ENGINE = ("*.py", "analyses/*.py", "interventions/*.py", "measures/*.py", "tasks/*.py")
NOT_ENGINE = {
    "cli.py",
    "runs.py",
    "results.py",
    "trained_runs.py",
    "report.py",
    "claims.py",
    "specs.py",
    "terminal.py",
    "provenance.py",
    "summaries.py",
    "costs.py",
    "api.py",
    "__init__.py",
}


class TrainedRun:
    """One training under study, and the tables that are made from it."""

    def __init__(
        self,
        experiment: Experiment,
        recipe: Recipe,
        seed: int,
        runs: Path,
        progress: ProgressCallback,
        swept: Mapping[str, Any],
    ) -> None:
        self.experiment, self.recipe, self.seed, self.runs, self.progress = (
            experiment,
            recipe,
            seed,
            runs,
            progress,
        )
        self.trained = self.training(recipe, swept)
        self._session: Session | None = None

    def training(self, recipe: Recipe, swept: Mapping[str, Any] = MappingProxyType({})) -> Trained:
        name = run_label(recipe, swept, self.seed)
        return train(
            recipe,
            self.seed,
            folder_of(recipe, self.seed, self.runs),
            lambda *event: self.progress.train(name, *event),
        )

    @property
    def session(self) -> Session:
        if self._session is None:
            experiment, models = self.experiment, {}
            for name, ref in experiment.checkpoints.items():
                trained = self.trained if ref.training is None else self.training(ref.training)
                models[name] = trained.at(ref.at)
            self._session = Session(
                models=models,
                example_sets={
                    name: chosen.of(self.recipe.task)
                    for name, chosen in experiment.examples.items()
                },
                curves=self.trained.record["curves"],
                phases=self.trained.phases,
                chance=self.recipe.task.chance,
                rule=self.recipe.task.answers,
                say=self.progress.say,
            )
        return self._session

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
            table = analysis.run(self.session, self.experiment.sweep_domain(self.recipe))
        except InputError as error:
            raise BlockError(("analyses", i), str(error)) from error
        write(path, table.to_parquet(index=False))
        return table, True

    def _key(self, analysis: Analysis) -> str:
        """Changes with all that decides the table, and with nothing else."""
        block, words = analysis.block(), analysis.words()
        block.pop("name")
        used = (("examples", self.experiment.examples), ("model", self.experiment.checkpoints))
        named = {
            field: {
                name: ref.block()
                for name, ref in refs.items()
                if name in words or _asks_for_all(block, field)
            }
            for field, refs in used
        }
        steps = [self.trained.phases, self.trained.record["curves"][-1]]
        return digest(
            [
                block,
                named,
                self.recipe.recipe_hash,
                steps,
                self.seed,
                engine_hash(),
                *_plugin_code(self.experiment),
            ]
        )


def run_label(recipe: Recipe, swept: Mapping[str, Any], seed: int) -> str:
    """`fda_capacity d_model 32 seed 0`: a training by its name, what is swept in it, and its
    seed."""
    cell = {key: value for key, value in swept.items() if key != "training"} | {"seed": seed}
    return " ".join([recipe.name, *(f"{key} {value}" for key, value in cell.items())])


class BlockError(InputError):
    """A block of the spec (an analysis, a quantity, a figure) asks for what cannot be."""

    def __init__(self, loc: tuple[str | int, ...], text: str) -> None:
        super().__init__(text if loc[0] == "analyses" else f"{'.'.join(map(str, loc))}: {text}")
        self.loc, self.text = loc, text


def _asks_for_all(block: Any, field: str) -> bool:
    """Whether the block, or a part of it, sweeps this field over all that the experiment names."""
    if not isinstance(block, Mapping):
        return False
    return block.get(field) == {"each": "all"} or any(
        _asks_for_all(part, field) for part in block.values()
    )


def _plugin_code(experiment: Experiment) -> list[str]:
    paths = {name: PLUGINS.get(name, Path(name)) for name in experiment.plugins}
    return [
        name + hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
        if path.exists()
    ]


@cache
def engine_hash() -> str:
    """A hash of the code that makes tables, so that no table outlives the code that made it."""
    here, content = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(
        path for pattern in ENGINE for path in here.glob(pattern) if path.name not in NOT_ENGINE
    ):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:12]
