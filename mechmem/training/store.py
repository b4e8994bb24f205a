"""The store of trained models: recipe, curves, phases, and the model at any kept step."""

from __future__ import annotations

import re
import shlex
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from mechmem.data.tasks.task import Task
from mechmem.models.architecture import Model
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.files import (
    FileError,
    first_error,
    read,
    read_record,
    read_tensors,
    write,
    write_record,
    write_tensors,
)
from mechmem.spec.limits import check_name, check_seed
from mechmem.spec.yaml_file import write_spec
from mechmem.training.index import RECORD, REINSTALL, sums_of
from mechmem.training.recipe import SHIPPED, Recipe
from mechmem.training.record import TrainingRecord

if TYPE_CHECKING:
    import pandas as pd

RECIPE = "recipe.yaml"
"""The recipe in the folder of a training, from which it can be made again."""


def own_folder(recipe: Recipe, seed: int, runs: Path) -> Path:
    """The folder of a training that is made on this machine.

    Args:
        recipe: what is trained; its name and its hash name the folder.
        seed: seed of the weights and the batches.
        runs: the folder of all runs.
    """
    return runs / "trainings" / f"{recipe.name}-{recipe.recipe_hash}" / f"seed_{seed}"


def folder_of(recipe: Recipe, seed: int, runs: Path) -> Path:
    """The folder of a training: of one made on this machine if it is finished, else of the shipped
    one, else of a fetched one, else of the one to be made.

    Args:
        recipe: what is trained.
        seed: seed of the weights and the batches.
        runs: the folder of all runs.
    """
    own = own_folder(recipe, seed, runs)
    if (own / RECORD).exists():
        return own
    found = _shipped_folders(fetched(runs), seed) | _shipped_folders(SHIPPED, seed)
    return found.get(recipe.recipe_hash, own)


def fetched(runs: Path) -> Path:
    """The folder of shipped trainings that were fetched later, laid out like SHIPPED."""
    return runs / "trainings" / "shipped"


def shipped_name(recipe: Recipe) -> str | None:
    """The name under which a training is shipped, if seed 0 of it is."""
    folder = _shipped_folders(SHIPPED, 0).get(recipe.recipe_hash)
    return None if folder is None else folder.parent.name


@cache
def _shipped_folders(shipped: Path, seed: int) -> dict[str, Path]:
    """By the hash of its recipe, the folder of every shipped training of a seed."""
    found = {}
    for record in sorted(shipped.glob(f"*/seed_{seed}/training.json")):
        found.setdefault(Trained(record.parent).recipe.recipe_hash, record.parent)
    return found


def forget() -> None:
    """Look for shipped and fetched trainings again: files have changed."""
    _shipped_folders.cache_clear()


def find(name: str, seed: int, runs: Path) -> Trained:
    """The training of this name: the shipped one, or the latest made on this machine.

    Args:
        name: name of the training, as in its recipe; NAME-HASH is the one with this recipe.
        seed: seed of the weights and the batches.
        runs: the folder of all runs.

    Raises:
        InputError: no training has this name and seed, or another recipe than that of the shipped
            one was trained under its name.
        FileError: a file of it is missing or damaged.
    """
    return Trained(_found(name, seed, runs)).verified()


def _found(name: str, seed: int, runs: Path) -> Path:
    check_name(name, "training")
    check_seed(seed)
    shipped, made = _shipped(name, seed, runs), made_here(name, seed, runs)
    if shipped is not None:
        hash_ = shipped.recipe.recipe_hash
        if others := [path for path in made if path.parent.name != f"{name}-{hash_}"]:
            raise InputError(
                f"{name!r} is a shipped training and another one that was made here; write "
                f"{name}-{hash_} for the shipped one, {others[-1].parent.name} for the other"
            )
        return shipped.folder
    if made:
        return made[-1]
    base, _, hash_ = name.rpartition("-")
    explicit = runs / "trainings" / name / f"seed_{seed}"
    if (explicit / RECORD).exists():
        return explicit
    shipped = _shipped(base, seed, runs) if base else None
    if shipped is not None and shipped.recipe.recipe_hash == hash_:
        return shipped.folder
    raise InputError(f"there is no training {name!r} of seed {seed}; {suggest(name, names(runs))}")


def _shipped(name: str, seed: int, runs: Path) -> Trained | None:
    """The shipped training of this name and seed, if it is in the package or was fetched."""
    for place in (SHIPPED, fetched(runs)):
        folder = place / name / f"seed_{seed}"
        if (folder / "training.json").exists():
            return Trained(folder)
    return None


def made_here(name: str, seed: int, runs: Path) -> list[Path]:
    """Folders of the trainings of this name that were made on this machine, the latest last.

    Args:
        name: name of the training, as in its recipe.
        seed: seed of the weights and the batches.
        runs: the folder of all runs.
    """
    records = [
        path for path in runs.glob(f"trainings/*/seed_{seed}/training.json") if _name(path) == name
    ]
    return [path.parent for path in sorted(records, key=lambda path: path.stat().st_mtime)]


