"""The command line. Results go to stdout, progress and errors to stderr; exit codes: 0 done, 1
failed, 2 your input."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mechanistic interpretability of memorisation: train, intervene, report.",
)
Spec = Annotated[
    Path,
    typer.Argument(
        help="an experiment, such as experiments/fda_patching.yaml, or a folder with study.yaml",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.sub=value, replacing the value in the file")
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or mps: where analyses run")
]
Memory = Annotated[
    str | None, typer.Option("--memory", help="memory for activations, such as 2GiB or 512MiB")
]
Backend = Annotated[
    str | None, typer.Option("--backend", help="auto, hooked or fast: how models are run")
]
Runs = Annotated[Path, typer.Option("--runs", help="folder of runs and trainings")]
Trust = Annotated[
    bool,
    typer.Option("--trust-plugins", help="execute the plug-ins that came with a run's folder"),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]
Seed = Annotated[int, typer.Option("--seed", help="seed of the model", min=0)]
HERE = Path("runs")
INTERRUPTED = "interrupted; rerun the same command to resume"


def main() -> None:
    """The console script: run a command; an error becomes one clear line and an exit code."""
    # Otherwise threads that wait would spin, and slow down everything else on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        _fail(*_explained(error))
    if code == 130:  # what newer versions of typer return for an interruption
        _fail(INTERRUPTED, 1)
    if code:
        sys.exit(code)


def _explained(error: Exception) -> tuple[str, int]:
    # ClickException of the click that this typer uses: some versions bring their own.
    usage: Any = typer.BadParameter.__mro__[2]
    if isinstance(error, usage):
        return error.format_message(), 2
    if isinstance(error, typer.Abort):
        return INTERRUPTED, 1
    from mechmem.spec.errors import InputError
    from mechmem.spec.files import FileError

    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, (FileError, OSError, MemoryError, ArithmeticError)):
        return str(error) or "out of memory", 1
    raise error


def _fail(message: str, code: int) -> NoReturn:
    from mechmem.progress import printable

    lines = [line if len(line) <= 600 else f"{line[:580]} ..." for line in message.split("\n")]
    message = printable("\n".join(lines))
    if message:  # empty if `mechmem` alone has shown the help
        sys.stderr.write(
            f"mechmem: {message}\n" if not message.startswith("Usage") else message + "\n"
        )
    sys.exit(code)


@app.command()
def run(
    spec: Spec,
    overrides: Overrides = None,
    runs: Runs = HERE,
    device: Device = None,
    memory: Memory = None,
    backend: Backend = None,
    trust_plugins: Trust = False,
    as_json: Json = False,
) -> None:
    """Answer an experiment's question, or run every experiment of a study's folder. A second run
    reuses everything that is unchanged."""
    if spec.is_dir():
        options = _options(device=device, memory=memory, backend=backend)
        _run_study(spec, overrides, options, runs, as_json)
        return
    from mechmem.cli import summaries
    from mechmem.experiment import run as engine
    from mechmem.progress import showing_progress

    options = _options(device=device, memory=memory, backend=backend)
    experiment, file = _experiment(spec, [*(overrides or ()), *options], trust_plugins)
    with showing_progress() as progress, _placed(file):
        finished = engine.run(experiment, runs, progress)
    _tell(summaries.run_text, summaries.run_numbers, finished, as_json)


@app.command()
def check(
    spec: Spec,
    overrides: Overrides = None,
    runs: Runs = HERE,
    device: Device = None,
    memory: Memory = None,
    backend: Backend = None,
    trust_plugins: Trust = False,
    as_json: Json = False,
) -> None:
    """Validate an experiment, a study's folder or a training, including sites and shapes, and
    estimate its cost. Nothing is trained or computed."""
    if spec.is_dir():
        options = _options(device=device, memory=memory, backend=backend)
        _check_study(spec, overrides, options, runs, as_json)
    elif _is_training(spec):
        _refuse_for_trainings(device=device, memory=memory, backend=backend)
        _check_training(spec, overrides, as_json)
    else:
        options = _options(device=device, memory=memory, backend=backend)
        found = _experiment(spec, [*(overrides or ()), *options], trust_plugins)
        _check_experiment(spec, *found, runs, as_json)


def _check_training(spec: Path, overrides: list[str] | None, as_json: bool) -> None:
    import pandas as pd

    from mechmem.experiment.cost import cost_of_training

    recipe = _recipe(spec, overrides)
    costs = [labels | cost_of_training(cell) for labels, cell in recipe.expand({})]
    if len(costs) == 1:
        _output({"training": recipe.name, **costs[0]}, as_json)
    elif as_json:
        _output({"training": recipe.name, "cells": costs}, True)
    else:
        table = pd.DataFrame(costs).to_string(index=False)
        _echo(f"{spec} is valid: {len(costs)} trainings\n{table}")


def _check_experiment(spec: Path, experiment: Any, file: Any, runs: Path, as_json: bool) -> None:
    """Check an experiment and print its cost.

    Args:
        spec: its file, as the user named it.
        experiment: the Experiment.
        file: the SpecFile, which knows the places of errors.
        runs: folder of the trainings that were made before.
        as_json: print JSON.
    """
    from mechmem.experiment.cost import fetch_or_train, seconds_per_example, training_costs
    from mechmem.experiment.dry_run import rehearse
    from mechmem.experiment.results import spreads_of_last_run
    from mechmem.experiment.run import missing_trainings
    from mechmem.progress import showing_progress

    with showing_progress(bars_only=True) as progress, _placed(file):
        costs, plan = rehearse(experiment, progress.say)
    effects = plan.smallest_effects(spreads_of_last_run(experiment.name, runs))
    seconds = seconds_per_example(experiment.training)
    n = len(experiment.seeds)
    analyses = [
        {"analysis": a, "examples_forwarded": n * c, "seconds": round(n * c * seconds, 1)}
        for a, c in costs.items()
    ]
    missing = missing_trainings(experiment, runs)
    trainings = training_costs(missing)
    if as_json:
        _output(
            {"valid": True, "analyses": analyses, "trainings": trainings, "effects": effects}, True
        )
    else:
        _echo(
            f"{spec} is valid: {_counted(len(costs), 'analysis', 'analyses')}, "
            f"{_counted(n, 'seed', 'seeds')}"
        )
        _print_costs(analyses, trainings)
        for line in fetch_or_train(missing.values()):
            _echo(line)
        _print_effects(effects)


def _print_effects(effects: list[dict[str, Any]]) -> None:
    """What the planned seeds can establish, a line for each condition and seed spread."""
    import pandas as pd

    if effects:
        _echo("smallest distance from the threshold that these seeds can establish:")
        _echo(pd.DataFrame(effects).to_string(index=False, na_rep="-"))


def _print_costs(analyses: list[dict[str, Any]], trainings: list[dict[str, Any]]) -> None:
    import pandas as pd

    _echo(pd.DataFrame(analyses).to_string(index=False))
    if trainings:
        whole = sum(training["minutes"] for training in trainings)
        models = _counted(len(trainings), "model", "models")
        _echo(f"{models} must be trained first (about {whole:.0f} min)")
        _echo(pd.DataFrame(trainings).to_string(index=False))


def _counted(n: int, one: str, several: str) -> str:
    return f"{n} {one if n == 1 else several}"


@app.command()
def train(
    spec: Spec,
    overrides: Overrides = None,
    seed: Seed = 0,
    runs: Runs = HERE,
    as_json: Json = False,
) -> None:
    """Train a recipe, or every member of a sweep. An interrupted training is resumed, a damaged one
    is made again."""
    from mechmem.cli import summaries
    from mechmem.progress import showing_progress
    from mechmem.spec.folders import remove_leftovers
    from mechmem.training.loop import remove_if_damaged
    from mechmem.training.loop import train as train_recipe
    from mechmem.training.store import own_folder

    remove_leftovers(runs)
    made = []
    for labels, recipe in _recipe(spec, overrides).expand({}):
        name = " ".join([recipe.name, *(f"{key} {value}" for key, value in labels.items())])
        with showing_progress() as progress:
            folder = own_folder(recipe, seed, runs)
            remove_if_damaged(folder, progress.note)
            made.append(
                train_recipe(
                    recipe,
                    seed,
                    folder,
                    lambda *event, name=name: progress.train(name, *event),
                    runs,
                    progress.note,
                )
            )
        if not as_json:
            _echo(summaries.training_text(made[-1]))
    if as_json:
        found = [summaries.training_numbers(trained) for trained in made]
        _json(found if len(found) > 1 else found[0])


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="a shipped training, such as fda_small")],
    seeds: Annotated[str, typer.Option("--seeds", help="such as 1-5 or 1,3")],
    source: Annotated[
        str, typer.Option("--from", help="a clone's mechmem/shipped, or the address of one")
    ],
    runs: Runs = HERE,
    as_json: Json = False,
) -> None:
    """Get the other seeds of a shipped training; every file is verified. An interrupted fetch is
    resumed."""
    from mechmem.progress import showing_progress
    from mechmem.training.fetch import fetch as fetch_seeds
    from mechmem.training.fetch import seeds_of

    with showing_progress() as progress:
        folders = fetch_seeds(name, seeds_of(seeds), source, runs, progress.part)
    _output({"training": name, "folders": [str(path) for path in folders]}, as_json)


@app.command("list")
def list_(runs: Runs = HERE, as_json: Json = False) -> None:
    """List experiments, trainings, runs and all registered component types."""
    from mechmem.experiment.results import all_runs
    from mechmem.training import store as checkpoints

    registries = _registries()
    found = {
        "experiments": sorted(str(path) for path in Path("experiments").glob("*.yaml")),
        "trainings": checkpoints.names(runs),
        "runs": [path.name for path in all_runs(runs)],
        "kinds": {registry: list(members) for registry, members in registries.items()},
    }
    if as_json:
        _output(found, True)
        return
    for name in ("experiments", "trainings", "runs"):
        _echo(f"{name}\n  " + ("\n  ".join(found[name]) or "none"))
    for registry, members in registries.items():
        _echo(f"{registry} kinds")
        for kind, member in members.items():
            _echo(f"  {kind:<22} {(member.__doc__ or '').strip().splitlines()[0]}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a kind, a training or a run")],
    seed: Seed = 0,
    runs: Runs = HERE,
    as_json: Json = False,
) -> None:
    """Show the documentation of a kind, the curves of a training, or the answer of a run."""
    from mechmem.cli import summaries
    from mechmem.experiment.results import all_runs, load_run
    from mechmem.spec.errors import InputError, suggest
    from mechmem.training import store as checkpoints

    kinds = {kind: member for members in _registries().values() for kind, member in members.items()}
    found = [
        path for path in all_runs(runs) if path.name == name or path.name.rsplit("-", 1)[0] == name
    ]
    if name in kinds:
        _tell(summaries.kind_text, summaries.kind_numbers, kinds[name], as_json)
    elif name in checkpoints.names(runs):
        _tell(
            summaries.training_text,
            summaries.training_numbers,
            checkpoints.find(name, seed, runs),
            as_json,
        )
    elif found or (Path(name) / "run.json").exists():
        finished = load_run(found[0] if found else Path(name))
        _tell(summaries.run_text, summaries.run_numbers, finished, as_json)
    else:
        known = [*kinds, *checkpoints.names(runs), *_run_names(all_runs(runs))]
        raise InputError(f"there is no kind, training or run {name!r}; {suggest(name, known)}")


@app.command()
def draw(
    name: Annotated[str, typer.Argument(help="a run, by name or folder")],
    runs: Runs = HERE,
    trust_plugins: Trust = False,
    as_json: Json = False,
) -> None:
    """Regenerate a run's figures and report from its saved tables."""
    from mechmem.experiment import results
    from mechmem.spec.errors import InputError, suggest
    from mechmem.spec.folders import remove_leftovers

    folders = results.all_runs(runs)
    found = [path for path in folders if name in (path.name, path.name.rsplit("-", 1)[0])]
    if not found and not (Path(name) / "run.json").exists():
        raise InputError(f"there is no run {name!r}; {suggest(name, _run_names(folders))}")
    finished = results.load_run(found[0] if found else Path(name), trust_plugins)
    remove_leftovers(finished.folder)
    results.draw(finished)
    if as_json:
        _output(finished.summary(), True)
        return
    _echo(str(finished.report))


