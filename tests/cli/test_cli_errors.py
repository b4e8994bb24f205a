"""Every mistake a user can make ends in a line that says where it is and what instead, before
anything is trained."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest
from filelock import FileLock

from mechmem.cli import main as cli
from mechmem.training import recipe

SPEC = """\
name: tiny
question: Does it?
training:
  name: small
  task:
    {kind: four_digit_addition, n_train: 40, n_held_out: 10,
     noise: {kind: uniform_wrong, rate: 0.2}}
  architecture: {n_layers: 2, d_model: 8, n_heads: 2}
  optimisation: {n_steps: 2, batch_size: 20, evaluate_every: 2, device: cpu}
checkpoints: {before: initial, after: final}
examples: {noisy: {noisy: true, n: 2}}
analyses:
  - {kind: patch_grid, site: z, layer: {each: all}, source: {checkpoint: before}}
  - {kind: dynamics}
figures:
  - kind: bars
    table: patch_grid
    where: {place: all, prefix: given, measure: accuracy_true}
    x: layer
quantities:
  rest:
    table: patch_grid
    where: {layer: 0, place: all, prefix: given, measure: accuracy_true, condition: intervened}
answer: "{rest.percent}"
"""
RECIPE = "\n".join(line.removeprefix("  ") for line in SPEC.splitlines()[3:9]) + "\n"
Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys) -> Ask:
    """Runs a command line in a folder with tiny.yaml and small.yaml; gives the exit code and what
    stderr says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "SHIPPED", tmp_path / "shipped")
    Path("tiny.yaml").write_text(SPEC)
    Path("small.yaml").write_text(RECIPE)

    def asked(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mechmem", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return asked


def trainings() -> list[Path]:
    return list(Path("runs").glob("trainings/*/seed_*/training.json"))


def test_without_a_mistake_there_is_no_error(ask):
    assert ask("check", "tiny.yaml") == (0, "")
    assert ask("check", "small.yaml") == (0, "")


# What the file says

WRITTEN = [
    (
        "question:",
        "qestion:",
        "tiny.yaml:2:1: qestion: experiment has no key 'qestion'; did you mean 'question'?",
    ),
    ("question: Does it?\n", "", "tiny.yaml:1:1: 'question' is missing"),
    ("question: Does it?", "name: b", 'tiny.yaml:2:1: found duplicate key "name" with value "b"'),
    (
        "{kind: dynamics}",
        "{kind: dynamic}",
        "tiny.yaml:14:6: analyses.1.kind: there is no analysis 'dynamic'; did you",
    ),
    (
        "{kind: dynamics}",
        "{kind: bars}",
        "tiny.yaml:14:6: analyses.1.kind: there is no analysis 'bars'",
    ),
    (
        "{kind: dynamics}",
        "{name: a}",
        "tiny.yaml:14:5: analyses.1: an analysis needs `kind:`; choose",
    ),
    (
        "uniform_wrong",
        "uniform_worng",
        "tiny.yaml:7:14: training.task.noise.kind: there is no noise 'uniform_worng'; did",
    ),
    (
        "rate: 0.2",
        "rate: 20",
        "tiny.yaml:7:35: training.task.noise.rate: Input should be less than or equal to 1",
    ),
    (
        "d_model: 8",
        "d_model: 9",
        "tiny.yaml:8:3: training.architecture: d_model 9 is not a multiple of n_heads 2; change",
    ),
    (
        "n_steps: 2",
        "n_steps: two",
        "tiny.yaml:9:18: training.optimisation.n_steps: Input should be a valid integer",
    ),
    (
        "table: patch_grid\n    where: {place",
        "table: grid\n    where: {place",
        "tiny.yaml:1:1: figures.0 reads the table 'grid'",
    ),
    ("{kind: dynamics}", "[", "tiny.yaml:16:3: expected the node content"),
]


@pytest.mark.parametrize(
    ("old", "new", "line"), WRITTEN, ids=[new or old for old, new, _ in WRITTEN]
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_mistake_in_the_file(command, old, new, line, ask):
    assert SPEC.count(old) == 1
    Path("tiny.yaml").write_text(SPEC.replace(old, new))
    code, said = ask(command, "tiny.yaml")
    assert code == 2
    assert said.startswith(f"mechmem: {line}")
    assert not Path("runs").exists()


def test_all_mistakes_are_told_at_once(ask):
    text = (
        SPEC.replace("d_model", "d_modl")
        .replace("batch_size", "batchsize")
        .replace("site:", "sight:")
    )
    Path("tiny.yaml").write_text(text)
    code, said = ask("run", "tiny.yaml")
    assert code == 2
    lines = said.removeprefix("mechmem: ").splitlines()
    assert [line.split(":")[1] for line in lines] == ["8", "9", "13", "13"]
    assert "'site' is missing" in said


# What is typed after the file

TYPED = [
    ("seeds=[0, 0]", "override 'seeds=[0, 0]': seeds: 0 is listed twice"),
    ("seeds", "override 'seeds' is not of the form key.sub=value"),
    ("seeds=[0", "override 'seeds=[0': the value:1:3: expected ',' or ']'"),
    ("analyses.5.site=z", "override 'analyses.5.site=z': tiny.yaml has nothing at 5"),
    (
        "training.optimisation.nsteps=3",
        "override 'training.optimisation.nsteps=3': training.optimisation.nsteps: optimisation "
        "has no key",
    ),
    (
        "training=smal",
        "override 'training=smal': training: there is no training 'smal'; did you mean 'small'?",
    ),
    (
        "checkpoints.before=generalized",
        "override 'checkpoints.before=generalized': checkpoints.before: there is no phase",
    ),
    (
        "checkpoints.before={step: 1}",
        "tiny.yaml:1:1: checkpoints.before: small keeps no checkpoint of step 1, only every",
    ),
    (
        "training.optimisation.betas=[1, 1]",
        "override 'training.optimisation.betas=[1, 1]': training.optimisation.betas.0: Input",
    ),
    (
        "examples.nosy.n=5",
        "override 'examples.nosy.n=5': examples.nosy: no analysis uses the example set 'nosy'; did",
    ),
    (
        "answer='{rst.percent}'",
        "override \"answer='{rst.percent}'\": answer: the answer template refers to "
        "unknown quantity 'rst'; did you mean 'rest'?",
    ),
    ("answer='{'", "override \"answer='{'\": answer: the answer '{' cannot be filled in"),
    ("plugins=[mine.py]", "plugin mine.py does not exist"),
    (
        "analyses.0.layer={each: [0, up]}",
        "override 'analyses.0.layer={each: [0, up]}': analyses.0.layer.each.1: Input",
    ),
]
# Found by going through the whole run with an untrained model
REHEARSED = [
    ("analyses.0.site=zz", "tiny.yaml:13:5: analyses.0: there is no site 'zz'"),
    (
        "analyses.0.layer=2",
        "tiny.yaml:13:5: analyses.0: layer 2 is out of range: the model has layers 0 to 1",
    ),
    (
        "analyses.0.position=a9",
        "tiny.yaml:13:5: analyses.0: there is no position 'a9'; choose from a3, a2",
    ),
    (
        "analyses.0.head=2",
        "tiny.yaml:13:5: analyses.0: head [2] is out of range: this site has 0 to 1",
    ),
    (
        "analyses.0.neurons=[0]",
        "tiny.yaml:13:5: analyses.0: site 'z' has no neurons to choose from",
    ),
    (
        "analyses.0.neurons={each: all}",
        "tiny.yaml:13:5: analyses.0: `neurons: {each: all}` is not defined for this field",
    ),
    (
        "analyses.0.examples=nosy",
        "tiny.yaml:13:5: analyses.0: there is no example set 'nosy'; did you mean 'noisy'?",
    ),
    (
        "analyses.0.model=aftr",
        "tiny.yaml:13:5: analyses.0: there is no checkpoint 'aftr'; did you mean 'after'?",
    ),
    (
        "analyses.0.source.checkpoint=befor",
        "tiny.yaml:13:5: analyses.0: there is no checkpoint 'befor'; did you mean",
    ),
    (
        "analyses.0.source={pair: true, checkpoint: before}",
        "tiny.yaml:13:5: analyses.0: `pair: true` needs an example set that was made with",
    ),
    (
        "analyses.0.control=random_neurons",
        "tiny.yaml:13:5: analyses.0: the control random_neurons only matches",
    ),
    (
        "figures.0.x=lair",
        "tiny.yaml:16:5: figures.0: table patch_grid has no column 'lair'; did you mean 'layer'?",
    ),
    (
        "figures.0.where.place=s9",
        "tiny.yaml:16:5: figures.0: table patch_grid, where {'place': 's9',",
    ),
    ("quantities.rest.where={layer: 0}", "tiny.yaml:21:3: quantities.rest: "),
    (
        "quantities.rest.where.laier=0",
        "tiny.yaml:21:3: quantities.rest: the table has no column 'laier'; did you mean 'layer'?",
    ),
    ("answer='{rest.percnt}'", "rest has no 'percnt'; did you mean 'percent'?"),
    (
        "examples.noisy.split=trian",
        "four_digit_addition has no split 'trian'; did you mean 'train'?",
    ),
    ("examples.noisy.split=held_out", "split 'held_out' has no noisy example"),
    (
        "examples.noisy.pair={flip: cary_1}",
        "four_digit_addition has no variable 'cary_1'; did you mean 'carry_1'?",
    ),
    (
        "training.task.noise={kind: permuted, rate: 0.02}",
        "permuted noise cannot give 1 instances each other's labels",
    ),
]


# Names of version 0.1
RETIRED = [
    ("training.training.n_steps=3", "training.training: ", "'training' is now 'optimisation'"),
    ("analyses.0.decode=false", "analyses.0.decode: ", "'decode' is now 'greedy'"),
    ("analyses.0.n_control_decode=1", "", "'n_control_decode' is now 'n_control_greedy'"),
    ("analyses.0.measures=[neither]", "", "'neither' is now 'off_label_rate'"),
    ("analyses.1.kind=twin", "analyses.1.kind: ", "'twin' is now 'cross_model_swap'"),
    ("analyses.1={kind: distributed}", "", "'distributed' is now 'token_replacement'"),
    ("figures.0.where.condition=patched", "figures.0: ", "'patched' is now 'intervened'"),
    ("figures.0.where.condition=[baseline, unpatched]", "", "'unpatched' is now 'baseline'"),
    ("figures.0.where.prefix=decode", "figures.0: ", "'decode' is now 'greedy'"),
    ("figures.0.where.measure=neither", "figures.0: ", "'neither' is now 'off_label_rate'"),
    ("quantities.rest.where.condition=patched", "", "'patched' is now 'intervened'"),
    ("quantities.rest.where.prefix=decode", "quantities.rest: ", "'decode' is now 'greedy'"),
    ("quantities.rest.minus={condition: unpatched}", "", "'unpatched' is now 'baseline'"),
    ("quantities.rest.where.decode=1", "", "the table has no column 'decode'"),
]


@pytest.mark.parametrize(("override", "path", "line"), RETIRED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_retired_name_is_answered_with_the_new_one(command, override, path, line, ask):
    code, said = ask(command, "tiny.yaml", override)
    assert code == 2
    assert said.count("\n") == 1
    assert path in said
    assert line in said
    assert not trainings()


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (("--device", "gpu"), "override 'device=gpu': device: Input should be"),
        (("--memory", "lots"), "override 'memory=lots': memory: 'lots' is not a size; write"),
        (("--backend", "slow"), "override 'backend=slow': backend: Input should be"),
    ],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_mistake_in_an_option(command, option, line, ask):
    code, said = ask(command, "tiny.yaml", *option)
    assert (code, said[: len("mechmem: " + line)]) == (2, f"mechmem: {line}")


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_device_that_is_not_there(command, ask, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", bool)
    code, said = ask(command, "tiny.yaml", "--device", "cuda")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("mechmem: device 'cuda' is not available on this machine")
    assert not trainings()


def test_options_of_experiments_are_refused_for_trainings(ask):
    assert ask("check", "small.yaml", "--memory", "1GiB") == (
        2,
        "mechmem: --memory is for experiments, this is a training\n",
    )


@pytest.mark.parametrize(
    ("override", "line"), TYPED + REHEARSED, ids=[override for override, _ in TYPED + REHEARSED]
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_mistake_in_an_override(command, override, line, ask):
    code, said = ask(command, "tiny.yaml", override)
    assert (code, said[: len("mechmem: " + line)]) == (2, f"mechmem: {line}")
    assert not trainings()


def test_a_member_of_a_sweep_that_cannot_be_is_named(ask):
    code, said = ask("check", "tiny.yaml", "training.architecture.d_model={each: [8, 9]}")
    assert (code, said) == (
        2,
        "mechmem: with d_model 9: architecture: d_model 9 is not a multiple of n_heads 2; "
        "change one of them, or give d_head\n",
    )


# Trainings


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("train", "smal.yaml"), "smal.yaml does not exist; did you mean small.yaml?"),
        (("train", "tiny.yaml"), "tiny.yaml:1:1: 'task' is missing"),
        (
            ("train", "small.yaml", "task.n_train=0"),
            "override 'task.n_train=0': task.n_train: Input should be greater",
        ),
        (
            ("check", "small.yaml", "task.kind=three_hop"),
            "override 'task.kind=three_hop': task.kind: there is no task",
        ),
        (("run", "small.yaml"), "small.yaml:1:1: 'question' is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_in_a_training(arguments, line, ask):
    code, said = ask(*arguments)
    assert code == 2
    assert any(part.startswith(line) for part in said.removeprefix("mechmem: ").splitlines())
    assert not trainings()


# What the machine does


def test_a_training_that_diverges_fails(ask):
    code, said = ask(
        "train", "small.yaml", "optimisation.learning_rate=1e30", "optimisation.n_warmup_steps=0"
    )
    assert code == 1
    assert (
        said.splitlines()[-1]
        == "mechmem: training diverged before step 2: a weight is not finite; lower learning_rate"
    )
    assert not trainings()


def test_a_training_that_another_process_is_at_is_waited_for(ask):
    assert ask("train", "small.yaml")[0] == 0
    folder = trainings()[0].parent
    (folder / "training.json").unlink()
    is_held = Event()

    def hold() -> None:
        with FileLock(folder / ".lock"):
            is_held.set()
            time.sleep(0.5)

    other = Thread(target=hold)
    other.start()
    is_held.wait()
    code, said = ask("train", "small.yaml")
    other.join()
    assert (code, trainings()) == (0, [folder / "training.json"])
    assert f"another process is training in {folder}; waiting for it" in said


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("checkpoints/step_000002.safetensors", damage) for damage in ("cut", "flipped", "gone")),
        *(("training.json", damage) for damage in ("cut", "flipped")),
    ],
)
def test_a_damaged_file_is_named_with_a_remedy_that_works(file, damage, ask):
    assert ask("train", "small.yaml")[0] == 0
    path = trainings()[0].parent / file
    content = path.read_bytes()
    path.write_bytes(content[:100] if damage == "cut" else flipped(content))
    if damage == "gone":
        path.unlink()
    for command in (("run", "tiny.yaml"), ("show", "small")):
        code, said = ask(*command)
        last = said.splitlines()[-1]
        assert code == 1
        assert last.startswith(f"mechmem: {path} ")
    remedy = shlex.split(last.split("`")[1])
    assert remedy[:2] == ["mechmem", "train"]
    assert ask(*remedy[1:])[0] == 0
    if file != "training.json":  # which holds times
        assert path.read_bytes() == content
    assert ask("run", "tiny.yaml")[0] == 0
    assert ask("show", "small")[0] == 0


def flipped(content: bytes) -> bytes:
    """The content with one bit of its middle flipped."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