def _name(record: Path) -> str:
    return record.parent.parent.name.rsplit("-", 1)[0]


def names(runs: Path) -> list[str]:
    """Names of all trainings, shipped or made on this machine."""
    shipped = {path.parent.parent.name for path in SHIPPED.glob("*/seed_*/training.json")}
    own = list(runs.glob("trainings/*-*/seed_*/training.json"))
    return sorted(shipped | {_name(path) for path in own} | _shadowed(own, shipped, runs))


def _shadowed(own: list[Path], shipped: set[str], runs: Path) -> set[str]:
    """NAME-HASH of the trainings that were made here under the name of another, shipped one."""
    hashes = {
        (path.parent.name, recipe_hash)
        for seed in {path.parent.name.removeprefix("seed_") for path in own}
        if seed.isdecimal()
        for recipe_hash, path in _shipped_folders(SHIPPED, int(seed)).items()
    }
    return {
        path.parent.parent.name
        for path in own
        if _name(path) in shipped
        and (_name(path), path.parent.parent.name.rsplit("-", 1)[1]) not in hashes
    }


def ship(trained: Trained, steps: list[int], target: Path) -> None:
    """Copy a training with some of its checkpoints, its curves and a model card.

    Weights are copied in half precision, which halves the size and changes no answer that is not
    on the edge; the curves are those of the training itself.

    Args:
        trained: the finished training.
        steps: steps of the checkpoints to copy.
        target: the folder to write.

    Raises:
        InputError: the training keeps no checkpoint of a step.
    """
    sums: dict[str, str] = {}
    for step in steps:
        name = f"step_{trained.step(step):06d}.safetensors"
        weights = read_tensors(trained.folder / "checkpoints" / name)
        halves = {key: value.half() for key, value in weights.items()}
        sums[name] = write_tensors(target / "checkpoints" / name, halves)
    write_record(target / RECORD, trained.record | {"checkpoints": sums})
    write(target / "card.md", Trained(target).card())


def _sums_of_the_package(folder: Path) -> dict[str, str]:
    """By path below the folder of a shipped or fetched training, the SHA-256 of its files; empty
    for a training that was made here."""
    home = folder.parents[1] if len(folder.parents) > 1 else folder
    is_fetched = home.name == "shipped" and home.parent.name == "trainings"
    seed = re.fullmatch(r"seed_(\d{1,18})", folder.name)
    if not seed or not (home == SHIPPED or is_fetched):
        return {}
    return sums_of(SHIPPED, folder.parent.name, int(seed[1]))