@app.command()
def shell(
    training: Annotated[str, typer.Argument(help="a training, such as fda_small")],
    seed: Seed = 0,
    runs: Runs = HERE,
) -> None:
    """Start an interactive Python session with a trained model and its examples."""
    import code

    import mechmem
    from mechmem.models import sites
    from mechmem.training import store as checkpoints

    trained = checkpoints.find(training, seed, runs)
    model, task = trained.at(trained.steps[-1]), trained.task
    names: dict[str, Any] = {
        "mm": mechmem,
        "trained": trained,
        "model": model,
        "task": task,
        "examples": task.sample("train"),
    }
    names |= {"held_out": task.sample("held_out"), "sites": sites.table(model.cfg)}
    banner = f"{trained!r}\n" + "".join(
        f"  {name:<9} {type(value).__name__}\n" for name, value in names.items()
    )
    code.interact(
        banner + "  logits, cache = model.run_with_cache(examples.tokens[:8])",
        local=names,
        exitmsg="",
    )


@app.command()
def schema() -> None:
    """Print the JSON schema of experiments, for editors that complete and check YAML."""
    from mechmem.experiment.spec import Experiment
    from mechmem.spec.json_schema import json_schema

    _output(json_schema(Experiment), True)


@app.command(hidden=True)
def ship(training: str, steps: list[int], seed: Seed = 0, runs: Runs = HERE) -> None:
    """For maintainers: copy a training that was made here into the package, and index it."""
    from mechmem.spec.errors import InputError, suggest
    from mechmem.training import store as checkpoints
    from mechmem.training.index import write_index

    made = checkpoints.made_here(training, seed, runs)
    if not made:
        found = suggest(training, checkpoints.names(runs))
        raise InputError(f"no training {training!r} of seed {seed} was made in {runs}; {found}")
    target = checkpoints.SHIPPED / training / f"seed_{seed}"
    checkpoints.ship(checkpoints.Trained(made[-1]), steps, target)
    write_index(checkpoints.SHIPPED)
    _echo(str(target))


