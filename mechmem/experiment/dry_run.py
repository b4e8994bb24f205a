"""Dry runs: everything a run does, on untrained models and a few examples, so that a spec that
cannot run is refused before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mechmem.data.examples import Examples
from mechmem.experiment.answer import answer_from, labelled, one_below_the_other
from mechmem.experiment.machine import session_options
from mechmem.experiment.planning import Plan
from mechmem.experiment.spec import Experiment
from mechmem.session import Session
from mechmem.spec.errors import BlockError, InputError
from mechmem.training.recipe import PHASES, Recipe

if TYPE_CHECKING:
    import pandas as pd

N_EXAMPLES = 4
"""Examples that stand for a whole set."""


def dry_run(experiment: Experiment, say: Callable[[str], None] = lambda _: None) -> dict[str, int]:
    """Run everything on untrained models and four examples of each set.

    Args:
        experiment: what to try.
        say: is called with what is being tried.

    Returns:
        By the name of a table, the examples that the analysis sends through the models of one
        seed in the real run.

    Raises:
        InputError: whatever the real run would refuse.
    """
    return rehearse(experiment, say)[0]


def rehearse(
    experiment: Experiment, say: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, int], Plan]:
    """`dry_run`, with what it knows of the rules.

    Args:
        experiment: what to try.
        say: is called with what is being tried.
    """
    costs = {analysis.table_name: 0 for analysis in experiment.analyses}
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in costs}
    for labels, recipe in experiment.recipes():
        for name, (table, cost) in _of_one_training(experiment, recipe, say).items():
            costs[name] += cost
            for seed in experiment.seeds:
                tables[name].append(labelled(table.copy(), labels | {"seed": seed}))
    whole = one_below_the_other(tables)
    plan = Plan(experiment, answer_from(whole, experiment).quantities, _sizes(experiment))
    plan.check_rules()
    for i, figure in enumerate(experiment.figures):
        try:
            figure.draw(whole[figure.table])
        except InputError as error:
            raise BlockError(("figures", i), str(error)) from error
    return costs, plan


def _sizes(experiment: Experiment) -> dict[str, int]:
    """By the name of an example set, its number of examples; the smallest over the trainings."""
    sizes: dict[str, int] = {}
    for _, recipe in experiment.recipes():
        for name, chosen in experiment.examples.items():
            n = len(chosen.of(recipe.task))
            sizes[name] = min(n, sizes.get(name, n))
    return sizes


def _of_one_training(
    experiment: Experiment, recipe: Recipe, say: Callable[[str], None]
) -> dict[str, tuple[pd.DataFrame, int]]:
    """By name, the table of every analysis and its cost in the real run, for one training."""
    session = _session(experiment, recipe, say)
    found = {}
    for i, analysis in enumerate(experiment.analyses):
        before = session.n_forwarded
        try:
            with session.steady():  # nothing changes the models of a dry run
                table = analysis.run(session, experiment.sweep_domain(recipe))
        except InputError as error:
            raise BlockError(("analyses", i), str(error)) from error
        found[analysis.table_name] = (table, round(session.n_forwarded - before))
    return found


class DryRun(Session):
    """A session whose models are untrained and whose sets are small: what depends on their values
    is not demanded, and what is run is counted as if the sets were whole.

    Args:
        sizes: number of examples of each whole set, by its name.
        options: as of a Session.
    """

    def __init__(self, sizes: Mapping[str, int], **options: Any) -> None:
        super().__init__(**options)
        self._sizes = sizes

    def demand(self, is_met: bool, message: str) -> None:
        """Lets everything pass: nothing can be said of the values of an untrained model."""

    def few(self, n: int, most: int) -> int:
        return min(n, most)

    def count(self, examples: Examples, times: int = 1) -> None:
        found = self.example_sets.get(examples.name)
        scale = 1.0 if found is None else self._sizes[examples.name] / max(len(found), 1)
        self.n_forwarded += times * len(examples) * scale


def _session(experiment: Experiment, recipe: Recipe, say: Callable[[str], None]) -> DryRun:
    task = recipe.task
    whole = {name: chosen.of(task).with_name(name) for name, chosen in experiment.examples.items()}
    few = {name: examples.select(slice(N_EXAMPLES)).as_set() for name, examples in whole.items()}
    models = {
        name: (ref.training or recipe).build(0) for name, ref in experiment.checkpoints.items()
    }
    for model in models.values():
        model.requires_grad_(False)  # as those of checkpoints are
    curve = {"step": 0, "clean": 0.0, "memorised": 0.0, "corrected": 0.0, "held_out": 0.0}
    return DryRun(
        {name: len(examples) for name, examples in whole.items()},
        models=models,
        example_sets=few,
        curves=[curve],
        phases=dict.fromkeys(PHASES, 0),
        chance=task.chance,
        rule=task.answers,
        say=say,
        **session_options(experiment),
    )
