"""The matrix of known answers: which spec judges a claim on a model, how its example sets are
fitted to the task of that model, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edited import EDITED, in_place_of_memorised
from ruamel.yaml import YAML

from mechmem.data.example_set import ExampleSet
from mechmem.data.tasks.task import Task
from mechmem.experiment.answer import answer_from
from mechmem.experiment.run import run
from mechmem.experiment.spec import Experiment
from mechmem.experiment.study_results import rounded
from mechmem.spec.errors import InputError
from mechmem.training.recipe import named_recipe

ROOT = Path(__file__).parents[2]
EXPECTED: dict[str, dict[str, str]] = YAML(typ="safe", pure=True).load(
    Path(__file__).with_name("expected.yaml")
)
CELLS = [(claim, model) for claim, models in EXPECTED.items() for model in models]
LETTERS = {"supported": "S", "refuted": "R", "not testable": "NT", "undetermined": "U"}
RECORD = ROOT / "docs" / "known_answers.json"
FOLDERS = (ROOT / "experiments" / "known_answers", ROOT / "experiments" / "paper")
"""Where specs are looked for; the first are those that read no training curve and no twin."""


def spec_of(claim: str, model: str) -> Path:
    """The spec that judges a claim on a model."""
    task = named_recipe(training_of(model), ROOT / "experiments").task.kind
    name = f"{claim.lower()}_{'fda' if task == 'four_digit_addition' else 'thr'}.yaml"
    return next((f / name for f in FOLDERS if (f / name).exists()), FOLDERS[-1] / name)


def training_of(model: str) -> str:
    """The training that a model is made from: itself, unless it is edited."""
    return "fda_small" if model in EDITED else model


def experiment_of(claim: str, model: str) -> Experiment:
    """The spec of a claim, asked of one model: seed 0, and no other training next to it."""
    path = spec_of(claim, model)
    overrides = [f"name={path.stem}_{model}", f"training={training_of(model)}", "seeds=[0]"]
    experiment = Experiment.from_yaml(path, overrides)
    sets = fitted(experiment.examples, experiment.training.task_of(0))
    return Experiment.model_validate(experiment.block() | {"examples": sets, "also": []})


def fitted(sets: Mapping[str, ExampleSet], task: Task) -> dict[str, dict[str, Any]]:
    """Example sets for a task with fewer instances than they were written for.

    Sets that are disjoint halves of some instances stay disjoint halves: `n` and `skip` shrink
    together. Where every training instance is noisy, held-out instances stand in for clean ones.
    """
    found = {}
    for name, chosen in sets.items():
        here = chosen if _available(chosen, task) else _held_out(chosen)
        most = max(_last(other) for other in sets.values() if _kin(other) == _kin(chosen))
        there = min(most, _available(here, task))
        # In integers: a rounded share could leave two sets of the same instances one apart.
        n = None if here.n is None else max(1, here.n * there // most)
        found[name] = here.block() | {"n": n, "skip": here.skip * there // most if most else 0}
    return found


def _kin(chosen: ExampleSet) -> dict[str, Any]:
    """What two sets share that are drawn from the same instances in the same order."""
    block = chosen.block()
    return {key: block[key] for key in ("split", "noisy", "where", "pair", "seed")}


def _last(chosen: ExampleSet) -> int:
    """How many instances are drawn until the set is complete; 0 for one that takes all."""
    return 0 if chosen.n is None else chosen.skip + chosen.n


def _held_out(chosen: ExampleSet) -> ExampleSet:
    return chosen.model_copy(update={"split": "held_out", "noisy": None})


def _available(chosen: ExampleSet, task: Task) -> int:
    try:
        return len(chosen.model_copy(update={"n": None, "skip": 0}).of(task))
    except InputError:
        return 0


def judged(claim: str, model: str, runs: Path) -> dict[str, Any]:
    """The verdict of a claim on one build of a model, with its effect and its reason.

    Args:
        claim: its id.
        model: name of its training.
        runs: folder of all runs, where the model is built if it is not there yet.
    """
    experiment = experiment_of(claim, model)
    if model in EDITED:  # its tables are not those of the training from which it is made
        with in_place_of_memorised(model):
            finished = run(experiment, runs / model)
    else:
        finished = run(experiment, runs)
    tables = {name: finished.table(name) for name in finished.tables}
    missing = {
        table: {int(seed): reason for seed, reason in reasons.items()}
        for table, reasons in finished.record["missing"].items()
    }
    answer = answer_from(tables, experiment, missing=missing, per="instance")
    found = next(c for c in answer.claims if c["id"].startswith(claim))
    expected = EXPECTED[claim][model]
    letter = LETTERS[found["verdict"]]
    cell = {
        "claim": claim,
        "model": model,
        "expected": expected,
        "found": letter,
        "matches": None if expected == "?" else expected == letter,
        "effect": found["effect"],
        "interval": found["interval"],
        "rule": found["rule"],
        "reason": found["reason"],
    }
    return rounded(cell)


def table(cells: list[dict[str, Any]]) -> str:
    """The matrix in Markdown: one row per model, `expected / found` per claim."""
    by_place = {(cell["model"], cell["claim"]): cell for cell in cells}
    models = list(dict.fromkeys(model for _, model in CELLS))
    lines = [f"| model | {' | '.join(EXPECTED)} |", f"|---|{'---|' * len(EXPECTED)}"]
    for model in models:
        texts = [_text(by_place.get((model, claim)), claim, model) for claim in EXPECTED]
        lines.append(f"| {model} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _text(cell: dict[str, Any] | None, claim: str, model: str) -> str:
    if model not in EXPECTED[claim]:
        return "–"
    if cell is None:
        return f"{EXPECTED[claim][model]} / not run"
    both = f"{cell['expected']} / {cell['found']}"
    return f"**{both}**" if cell["matches"] is False else both