@app.command(hidden=True)
def index() -> None:
    """For maintainers: write the checksums of all shipped files again."""
    from mechmem.training import store as checkpoints
    from mechmem.training.index import write_index

    _echo(str(write_index(checkpoints.SHIPPED)))


def _run_names(folders: list[Path]) -> list[str]:
    return list(dict.fromkeys(path.name.rsplit("-", 1)[0] for path in folders))


def _experiment(spec: Path, changes: list[str], trust_plugins: bool) -> tuple[Any, Any]:
    """The experiment of a file, and the file.

    Args:
        spec: the file.
        changes: `key.sub=value`, in the order in which they apply.
        trust_plugins: whether to execute plug-ins that came with a run's folder.
    """
    from mechmem.experiment.results import RECORD, untrusted
    from mechmem.experiment.spec import Experiment
    from mechmem.spec.errors import InputError
    from mechmem.spec.yaml_file import SpecFile

    def announce(plugins: Sequence[str]) -> None:
        if (spec.parent / RECORD).exists() and not trust_plugins:
            raise InputError(untrusted(spec, plugins))
        _announce(spec, plugins)

    return Experiment.from_yaml(spec, changes, announce), SpecFile(spec, changes)


def _announce(spec: Path, plugins: Sequence[str]) -> None:
    """Say which code a spec brings, before it is executed."""
    from mechmem.progress import printable

    typer.echo(printable(f"{spec} executes its plug-ins: {', '.join(plugins)}"), err=True)