class Trained:
    """A finished training: its recipe, curves, phases and checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shipped = _sums_of_the_package(folder)
        self.record: dict[str, Any] = read_record(
            folder / RECORD, TrainingRecord, self.remedy, self._shipped.get(RECORD)
        )
        try:
            self.recipe = Recipe.model_validate(self.record["recipe"])
        except (ValidationError, RecursionError) as error:
            reason = first_error(error) if isinstance(error, ValidationError) else error
            raise FileError(
                f"{folder / RECORD} holds no recipe that is known here ({reason}); {self.remedy}"
            ) from error
        self.seed: int = self.record["seed"]

    @property
    def remedy(self) -> str:
        """How to restore a file of this training: the end of an error's message."""
        name, folder = self.folder.parent.name, self.folder
        if self._shipped:
            seed = folder.name.removeprefix("seed_")
            home = folder.parents[1]
            runs = "" if home == SHIPPED else f" --runs {shlex.quote(str(home.parents[1]))}"
            return (
                f"restore it with `mechmem fetch {name} --seeds {seed} --from URL|FOLDER{runs}`, "
                f"or {REINSTALL}"
            )
        if (folder / RECIPE).is_file() and folder.parents[1].name == "trainings":
            recipe, runs = (shlex.quote(str(p)) for p in (folder / RECIPE, folder.parents[2]))
            seed = folder.name.removeprefix("seed_")
            return f"make it again with `mechmem train {recipe} --seed {seed} --runs {runs}`"
        return f"delete the folder {folder} and train again"

    @cached_property
    def _sums(self) -> dict[str, str]:
        """By the name of a checkpoint's file, its SHA-256; empty for records of version 0.2."""
        if self._shipped:
            places = {Path(path): checksum for path, checksum in self._shipped.items()}
            return {p.name: c for p, c in places.items() if p.parent.name == "checkpoints"}
        return self.record.get("checkpoints", {})

    def verified(self) -> Trained:
        """This training, after a look at every checkpoint. Raises FileError if one is missing or
        damaged."""
        for name, checksum in self._sums.items():
            read(self.folder / "checkpoints" / name, checksum, self.remedy)
        return self

    def __repr__(self) -> str:
        phases = ", ".join(
            f"{name} {'never' if step is None else step}" for name, step in self.phases.items()
        )
        return f"Trained({self.recipe.name}, seed {self.seed}: {phases})"

    @property
    def task(self) -> Task:
        """The task as this seed draws it."""
        return self.recipe.task_of(self.seed)

    @property
    def phases(self) -> dict[str, int | None]:
        """The step of each phase; None for a phase that was never reached."""
        return self.recipe.optimisation.phases(self.record["curves"])

    @cached_property
    def curves(self) -> pd.DataFrame:
        """The four curves: step, clean, memorised, corrected, held_out (fractions)."""
        import pandas as pd

        return pd.DataFrame(self.record["curves"])

    @property
    def steps(self) -> list[int]:
        """Steps whose checkpoints are kept."""
        names = self._sums or [p.name for p in (self.folder / "checkpoints").glob("step_*")]
        found = [re.fullmatch(r"step_(\d{6,18})\.safetensors", name) for name in names]
        return sorted(int(match[1]) for match in found if match)

    def step(self, checkpoint: str | int) -> int:
        """The step of a checkpoint that is given as a phase or as a step.

        Raises InputError if there is no such phase, or no checkpoint of it.
        """
        found = self._step_of_phase(checkpoint) if isinstance(checkpoint, str) else checkpoint
        if found not in self.steps:
            raise InputError(
                f"{self._label} keeps no checkpoint of step {found}; "
                f"it has {', '.join(map(str, self.steps))}"
            )
        return found

    def reached(self, phase: str) -> bool:
        """Whether the training reached a phase. Raises InputError for an unknown one."""
        if phase not in self.phases:
            raise InputError(f"there is no phase {phase!r}; {suggest(phase, self.phases)}")
        return self.phases[phase] is not None

    def _step_of_phase(self, phase: str) -> int:
        if phase not in self.phases:
            raise InputError(f"there is no phase {phase!r}; {suggest(phase, self.phases)}")
        step = self.phases[phase]
        if step is None:
            raise InputError(f"{self._label} never reached phase {phase!r}; see its curves")
        return step

    @property
    def _label(self) -> str:
        return f"{self.recipe.name} (seed {self.seed})"

    def at(self, checkpoint: str | int) -> Model:
        """The `HookedTransformer` at a phase (initial, generalised, memorised, final) or a step.

        Raises InputError if there is no such checkpoint, FileError if its file is missing or
        damaged.
        """
        path = self.folder / "checkpoints" / f"step_{self.step(checkpoint):06d}.safetensors"
        tensors = read_tensors(path, self._sums.get(path.name), self.remedy)
        model = self.recipe.build(self.seed)
        parameters = dict(model.named_parameters())
        if tensors.keys() != parameters.keys() or any(
            tensors[n].shape != p.shape for n, p in parameters.items()
        ):
            raise FileError(
                f"{path} does not fit the architecture of {self.recipe.name}; {self.remedy}"
            )
        if not all(t.is_floating_point() and t.isfinite().all() for t in tensors.values()):
            raise FileError(f"{path} is damaged (a weight is not a finite number); {self.remedy}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        return model.requires_grad_(False)

    def checkpoints(self) -> pd.DataFrame:
        """The kept checkpoints: name (its phases), step and the four curves there."""
        names = {}
        for name, step in self.phases.items():
            names.setdefault(step, []).append(name)
        kept = self.curves[self.curves["step"].isin(self.steps)].copy()
        kept.insert(
            0, "name", [", ".join(names.get(step, [])) or f"step {step}" for step in kept["step"]]
        )
        return kept.reset_index(drop=True)

    def card(self) -> str:
        """The model card in Markdown: what the model is, how it was made, how accurate it is."""
        lines = [
            f"# {self.recipe.name}, seed {self.seed}",
            "",
            f"A {self.recipe.architecture.n_layers}-layer transformer trained from scratch on",
            f"`{self.task.kind}` with label noise, to study memorisation.",
            "It is of no use for anything else. Checkpoints are kept in half precision.",
            "",
            *self._origin(),
            "",
            "Accuracies of whole answers: `clean` training instances and `memorised` (noisy ones)",
            "against their given labels, `corrected` (noisy ones) and `held_out` against the true",
            "ones.",
            "",
            "| checkpoint | step | clean | memorised | corrected | held_out |",
            "|---|---|---|---|---|---|",
        ]
        for name, step, *values in self.checkpoints().to_numpy().tolist():
            cells = [name, str(step), *(f"{value:.3f}" for value in values)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", "```yaml", write_spec(self.recipe).rstrip(), "```", ""])

    def _origin(self) -> list[str]:
        """Hash, time, machine and versions: lines of the model card."""
        made = self.record["provenance"]
        hardware, versions = made["hardware"], made["versions"]
        minutes = f"{self.record['seconds'] / 60:.0f} minutes"
        threads = "1 thread" if hardware["threads"] == 1 else f"{hardware['threads']} threads"
        return [
            f"Recipe hash `{self.recipe.recipe_hash}`; {minutes} on {threads} of",
            f"{hardware['processor']}; torch {versions['torch']}, "
            f"transformer-lens {versions['transformer-lens']},",
            f"commit `{made['commit'] or 'not recorded'}`.",
        ]
