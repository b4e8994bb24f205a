"""Fixtures that several test files share: tiny tasks, models with random weights, and one finished
tiny training."""

from __future__ import annotations

import os

import shapes  # noqa: F401 it must come before the package

os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from mechmem.data.examples import Examples
from mechmem.data.label_noise import UniformWrong
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.experiment.results import Run
from mechmem.experiment.run import run
from mechmem.experiment.spec import Experiment
from mechmem.models.architecture import Architecture, Model
from mechmem.session import Session
from mechmem.training.loop import train
from mechmem.training.recipe import Optimisation, Phase, Recipe
from mechmem.training.store import Trained, own_folder

Build = Callable[..., Model]
Spec = Callable[..., dict[str, Any]]

TINY = Architecture(n_layers=2, d_model=16, n_heads=2, d_mlp=24)
RECIPE = Recipe(
    name="tiny",
    task=FourDigitAddition(n_train=120, n_held_out=40, noise=UniformWrong(rate=0.25)),
    architecture=TINY,
    optimisation=Optimisation(
        n_steps=20,
        batch_size=40,
        evaluate_every=5,
        n_warmup_steps=5,
        n_evaluated=40,
        generalised=Phase(held_out=0.9),
        memorised=Phase(memorised_at_most=1.0),
        device="cpu",
    ),
)


def small_spec(**fields: Any) -> dict[str, Any]:
    """A small experiment on the tiny training; `fields` replace what it says."""
    grid = {
        "kind": "patch_grid",
        "examples": "noisy",
        "site": {"each": ["neurons", "attn_out"]},
        "layer": {"each": "all"},
        "source": {"checkpoint": "before"},
        "measures": ["accuracy_true", "logit_difference"],
        "control": {"kind": "random_direction", "n": 2},
    }
    returned = {
        "condition": "intervened",
        "prefix": "given",
        "place": "all",
        "measure": "logit_difference",
        "site": "neurons",
    }
    return {
        "name": "small",
        "question": "Does anything come back?",
        "training": RECIPE.block(),
        "checkpoints": {"before": {"step": 5}, "after": "final"},
        "examples": {"noisy": {"noisy": True, "n": 8}, "clean": {"noisy": False, "n": 8}},
        "analyses": [{"kind": "dynamics"}, grid, {"kind": "neuron_shift"}],
        "figures": [{"kind": "curves", "table": "dynamics", "title": "Curves"}],
        "quantities": {"returned": {"table": "patch_grid", "where": returned, "pick": "largest"}},
        "claims": [
            {
                "id": "C7",
                "says": "it returns",
                "holds_when": [{"quantity": "returned", "at_least": 0}],
            }
        ],
        "answer": "Layer {returned.layer} returns {returned.number}.",
    } | fields


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-docs", action="store_true", help="write what pages quote of the docstrings anew"
    )
    parser.addoption(
        "--whole-matrix", action="store_true", help="judge every cell of the known answers"
    )


def pytest_configure() -> None:
    torch.set_num_threads(1)
    settings.register_profile(
        "same every time", derandomize=True, deadline=None, database=None, max_examples=50
    )
    settings.load_profile("same every time")


def random_model(architecture: Architecture, task: FourDigitAddition, seed: int) -> Model:
    """A model in which no parameter has a neutral value: biases and norm weights are random too."""
    model = architecture.build(len(task.vocabulary), task.n_context, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                1 + 0.3 * noise if name.endswith(".w") else noise * (0.25 if ".W_" in name else 0.3)
            )
    return model


@pytest.fixture(scope="session")
def task() -> FourDigitAddition:
    return RECIPE.task


@pytest.fixture(scope="session")
def examples(task: FourDigitAddition) -> Examples:
    """Seven noisy and five clean instances of the training set."""
    train = task.sample("train")
    rows = torch.cat([train.is_noisy.nonzero()[:7, 0], (~train.is_noisy).nonzero()[:5, 0]])
    return train.select(rows).as_set()


@pytest.fixture(scope="session")
def others(task: FourDigitAddition) -> Examples:
    """Twelve other instances."""
    return task.sample("held_out").select(torch.arange(12)).as_set()


@pytest.fixture(scope="session")
def random_models(task: FourDigitAddition) -> Build:
    """A maker of models with random weights: (seed, **fields of the architecture)."""
    return lambda seed=0, **fields: random_model(
        Architecture(**(TINY.model_dump() | fields)), task, seed
    )


@pytest.fixture(scope="session")
def model(random_models: Build) -> Model:
    return random_models(0)


@pytest.fixture(scope="session")
def other_model(random_models: Build) -> Model:
    return random_models(1)


@pytest.fixture
def session(model: Model, other_model: Model, examples: Examples, others: Examples) -> Session:
    """`after` and `before` are two random models, `noisy` and `clean` two sets of examples."""
    return Session(
        models={"after": model, "before": other_model},
        example_sets={"noisy": examples, "clean": others},
    )


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return RECIPE


@pytest.fixture(scope="session")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The tiny recipe, trained for its 20 steps. Do not write into its folder."""
    return train(recipe, 0, tmp_path_factory.mktemp("trained") / "seed_0")


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Processes that start in milliseconds: their server has imported mechmem once and has never
    run a model."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mechmem.experiment.run", "transformer_lens"])
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


@pytest.fixture(scope="session")
def spec() -> Spec:
    """A maker of the block of a small experiment on the tiny training: (**keys to replace)."""
    return small_spec


@pytest.fixture(scope="session")
def experiment() -> Experiment:
    return Experiment.model_validate(small_spec())


@pytest.fixture(scope="session")
def made(experiment: Experiment, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The small experiment, run once. Do not write into its folder."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    shutil.copytree(trained.folder, own_folder(RECIPE, 0, runs))
    return run(experiment, runs)


@pytest.fixture
def runs(made: Run, tmp_path: Path) -> Path:
    """A copy of the runs folder in which the small experiment was run."""
    return shutil.copytree(made.folder.parent, tmp_path / "runs")