def _options(**values: str | None) -> list[str]:
    """The options that were given, as overrides."""
    return [f"{name}={value}" for name, value in values.items() if value is not None]


def _run_study(
    folder: Path, overrides: list[str] | None, options: list[str], runs: Path, as_json: bool
) -> None:
    from mechmem.cli import study

    found = study.run(folder, overrides or (), options, runs)
    _tell(study.run_text, study.run_numbers, found, as_json)
    _fail_for(list(found.failed), len(found.failed) + len(found.runs))


def _check_study(
    folder: Path, overrides: list[str] | None, options: list[str], runs: Path, as_json: bool
) -> None:
    from mechmem.cli import study

    found = study.check(folder, overrides or (), options, runs)
    _tell(lambda found: study.check_text(folder, found), dict, found, as_json)
    _fail_for(list(found["failed"]), len(found["failed"]) + len(found["specs"]))


def _fail_for(failed: list[str], n: int) -> None:
    """End with an exit code if specs of a study failed.

    Args:
        failed: the names of these specs.
        n: number of all specs.
    """
    from mechmem.cli.study import failure

    if failed:
        _fail(failure(failed, n), 1)


def _refuse_for_trainings(**options: str | None) -> None:
    from mechmem.spec.errors import InputError

    for name, value in options.items():
        if value is not None:
            hint = "; write `optimisation.device=...`" if name == "device" else ""
            raise InputError(f"--{name} is for experiments, this is a training{hint}")


def _recipe(spec: Path, overrides: list[str] | None) -> Any:
    from mechmem.spec.yaml_file import SpecFile
    from mechmem.training.recipe import Recipe

    return SpecFile(spec, overrides or ()).build(Recipe)


def _is_training(spec: Path) -> bool:
    from mechmem.spec.yaml_file import SpecFile
    from mechmem.training.recipe import is_training

    return is_training(SpecFile(spec))


def _placed(file: Any) -> Any:
    """A context that gives the errors of an analysis their place in the file."""
    from contextlib import contextmanager

    from mechmem.spec.errors import BlockError
    from mechmem.spec.yaml_file import SpecError

    @contextmanager
    def placing() -> Any:
        try:
            yield
        except BlockError as error:
            raise SpecError(file.message(error.loc, error.text)) from error

    return placing()


def _registries() -> dict[str, dict[str, Any]]:
    import mechmem.experiment.spec  # noqa: F401  imports the base class of every registry
    from mechmem.spec.registry import Component, load_all

    load_all()
    return {
        registry: dict(sorted(members.items()))
        for registry, members in Component.registries.items()
    }


def _tell(
    text: Callable[[Any], str], numbers: Callable[[Any], Any], of: Any, as_json: bool
) -> None:
    if as_json:
        _json(numbers(of))
    else:
        _echo(text(of))


def _output(value: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        _json(value)
    else:
        _echo("\n".join(f"{key}: {part}" for key, part in value.items()))


def _json(value: Any) -> None:
    _echo(json.dumps(_defined(value), indent=2, default=str))


def _defined(value: Any) -> Any:
    """The value with null for undefined numbers, as JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _defined(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defined(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _echo(text: str) -> None:
    from mechmem.progress import printable

    typer.echo(printable(text))
