"""Studies: a folder of experiments that are run one after the other and reported in one table.

`study.yaml` in the folder holds the question, the seeds and the interpretations.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator

from mechmem.experiment.measured import pooled_spreads
from mechmem.experiment.results import RUNS, Run
from mechmem.experiment.rules import timing_of_rules
from mechmem.experiment.run import judge_again, measured_in, run, run_folder
from mechmem.experiment.spec import Experiment
from mechmem.experiment.study_results import (
    NUMBERS,
    WORDS,
    claim_records,
    page,
    placeholders,
    with_texts,
)
from mechmem.progress import ProgressCallback
from mechmem.spec.errors import BlockError, InputError, suggest
from mechmem.spec.files import FileError, read, read_json, write, write_json
from mechmem.spec.limits import Seeds
from mechmem.spec.registry import Component
from mechmem.spec.yaml_file import SpecError, SpecFile

STUDY = "study.yaml"
"""The file that makes a folder a study."""
OF_THE_PROGRAM = ("cells", "trainings")
"""Folders in the folder of runs that are no studies."""


class Study(Component):
    """Experiments that answer one question together."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=100)
    """Names the folder of the results: `runs/NAME`."""
    question: str
    specs: tuple[str, ...] = ()
    """Files of the experiments, relative to the folder, in the order of the pages; by default, all
    .yaml files of the folder, sorted."""
    seeds: Seeds | None = None
    """Seeds of every experiment; by default, those in each file."""
    own_seeds: tuple[str, ...] = ()
    """Files whose experiments keep their own seeds."""
    titles: dict[str, str] = {}
    """By the id of a claim, its short title."""
    interpretations: dict[str, dict[str, str]] = {}
    """By the name of a file without `.yaml`, and by the id of a claim: a paragraph with
    placeholders such as `{verdict}`, `{effect.percent}` and `{quantity.percent}`."""
    results: str | None = None
    """A Markdown page to write as well, relative to the project, such as `docs/results.md`; a JSON
    file with its records is written next to it."""

    @field_validator("name")
    @classmethod
    def _is_no_folder_of_the_program(cls, name: str) -> str:
        if name in OF_THE_PROGRAM:
            raise ValueError(f"runs/{name} is used by mechmem itself; choose another name")
        return name

    @field_validator("specs")
    @classmethod
    def _exist(cls, specs: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        folder = (info.context or {}).get("folder")
        for spec in specs:
            if folder is not None and not (folder / spec).is_file():
                known = [path.name for path in _spec_files(folder)]
                raise ValueError(f"{folder / spec} does not exist; {suggest(spec, known)}")
        names = [Path(spec).stem for spec in specs]
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise ValueError(f"two files are named {twice!r}; rename one")
        return specs

    @field_validator("results")
    @classmethod
    def _stay_in_the_project(cls, results: str | None) -> str | None:
        if results is not None:
            path = Path(results)
            if path.is_absolute() or ".." in path.parts or path.suffix != ".md":
                raise ValueError("`results` must be an .md file below the project's folder")
        return results

    @classmethod
    def from_folder(cls, folder: Path, overrides: Sequence[str] = ()) -> Self:
        """The study of a folder. Raises SpecError with the place of every error.

        Args:
            folder: holds `study.yaml` and the experiments.
            overrides: changes to `study.yaml`, such as `seeds=[0]`.
        """
        if not (folder / STUDY).is_file():
            raise SpecError(f"{folder} is a folder; name a .yaml file in it, or add a {STUDY}")
        file = SpecFile(folder / STUDY, overrides)
        study = file.build(cls)
        files = study.files(folder)
        if not files:
            raise SpecError(file.message((), f"{folder} holds no experiment"))
        # Specs of the folder that the study leaves out may keep their entries.
        paths = [*files.values(), *_spec_files(folder)]
        for place, names, known in (
            ("own_seeds", study.own_seeds, [_written(folder, path) for path in paths]),
            ("interpretations", study.interpretations, [path.stem for path in paths]),
        ):
            for name in names:
                if name not in known:
                    text = f"the study has no spec {name!r}; {suggest(name, dict.fromkeys(known))}"
                    raise SpecError(file.message((place, name), text))
        return study

    def files(self, folder: Path) -> dict[str, Path]:
        """By name, the files of the experiments in their order."""
        paths = [folder / spec for spec in self.specs] or _spec_files(folder)
        return {path.stem: path for path in paths}


def _spec_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.yaml")) if path.name != STUDY]


def _written(folder: Path, path: Path) -> str:
    """A file as `specs` and `own_seeds` name it."""
    return str(path)[len(str(folder)) + 1 :]


@dataclass(frozen=True)
class Member:
    """A spec of a study."""

    name: str
    path: Path
    file: SpecFile = field(repr=False)
    experiment: Experiment = field(repr=False)

    def explained(self, error: Exception) -> str:
        """An error in one paragraph, with its place in the file where it has one."""
        return explained(error, self.file)


def explained(error: Exception, file: SpecFile | None = None) -> str:
    """An error in one paragraph.

    Args:
        error: what was raised.
        file: the spec, which knows the places of errors.
    """
    if isinstance(error, BlockError) and file is not None:
        return file.message(error.loc, error.text)
    if isinstance(error, (InputError, FileError, OSError, ArithmeticError)):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    at = traceback.extract_tb(error.__traceback__)[-1]  # not foreseen: the place helps to report it
    return f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"


def members_of(
    study: Study,
    folder: Path,
    options: Sequence[str] = (),
    on_plugins: Callable[[Path, Sequence[str]], None] = lambda *_: None,
) -> tuple[list[Member], dict[str, str]]:
    """The specs of a study that are valid, and by name why the others are not.

    Args:
        study: of the folder.
        folder: of the specs.
        options: overrides for every spec, such as `device=cpu`.
        on_plugins: is called with a spec and its plug-ins before they are executed.
    """
    members, failed = [], {}
    for name, path in study.files(folder).items():
        has_own_seeds = study.seeds is None or _written(folder, path) in study.own_seeds
        seeds = [] if has_own_seeds else [f"seeds={list(study.seeds or ())}"]
        changes = [*options, *seeds]
        try:
            announce = partial(on_plugins, path)
            experiment = Experiment.from_yaml(path, changes, announce)
            member = Member(name, path, SpecFile(path, changes), experiment)
            _check_interpretations(study.interpretations.get(name, {}), member)
            members.append(member)
        except Exception as error:  # one bad spec must not cost the others
            failed[name] = explained(error)
    return members, failed


def executing(note: Callable[[str], None]) -> Callable[[Path, Sequence[str]], None]:
    """A function for `members_of` that says which plug-ins are executed."""
    return lambda path, plugins: note(f"{path} executes its plug-ins: {', '.join(plugins)}")


def _check_interpretations(texts: Mapping[str, str], member: Member) -> None:
    """Raises InputError for a claim or a placeholder that the spec does not know."""
    ids = [claim.id for claim in member.experiment.claims]
    for claim_id, text in texts.items():
        if claim_id not in ids:
            raise InputError(
                f"{STUDY} interprets the claim {claim_id!r} of {member.path}; "
                f"{suggest(claim_id, ids)}"
            )
        _check_placeholders(text, claim_id, member.experiment)


def _check_placeholders(text: str, claim_id: str, experiment: Experiment) -> None:
    known = [*NUMBERS, *experiment.quantities]
    for name, attribute in placeholders(text):
        if name not in known and (attribute or name not in WORDS):
            raise InputError(
                f"{STUDY}: the interpretation of {claim_id} refers to {name!r}; "
                f"{suggest(name, [*WORDS, *known])}"
            )


@dataclass(frozen=True)
class StudyRun:
    """A study that was run."""

    folder: Path
    results: Mapping[str, Any] = field(repr=False)
    """The records from which the pages are rendered, as in results.json."""
    runs: Mapping[str, Run] = field(repr=False)
    """By the name of a spec, its finished run."""
    written: tuple[Path, ...] = ()
    """The pages that were written outside of the folder of runs."""
    note: str = ""
    """Why the page that `results:` names was left as it is."""

    @property
    def failed(self) -> Mapping[str, str]:
        """By the name of a spec, why it failed."""
        return self.results["failed"]

    @property
    def index(self) -> Path:
        return self.folder / "index.html"


def run_study(
    folder: Path,
    overrides: Sequence[str] = (),
    options: Sequence[str] = (),
    runs: Path = RUNS,
    progress: ProgressCallback | None = None,
) -> StudyRun:
    """Run every experiment of a folder and report all claims together.

    What is stored is reused, so an interrupted study is resumed by the same call. An experiment
    that fails is reported and left out; the others are run.

    Args:
        folder: holds `study.yaml` and the experiments.
        overrides: changes to `study.yaml`, such as `seeds=[0]`.
        options: changes to every experiment, such as `device=cpu`.
        runs: folder of all runs and trainings.
        progress: is called with the progress over experiments, trainings and analyses.

    Raises:
        InputError: `study.yaml` is wrong.
        FileError: a page cannot be written.
    """
    progress = progress or ProgressCallback()
    study = Study.from_folder(folder, overrides)
    members, failed = members_of(study, folder, options, executing(progress.note))
    for name, message in failed.items():
        progress.note(f"{name} failed: {message}")
    for member in members:  # specs share tables: the first run shows data to the rules of others
        with suppress(Exception):  # which its own run explains
            timing_of_rules(member.experiment, runs)
    finished: dict[str, Run] = {}
    for i, member in enumerate(members):
        progress.part(member.name, i, len(members), _seconds_left(members, finished, runs))
        try:
            finished[member.name] = run(member.experiment, runs, progress)
        except Exception as error:  # the other specs do not depend on this one
            failed[member.name] = member.explained(error)
            progress.note(f"{member.name} failed: {failed[member.name]}")
    done = [member for member in members if member.name in finished]
    # Few seeds say little of their spread, so all specs of a study share what they know of it.
    measured = [measured_in(finished[member.name], member.experiment) for member in done]
    spreads = pooled_spreads(quantity for one in measured for quantity in one.values())
    for member in done:
        finished[member.name] = judge_again(finished[member.name], member.experiment, spreads)
    results = {
        "name": study.name,
        "folder": folder.name,
        "question": study.question,
        "titles": study.titles,
        "claims": [
            record
            for member in done
            for record in claim_records(
                member.name,
                member.experiment,
                finished[member.name],
                study.interpretations.get(member.name, {}),
                spreads,
            )
        ],
        "failed": failed,
    }
    return _reported(study, folder, results, finished, runs, is_whole=not overrides)


def _seconds_left(
    members: Sequence[Member], finished: Mapping[str, Run], runs: Path
) -> float | None:
    """The time that the specs without a finished run will take, if they take as long as those that
    were run, on average; None before the first one."""
    if not finished:
        return None
    seconds = [run.record["seconds"] for run in finished.values()]
    missing = [
        member
        for member in members
        if member.name not in finished
        and not (run_folder(member.experiment, runs) / "run.json").exists()
    ]
    return len(missing) * sum(seconds) / len(seconds)


def _reported(
    study: Study,
    folder: Path,
    results: dict[str, Any],
    finished: Mapping[str, Run],
    runs: Path,
    is_whole: bool,
) -> StudyRun:
    """Write the pages of a study.

    Args:
        study: that was run.
        folder: of the study.
        results: its records.
        finished: the runs, by the name of their spec.
        runs: folder of all runs.
        is_whole: whether the study was run as its file describes it.
    """
    from mechmem.report.study_pages import index_page

    place = runs / study.name
    write_json(place / "results.json", results)
    write(place / "results.md", page(results))
    reports = {name: f"../{run.folder.name}/report.html" for name, run in finished.items()}
    write(place / "index.html", index_page(with_texts(results), reports))
    written, note = (), ""
    if study.results is not None:
        if not is_whole or results["failed"]:
            why = "a spec failed" if results["failed"] else "study.yaml was overridden"
            note = f"{study.results} was left as it is: {why}"
        else:
            written = _published(project_of(folder), study.results, results)
    return StudyRun(place, results, finished, written, note)


def project_of(folder: Path) -> Path:
    """The project that a study belongs to: the nearest folder above it with a pyproject.toml or
    .git, else its parent."""
    whole = folder.resolve()
    for parent in whole.parents:
        if (parent / "pyproject.toml").exists() or (parent / ".git").exists():
            return parent
    return whole.parent


def _published(project: Path, name: str, results: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write the page and its records into the project.

    Args:
        project: its folder.
        name: of the page, relative to it.
        results: the records.

    Raises:
        InputError: that would replace a file that `mechmem run` did not write, or one outside of
            the project.
    """
    from mechmem.report.study_pages import WRITTEN

    target = project / name
    records = target.with_suffix(".json")
    for path in (target, records):
        if not path.resolve().is_relative_to(project):
            raise InputError(f"{path} lies outside of the project; choose another `results:`")
    if target.exists() and not read(target).startswith(WRITTEN.encode()):
        raise InputError(
            f"{target} was not written by `mechmem run`; move it away or choose another `results:`"
        )
    if records.exists() and not _holds_claims(records):
        raise InputError(f"{records} holds something else; choose another `results:`")
    write(target, page(results))
    write_json(records, results)
    return target, records


def _holds_claims(records: Path) -> bool:
    found = read_json(records)
    return isinstance(found, dict) and "claims" in found
