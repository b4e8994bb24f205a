"""The Python entry points: train(), load(), run(), each with a bar where there is a terminal."""

from __future__ import annotations

from pathlib import Path

from mechmem.data.tasks.task import Task
from mechmem.experiment import run as runs
from mechmem.experiment.results import Run
from mechmem.experiment.spec import Experiment
from mechmem.models.architecture import Architecture
from mechmem.progress import showing_progress
from mechmem.training import store as checkpoints
from mechmem.training.loop import train as train_recipe
from mechmem.training.recipe import Optimisation, Recipe
from mechmem.training.store import Trained


def train(
    task: Task,
    architecture: Architecture | None = None,
    optimisation: Optimisation | None = None,
    seed: int = 0,
    name: str = "training",
    folder: Path = runs.RUNS,
) -> Trained:
    """Train a model, or take the one at hand if the same was trained before; an interrupted
    training goes on.

    Kept under `folder`/trainings/. Raises FileError if that cannot be written.
    """
    recipe = Recipe(
        name=name,
        task=task,
        architecture=architecture or Architecture(),
        optimisation=optimisation or Optimisation(),
    )
    with showing_progress() as progress:
        place = checkpoints.folder_of(recipe, seed, folder)
        return train_recipe(recipe, seed, place, lambda *event: progress.train(name, *event))


def load(name: str, seed: int = 0, folder: Path = runs.RUNS) -> Trained:
    """A shipped training (`fda_small`, ...) or one made before. Raises InputError if there is none
    of this name."""
    return checkpoints.find(name, seed, folder)


def run(experiment: Experiment, folder: Path = runs.RUNS) -> Run:
    """Run an experiment: what `mechmem run` does. Raises InputError or FileError."""
    with showing_progress() as progress:
        return runs.run(experiment, folder, progress)
