"""The Python entry points train(), load(), run() and run_study(); on a terminal they show progress
bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechmem.data.tasks.task import Task
from mechmem.experiment import run as runs
from mechmem.experiment.results import Run
from mechmem.experiment.spec import Experiment
from mechmem.experiment.study import StudyRun
from mechmem.experiment.study import run_study as run_folder
from mechmem.models.architecture import Architecture
from mechmem.progress import showing_progress
from mechmem.spec.folders import remove_leftovers
from mechmem.training import store as checkpoints
from mechmem.training.loop import whole
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
    """Train a model. A training that was made before is loaded, an interrupted one is resumed, a
    damaged one is made again.

    Args:
        task: what the model learns, with its label noise.
        architecture: of the transformer; by default `Architecture()`.
        optimisation: steps, batch size, learning rate ...; by default `Optimisation()`.
        seed: of the initial weights and the order of the batches.
        name: under which `load` and the command line find the training.
        folder: of all runs; the training is written below its `trainings/`.

    Raises:
        FileError: the training cannot be written, or a shipped one is damaged.
    """
    recipe = Recipe(
        name=name,
        task=task,
        architecture=architecture or Architecture(),
        optimisation=optimisation or Optimisation(),
    )
    remove_leftovers(folder)
    with showing_progress() as progress:
        return whole(
            recipe, seed, folder, lambda *event: progress.train(name, *event), progress.note
        )


def load(name: str, seed: int = 0, folder: Path = runs.RUNS) -> Trained:
    """A training by its name.

    Args:
        name: of a shipped training (`fda_small`, ...) or of one that was made here.
        seed: of the training.
        folder: of all runs, where the trainings that were made here are.

    Raises:
        InputError: there is no training of this name and seed.
        FileError: a file of it is missing or damaged; the message tells how to restore it.
    """
    return checkpoints.find(name, seed, folder)


def run(experiment: Experiment, folder: Path = runs.RUNS) -> Run:
    """Run an experiment, as `mechmem run` does. Raises InputError or FileError."""
    with showing_progress() as progress:
        return runs.run(experiment, folder, progress)


def run_study(
    study: str | Path, overrides: Sequence[str] = (), folder: Path = runs.RUNS
) -> StudyRun:
    """Run all experiments of a folder with a `study.yaml`, as `mechmem run FOLDER` does.

    Args:
        study: the folder.
        overrides: changes to `study.yaml`, such as `seeds=[0]`.
        folder: of all runs and trainings.

    Raises:
        InputError: `study.yaml` is wrong.
        FileError: a page cannot be written.
    """
    with showing_progress() as progress:
        return run_folder(Path(study), overrides, runs=folder, progress=progress)
