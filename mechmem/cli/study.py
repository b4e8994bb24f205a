"""`mechmem run` and `mechmem check` for a folder: every experiment of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechmem.experiment.dry_run import dry_run
from mechmem.experiment.run import missing_trainings
from mechmem.experiment.study import Member, Study, StudyRun, executing, members_of, run_study
from mechmem.progress import showing_progress


def run(folder: Path, overrides: Sequence[str], options: Sequence[str], runs: Path) -> StudyRun:
    """Run a study with a display of its progress.

    Args:
        folder: of the study.
        overrides: changes to `study.yaml`.
        options: changes to every experiment.
        runs: folder of all runs.
    """
    with showing_progress() as progress:
        return run_study(folder, overrides, options, runs, progress)


def run_text(study: StudyRun) -> str:
    """The table of a study, and where its pages are."""
    from mechmem.report.study_pages import text_table

    places = [study.index, *study.written, study.folder / "results.json"]
    notes = [study.note] if study.note else []
    return "\n".join([text_table(study.results), "", *notes, *map(str, places)])


def run_numbers(study: StudyRun) -> dict[str, Any]:
    """The records of the claims, with paths."""
    return {
        **study.results,
        "reports": {name: str(run.report) for name, run in study.runs.items()},
        "index": str(study.index),
        "written": [str(path) for path in study.written],
    }


def failure(failed: Sequence[str], n: int) -> str:
    """The last line of a study in which specs failed.

    Args:
        failed: the names of these specs.
        n: number of all specs.
    """
    return f"{len(failed)} of {n} specs failed: {', '.join(failed)}"


def check(
    folder: Path, overrides: Sequence[str], options: Sequence[str], runs: Path
) -> dict[str, Any]:
    """Try every experiment of a study on untrained models.

    Args:
        folder: of the study.
        overrides: changes to `study.yaml`.
        options: changes to every experiment.
        runs: folder of all runs.

    Returns:
        valid; specs (spec, analyses, seeds, seconds); trainings that must be made first (training,
        minutes); to_fetch (how to get those that are shipped); without_interpretation (claims);
        failed (by name, why).
    """
    from mechmem.experiment.cost import fetch_or_train, training_costs

    study = Study.from_folder(folder, overrides)
    rows, missing, silent = [], {}, []
    with showing_progress() as progress:
        members, failed = members_of(study, folder, options, executing(progress.note))
        for i, member in enumerate(members):
            progress.part(member.name, i, len(members), None)
            try:
                rows.append(_costs(member, progress.say))
            except Exception as error:  # all other specs are checked too
                failed[member.name] = member.explained(error)
                continue
            missing |= missing_trainings(member.experiment, runs)
            texts = study.interpretations.get(member.name, {})
            silent += [
                f"{member.name}.{claim.id}"
                for claim in member.experiment.claims
                if claim.id not in texts
            ]
    return {
        "valid": not failed,
        "specs": rows,
        "trainings": training_costs(missing),
        "to_fetch": fetch_or_train(missing.values()),
        "without_interpretation": silent,
        "failed": failed,
    }


def _costs(member: Member, say: Any) -> dict[str, Any]:
    from mechmem.experiment.cost import seconds_per_example

    costs, n = dry_run(member.experiment, say), len(member.experiment.seeds)
    seconds = sum(costs.values()) * n * seconds_per_example(member.experiment.training)
    return {
        "spec": member.name,
        "analyses": len(costs),
        "seeds": n,
        "seconds": round(seconds, 1),
    }


def check_text(folder: Path, found: dict[str, Any]) -> str:
    """The specs of a study with their costs, and what is wrong or missing.

    Args:
        folder: of the study.
        found: by `check`.
    """
    import pandas as pd

    n = len(found["specs"])
    lines = [f"{folder}: {n} valid {'spec' if n == 1 else 'specs'}"]
    if found["specs"]:
        lines.append(pd.DataFrame(found["specs"]).to_string(index=False))
    if trainings := found["trainings"]:
        whole = sum(training["minutes"] for training in trainings)
        models = "1 model" if len(trainings) == 1 else f"{len(trainings)} models"
        lines.append(f"{models} must be trained first (about {whole:.0f} min)")
        lines += [pd.DataFrame(trainings).to_string(index=False), *found["to_fetch"]]
    if silent := found["without_interpretation"]:
        lines.append(f"without an interpretation in study.yaml: {', '.join(silent)}")
    lines += [f"{name} is not valid: {why}" for name, why in found["failed"].items()]
    return "\n".join(lines)
