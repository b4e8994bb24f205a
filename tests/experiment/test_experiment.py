from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mechmem.analyses.dynamics import Dynamics
from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.analyses.neurons.neuron_shift import NeuronShift
from mechmem.data.example_set import ExampleSet
from mechmem.data.examples import Examples
from mechmem.data.label_noise import Digit, LabelNoise
from mechmem.data.minimal_pair import MinimalPair
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.experiment.claims import Claim, Condition
from mechmem.experiment.machine import conditions, device_of, session_options
from mechmem.experiment.quantities import Quantity
from mechmem.experiment.spec import CheckpointRef, Experiment
from mechmem.interventions.controls.random_neurons import RandomNeurons
from mechmem.interventions.patch import Source
from mechmem.measures.accuracy import Accuracy
from mechmem.measures.logit_difference import LogitDifference
from mechmem.models.architecture import Architecture
from mechmem.report.figures.curves import Curves
from mechmem.report.figures.heatmap import Heatmap
from mechmem.spec.errors import InputError
from mechmem.spec.registry import Component
from mechmem.spec.sweep import each
from mechmem.spec.yaml_file import SpecError
from mechmem.training import recipe as module
from mechmem.training.recipe import Optimisation, Recipe, named_recipe

RECIPE = """\
name: small
task: {kind: four_digit_addition, n_train: 60, n_held_out: 20, noise: {kind: digit, rate: 0.2}}
architecture: {n_layers: 2, d_model: 8, n_heads: 2}
optimisation: {n_steps: 4, batch_size: 20, evaluate_every: 2}
"""
SPEC = """\
name: all_of_it
question: Is it?
training: small
seeds: [0, 1, 2]
checkpoints: {before: generalised, after: {step: 4}, twin: {phase: final, training: small}}
examples:
  noisy: {noisy: true, n: 5, prefix: "true"}
  clean: {noisy: false, n: 6, pair: {flip: carry_1, hold: [carry_2]}}
analyses:
  - dynamics
  - kind: patch_grid
    site: {each: [neurons, attn_out]}
    layer: {each: all}
    head: {each: [[0, 1], 0]}
    source: {checkpoint: before}
    measures: [accuracy_true, logit_difference]
    control: {kind: random_neurons, n: 2}
  - {kind: neuron_shift, name: shift}
  - {kind: neuron_shift, name: between, before: twin}
figures:
  - {kind: curves, table: dynamics}
  - {kind: heatmap, table: patch_grid, x: layer, y: site, where: {layer: [0, 1]}}
quantities:
  late: {table: dynamics, where: {curve: held_out, step: 4}}
claims:
  - {id: C1, says: it is, holds_when: [{quantity: late, at_least: 0.5}]}
answer: "{late.percent}"
"""
SMALL = Recipe(
    name="small",
    task=FourDigitAddition(n_train=60, n_held_out=20, noise=Digit(rate=0.2)),
    architecture=Architecture(n_layers=2, d_model=8, n_heads=2),
    optimisation=Optimisation(n_steps=4, batch_size=20, evaluate_every=2),
)
SPARSE = SMALL.model_copy(
    update={
        "name": "sparse",
        "optimisation": SMALL.optimisation.model_copy(update={"evaluate_every": 4}),
    }
)
FIELDS: dict[str, Any] = {
    "name": "all_of_it",
    "question": "Is it?",
    "training": SMALL,
    "seeds": (0, 1, 2),
    "checkpoints": {
        "before": CheckpointRef(phase="generalised"),
        "after": CheckpointRef(step=4),
        "twin": CheckpointRef(phase="final", training=SMALL),
    },
    "examples": {
        "noisy": ExampleSet(noisy=True, n=5, prefix="true"),
        "clean": ExampleSet(noisy=False, n=6, pair=MinimalPair(flip="carry_1", hold=("carry_2",))),
    },
    "analyses": (
        Dynamics(),
        PatchGrid(
            site=each("neurons", "attn_out"),
            layer=each(),
            head=each((0, 1), 0),
            source=Source(checkpoint="before"),
            measures=(Accuracy(label="true"), LogitDifference()),
            control=RandomNeurons(n=2),
        ),
        NeuronShift(name="shift"),
        NeuronShift(name="between", before="twin"),
    ),
    "figures": (
        Curves(table="dynamics"),
        Heatmap(table="patch_grid", x="layer", y="site", where={"layer": (0, 1)}),
    ),
    "quantities": {"late": Quantity(table="dynamics", where={"curve": "held_out", "step": 4})},
    "claims": (
        Claim(id="C1", says="it is", holds_when=(Condition(quantity="late", at_least=0.5),)),
    ),
    "answer": "{late.percent}",
}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty working folder and no shipped trainings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "shipped")


def written(path: str, text: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return Path(path)


# One object


def test_the_file_and_the_call_are_one_object():
    written("trainings/small.yaml", RECIPE)
    from_file, from_call = Experiment.from_yaml(written("all.yaml", SPEC)), Experiment(**FIELDS)
    assert from_file == from_call
    assert hash(from_file) == hash(from_call)
    assert from_file.content_hash == from_call.content_hash


def test_overrides_reach_the_experiment():
    written("trainings/small.yaml", RECIPE)
    made = Experiment.from_yaml(
        written("all.yaml", SPEC), ["seeds=[7]", "examples.noisy.n=3", "analyses.2.name=moved"]
    )
    assert made == Experiment(
        **FIELDS
        | {
            "seeds": (7,),
            "examples": FIELDS["examples"] | {"noisy": ExampleSet(noisy=True, n=3, prefix="true")},
        }
        | {
            "analyses": (
                *FIELDS["analyses"][:2],
                NeuronShift(name="moved"),
                FIELDS["analyses"][3],
            )
        }
    )


# Trainings by name


def test_a_training_by_name_or_inline_is_the_same():
    written("trainings/small.yaml", RECIPE)
    inline = SPEC.replace(
        "training: small\n",
        "training:\n" + "".join(f"  {line}\n" for line in RECIPE.splitlines()),
        1,
    )
    assert Experiment.from_yaml(written("all.yaml", SPEC)) == Experiment.from_yaml(
        written("inline.yaml", inline)
    )


def test_other_trainings_by_name_too():
    written("trainings/small.yaml", RECIPE)
    made = Experiment.from_yaml(written("all.yaml", SPEC), ["also=[small]"])
    assert made.also == (SMALL,)
    assert made == Experiment(**FIELDS | {"also": (SMALL,)})


def test_where_a_training_is_looked_for_and_in_which_order():
    places = ["specs/trainings/small.yaml", "specs/small.yaml", "trainings/small.yaml"]
    written("experiments/trainings/small.yaml", RECIPE)  # of the working directory: not looked at
    record = {"recipe": {"task": {"kind": "four_digit_addition", "n_train": 1}}}
    written("shipped/small/seed_0/training.json", json.dumps(record))
    for i, place in enumerate(places):
        written(place, RECIPE.replace("n_train: 60", f"n_train: {10 * (i + 1)}"))
    found = []
    for place in [*places, "shipped/small/seed_0/training.json"]:
        found.append(named_recipe("small", Path("specs")).task.n_train)
        Path(place).unlink()
    assert found == [10, 20, 30, 1]
    with pytest.raises(InputError, match="there is no training 'small'"):
        named_recipe("small", Path("specs"))


def test_from_python_a_name_is_that_of_a_shipped_training():
    written("experiments/trainings/small.yaml", RECIPE)
    with pytest.raises(ValidationError, match="from Python only shipped ones have a name"):
        Experiment(**FIELDS | {"training": "small"})
    record = {"recipe": SMALL.block()}
    written("shipped/small/seed_0/training.json", json.dumps(record))
    assert Experiment(**FIELDS | {"training": "small"}) == Experiment(**FIELDS)


@pytest.mark.parametrize(
    "name", ["", "*", "s*", "[a-z]*", ".", "..", "../small", "/tmp", "a" * 300]
)
def test_a_pattern_or_a_path_is_no_name_of_a_training(name):
    written("small.yaml", RECIPE)
    record = {"recipe": SMALL.block()}
    written("shipped/small/seed_0/training.json", json.dumps(record))
    with pytest.raises(InputError, match="is not the name of a training"):
        named_recipe(name, Path())


def test_an_experiment_may_have_the_name_of_its_training():
    record = {"recipe": SMALL.block()}
    written("shipped/small/seed_0/training.json", json.dumps(record))
    path = written("small.yaml", SPEC)
    assert Experiment.from_yaml(path) == Experiment(**FIELDS)


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_recipes_that_start_from_each_other_are_refused(names):
    for one, other in zip(names, names[1:] + names[0], strict=True):
        written(f"trainings/{one}.yaml", f"{RECIPE}\nstart: {{training: {other}}}\n")
    with pytest.raises(SpecError, match=r"starts from itself|there is no training 'a'"):
        Experiment.from_yaml(written("all.yaml", SPEC), ["training=a"])


def test_an_unknown_training_is_named_with_the_nearest_of_all_places():
    written("trainings/fda_small.yaml", RECIPE)
    written("shipped/thr_small/seed_0/training.json", "{}")
    path = written("all.yaml", SPEC)
    for name, near in (("fda_smal", "fda_small"), ("thr_smal", "thr_small")):
        with pytest.raises(SpecError) as caught:
            Experiment.from_yaml(path, [f"training={name}"])
        message = (
            f"override 'training={name}': training: there is no training {name!r}; "
            f"did you mean {near!r}?"
        )
        assert message in str(caught.value)


def test_an_unknown_training_of_a_checkpoint_has_its_place():
    written("trainings/small.yaml", RECIPE)
    path = written(
        "all.yaml", SPEC.replace("phase: final, training: small", "phase: final, training: smal")
    )
    with pytest.raises(
        SpecError,
        match=re.escape("all.yaml:5:75: checkpoints.twin.training: there is no training 'smal'"),
    ):
        Experiment.from_yaml(path)


def test_an_error_in_a_training_names_the_file_it_is_in():
    written("trainings/small.yaml", RECIPE.replace("n_steps", "n_stps"))
    with pytest.raises(
        SpecError,
        match=re.escape("trainings/small.yaml:4:16: optimisation.n_stps: optimisation has no key"),
    ):
        Experiment.from_yaml(written("all.yaml", SPEC))


# Names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"figures": (Curves(table="dynamic"),)},
            "figures.0 reads the table 'dynamic'; did you mean 'dynamics'?",
        ),
        (
            {"figures": (Curves(table="neuron_shift"),)},
            "figures.0 reads the table 'neuron_shift'; choose from dynamics,",
        ),
        (
            {"quantities": {"late": Quantity(table="patch_gird")}},
            "quantities.late reads the table 'patch_gird'; did you mean 'patch_grid'?",
        ),
        (
            {
                "claims": (
                    Claim(id="C2", says="", holds_when=(Condition(quantity="lat", at_most=0),)),
                )
            },
            "claim C2 refers to unknown quantity 'lat'; did you mean 'late'?",
        ),
        (
            {"analyses": (NeuronShift(), NeuronShift(before="twin"))},
            "two analyses make the table 'neuron_shift'; give one a `name:`",
        ),
        (
            {"analyses": (Dynamics(), NeuronShift(name="dynamics"))},
            "two analyses make the table 'dynamics'",
        ),
        ({"seeds": (0, 1, 1)}, "1 is listed twice"),
        ({"analyses": (Dynamics(), Dynamics())}, "is listed twice"),
        ({"seeds": ()}, "at least 1 item"),
        ({"analyses": ()}, "at least 1 item"),
        ({"name": "a/b"}, "should match pattern"),
        (
            {"checkpoints": {"a": {"step": 3}}},
            "checkpoints.a: small keeps no checkpoint of step 3, only every 2 up to 4",
        ),
        ({"checkpoints": {"a": {"step": 6}}}, "checkpoints.a: small keeps no checkpoint of step 6"),
        (
            {"checkpoints": {"a": "generalized"}},
            "there is no phase 'generalized'; did you mean 'generalised'?",
        ),
        (
            {"checkpoints": {"a": {"phase": "final", "step": 4}}},
            "a checkpoint is a phase (initial, before,",
        ),
        ({"checkpoints": {"a": {}}}, "a checkpoint is a phase (initial, before,"),
        (
            {"checkpoints": {"a": {"same_step_as": "memorised", "phase": "final"}}},
            "a checkpoint is a phase (initial, before,",
        ),
        (
            {"checkpoints": {"a": {"same_step_as": "memorized", "training": SMALL}}},
            "there is no phase 'memorized'; did you mean 'memorised'?",
        ),
        (
            {"checkpoints": {"a": {"same_step_as": "memorised"}}},
            "name that `training`, or use `phase`",
        ),
        (
            {"checkpoints": {"a": {"same_step_as": "memorised", "training": SPARSE}}},
            "checkpoints.a: sparse is kept every 4 steps, so it lacks steps of small, which is "
            "kept every 2",
        ),
        ({"checkpoints": {"a": {"step": -2}}}, "greater than or equal to 0"),
        ({"examples": {"a": {"n": 0}}}, "greater than or equal to 1"),
        ({"examples": {"a": {"prefix": "truth"}}}, "Input should be 'given' or 'true'"),
    ],
)
def test_names_are_checked_before_anything_is_trained(changes, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        Experiment(**FIELDS | changes)


def test_a_second_analysis_of_a_kind_makes_a_table_of_its_own():
    fields = {
        "analyses": (*FIELDS["analyses"], Dynamics(name="again")),
        "figures": (Curves(table="again"),),
    }
    assert Experiment(**FIELDS | fields).figures[0].table == "again"


def test_a_step_is_one_that_the_checkpoints_own_training_keeps():
    longer = SMALL.model_copy(update={"optimisation": Optimisation(n_steps=9, evaluate_every=3)})
    checkpoints = FIELDS["checkpoints"]
    made = Experiment(
        **FIELDS | {"checkpoints": checkpoints | {"twin": {"step": 9, "training": longer}}}
    )
    assert made.checkpoints["twin"].at == 9
    with pytest.raises(ValidationError, match="step 4"):
        Experiment(
            **FIELDS | {"checkpoints": checkpoints | {"twin": {"step": 4, "training": longer}}}
        )


def test_all_is_what_the_model_and_the_experiment_have():
    sweep_domain = Experiment(**FIELDS).sweep_domain(SMALL)
    assert {name: list(values) for name, values in sweep_domain.items()} == {
        "layer": [0, 1],
        "head": [0, 1],
        "position": [
            "a3",
            "a2",
            "a1",
            "a0",
            "+",
            "b3",
            "b2",
            "b1",
            "b0",
            "=",
            "s4",
            "s3",
            "s2",
            "s1",
        ],
        "model": ["before", "after", "twin"],
        "examples": ["noisy", "clean"],
    }


# Example sets

TASK = SMALL.task
TRAIN = TASK.sample("train")


def rows_in(examples: Examples, whole: Examples) -> list[int]:
    """Where each example stands in the whole set, found by what it says."""
    place = {tuple(prompt): i for i, prompt in enumerate(whole.prompt.tolist())}
    return [place[tuple(prompt)] for prompt in examples.prompt.tolist()]


@pytest.mark.parametrize(("noisy", "n_all"), [(True, 12), (False, 48), (None, 60)])
def test_noisy_and_clean_instances(noisy, n_all):
    examples = ExampleSet(noisy=noisy, n=None).of(TASK)
    assert len(examples) == n_all
    assert rows_in(examples, TRAIN) == [
        i for i, is_noisy in enumerate(TRAIN.is_noisy) if noisy in (None, bool(is_noisy))
    ]
    assert torch.equal(examples.index, torch.arange(n_all))


@pytest.mark.parametrize(("n", "found"), [(1, 1), (5, 5), (12, 12), (500, 12), (None, 12)])
def test_at_most_n_are_drawn(n, found):
    examples = ExampleSet(noisy=True, n=n).of(TASK)
    assert len(examples) == len(set(rows_in(examples, TRAIN))) == found
    assert examples.is_noisy.all()


@pytest.mark.parametrize("noisy", [None, True, False])
def test_only_examples_with_the_asked_values_are_chosen(noisy):
    where = {"carry_1": 0, "out_0": 3}
    examples = ExampleSet(noisy=noisy, where=where, n=None).of(TASK)
    fits = (TRAIN.variables["carry_1"] == 0) & (TRAIN.variables["out_0"] == 3)
    fits &= torch.ones_like(fits) if noisy is None else TRAIN.is_noisy == noisy
    assert 0 < len(examples) == int(fits.sum())
    assert all((examples.variables[name] == value).all() for name, value in where.items())


def test_which_are_drawn_follows_the_seed_and_their_order_that_of_the_task():
    first, again, others = (
        rows_in(ExampleSet(n=10, seed=seed).of(TASK), TRAIN) for seed in (0, 0, 1)
    )
    assert first == again == sorted(first)
    assert first != others
    assert first != list(range(10))


def test_a_smaller_draw_is_part_of_a_larger_one():
    drawn = [set(rows_in(ExampleSet(n=n).of(TASK), TRAIN)) for n in (5, 20)]
    assert drawn[0] < drawn[1]


def test_the_split_and_the_prefix():
    examples = ExampleSet(split="held_out", n=None, prefix="true").of(TASK)
    assert torch.equal(examples.prompt, TASK.sample("held_out").prompt)
    assert examples.prefix == "true"


def test_pairs_are_drawn_from_the_examples_that_have_one():
    pair = MinimalPair(
        flip="carry_4", hold=("digit_sum_3",)
    )  # few have one: the carry into the thousands decides
    everything = ExampleSet(n=None, pair=pair).of(TASK)
    assert 0 < len(everything) < 30
    chosen = ExampleSet(n=3, pair=pair, prefix="true").of(TASK)
    assert len(chosen) == len(chosen.counterfactual) == 3
    assert set(rows_in(chosen, TRAIN)) < set(rows_in(everything, TRAIN))
    assert (chosen.variables["carry_4"] != chosen.counterfactual.variables["carry_4"]).all()
    assert torch.equal(
        chosen.variables["digit_sum_3"], chosen.counterfactual.variables["digit_sum_3"]
    )
    assert chosen.prefix == chosen.counterfactual.prefix == "true"
    assert torch.equal(chosen.index, torch.arange(3))
    assert torch.equal(chosen.counterfactual.index, torch.arange(3))


def test_pairs_of_noisy_instances_keep_their_wrong_labels():
    chosen = ExampleSet(noisy=True, n=4, pair=MinimalPair(flip="out_0")).of(TASK)
    assert (chosen.given != chosen.true).any(dim=1).all()
    assert torch.equal(chosen.counterfactual.given, chosen.counterfactual.true)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (ExampleSet(split="heldout"), "has no split 'heldout'; did you mean 'held_out'?"),
        (
            ExampleSet(noisy=False, where={"carry_1": 2}),
            "split 'train' has no clean example with carry_1 2",
        ),
        (ExampleSet(where={"cary_1": 1}), "there is no variable 'cary_1'; did you mean 'carry_1'?"),
        (ExampleSet(split="held_out", noisy=True), "split 'held_out' has no noisy example"),
        (
            ExampleSet(pair=MinimalPair(flip="cary_1")),
            "has no variable 'cary_1'; did you mean 'carry_1'?",
        ),
        (ExampleSet(pair=MinimalPair(flip="out_4", hold=("carry_4",))), "no example has a pair"),
    ],
)
def test_a_set_that_cannot_be_is_refused(chosen, message):
    with pytest.raises(InputError, match=re.escape(message)):
        chosen.of(TASK)


# Plugins

PLUGIN = """\
from mechmem.data.label_noise import LabelNoise


class AllZero(LabelNoise):
    digit: int = 0

    def wrong(self, true, noisy, alphabets, generator):
        return true[noisy] * 0 + self.digit
"""


@pytest.fixture
def registries(monkeypatch):
    """Whatever a plugin puts on a registry is gone after the test."""
    monkeypatch.setattr(
        Component,
        "registries",
        {registry: dict(members) for registry, members in Component.registries.items()},
    )


def with_plugins(*names: str) -> Path:
    written("specs/trainings/small.yaml", RECIPE.replace("kind: digit", "kind: all_zero, digit: 1"))
    return written("specs/all.yaml", SPEC + f"plugins: {list(names)}\n")


@pytest.mark.usefixtures("registries")
def test_a_plugin_adds_a_kind_that_the_spec_can_use():
    written("specs/my/noise.py", PLUGIN)
    made = Experiment.from_yaml(with_plugins("my/noise.py"))
    assert made.plugins == ("my/noise.py",)
    assert made.training.block()["task"]["noise"] == {
        "kind": "all_zero",
        "rate": 0.2,
        "seed": 0,
        "digit": 1,
    }
    given = made.training.task.sample("train")
    assert (given.given[given.is_noisy] == 1).all()
    assert "all_zero" in LabelNoise.kinds()


def test_without_its_plugin_a_kind_is_unknown():
    with pytest.raises(SpecError, match="there is no noise 'all_zero'"):
        Experiment.from_yaml(with_plugins())


@pytest.mark.usefixtures("registries")
def test_a_spec_with_a_plugin_can_be_read_twice():
    written("specs/noise.py", PLUGIN)
    path = with_plugins("noise.py")
    first, second = Experiment.from_yaml(path), Experiment.from_yaml(path)
    assert first.content_hash == second.content_hash


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.py", None, "plugin specs/gone.py does not exist"),
        ("noise.txt", PLUGIN, "plugin specs/noise.txt is not a .py file"),
        ("bad.py", "1 / 0", "plugin specs/bad.py failed: ZeroDivisionError: division by zero"),
        ("bad.py", "def (", "plugin specs/bad.py failed: SyntaxError: invalid syntax"),
        ("bad.py", PLUGIN.replace("AllZero", "Digit"), "are both the noise 'digit': rename one"),
    ],
)
def test_a_plugin_that_fails_is_named(name, text, message):
    if text is not None:
        written(f"specs/{name}", text)
    with pytest.raises(InputError, match=re.escape(message)):
        Experiment.from_yaml(with_plugins(name))


@pytest.mark.parametrize(
    "name", ["../noise.py", "my/../../noise.py", "{here}/noise.py", "linked.py", "far/noise.py"]
)
def test_a_plugin_outside_of_the_folder_of_its_spec_is_not_executed(name, tmp_path):
    written("noise.py", "raise SystemExit('this was executed')")
    written("specs/my/other.py", "")
    Path("specs/linked.py").symlink_to(Path("noise.py").resolve())
    Path("specs/far").symlink_to(Path.cwd())
    with pytest.raises(InputError, match=r"lies outside of specs, the folder of its spec; copy"):
        Experiment.from_yaml(with_plugins(name.format(here=Path.cwd())))


@pytest.mark.usefixtures("registries")
def test_plugins_are_announced_before_they_are_executed():
    def refuse(names):
        raise InputError(f"no {names}")

    written("specs/noise.py", "raise SystemExit('this was executed')")
    with pytest.raises(InputError, match=r"no \['noise\.py'\]"):
        Experiment.from_yaml(with_plugins("noise.py"), on_plugins=refuse)


@pytest.mark.parametrize("plugins", ["noise.py", "5", "[5]", "{a: b}"])
def test_plugins_that_are_no_list_of_names_are_refused_with_their_place(plugins):
    written("trainings/small.yaml", RECIPE)
    line = len(SPEC.splitlines()) + 1
    with pytest.raises(SpecError, match=rf"all\.yaml:{line}:\d+: plugins"):
        Experiment.from_yaml(written("all.yaml", SPEC + f"plugins: {plugins}\n"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"answer": "{retuned.percent}"},
            "the answer template refers to unknown quantity 'retuned'; did you mean 'returned'",
        ),
        ({"answer": "50 % {"}, "cannot be filled in"),
        ({"analyses": [{"kind": "dynamics", "name": "a/b"}]}, "String should match pattern"),
    ],
)
def test_what_can_be_seen_to_be_wrong_is_refused_before_anything_runs(fields, message, spec):
    with pytest.raises(ValidationError, match=message):
        Experiment.model_validate(spec(**fields))


@pytest.mark.parametrize("pair", [None, MinimalPair(flip="carry_1")])
def test_a_set_that_skips_anothers_examples_shares_none_with_it(pair):
    first, rest = (
        ExampleSet(noisy=False, pair=pair, **fields).of(TASK)
        for fields in ({"n": 9}, {"n": 20, "skip": 9})
    )
    assert (len(first), len(rest)) == (9, 20)
    assert {*map(tuple, first.prompt.tolist())}.isdisjoint(map(tuple, rest.prompt.tolist()))
    together = ExampleSet(noisy=False, pair=pair, n=29).of(TASK)
    assert {*map(tuple, together.prompt.tolist())} == {
        *map(tuple, torch.cat([first.prompt, rest.prompt]).tolist())
    }


# Names that nothing uses


def refused(overrides: list[str], text: str = SPEC) -> str:
    written("trainings/small.yaml", RECIPE)
    with pytest.raises(SpecError) as caught:
        Experiment.from_yaml(written("all.yaml", text), overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "examples.nosy.n=5",
            "override 'examples.nosy.n=5': examples.nosy: no analysis uses the example set 'nosy'; "
            "did you mean 'noisy'?",
        ),
        (
            "examples.nosy={n: 5}",
            "override 'examples.nosy={n: 5}': examples.nosy: no analysis uses the example set "
            "'nosy'; did you mean 'noisy'?",
        ),
        (
            "checkpoints.befor=final",
            "override 'checkpoints.befor=final': checkpoints.befor: no analysis uses the "
            "checkpoint 'befor'; did you mean 'before'?",
        ),
        (
            "checkpoints.spare=final",
            "override 'checkpoints.spare=final': checkpoints.spare: no analysis uses the "
            "checkpoint 'spare'; use it or remove it",
        ),
    ],
)
def test_an_override_that_adds_a_name_that_nothing_uses_is_refused(override, message):
    assert refused([override]) == message


def test_a_name_that_nothing_uses_has_its_place_in_the_file():
    found = refused([], SPEC.replace("  noisy:", "  spare: {n: 3}\n  noisy:"))
    assert found == "all.yaml:7:3: examples.spare: no analysis uses the example set 'spare'; " + (
        "use it or remove it"
    )


PATCH = "{kind: patch, site: z, layer: 0, source: {checkpoint: before}}"
BARE = ["figures=[]", "quantities={}", "claims=[]", "answer=''"]


def test_a_name_that_is_misspelt_where_it_is_used_is_refused_there():
    analyses = f"analyses=[{{kind: intervene, examples: nosy, intervention: {PATCH}}}]"
    found = refused([analyses, *BARE])
    assert "analyses.0: there is no example set 'nosy'; did you mean 'noisy'?" in found


def test_each_all_uses_every_name():
    written("trainings/small.yaml", RECIPE)
    swept = "model: {each: all}, examples: {each: all}"
    analyses = f"analyses=[{{kind: intervene, {swept}, intervention: {PATCH}}}]"
    made = Experiment.from_yaml(written("all.yaml", SPEC), [analyses, *BARE])
    found = made.references_of(made.analyses[0])
    assert found.checkpoints == {"before", "after", "twin"}
    assert found.examples == {"noisy", "clean"}


# Where and how the analyses run


def test_the_machine_s_fields():
    made = Experiment(**FIELDS)
    assert (made.device, made.memory, made.backend) == ("auto", 2 * 2**30, "auto")
    made = Experiment(**FIELDS | {"device": "cpu", "memory": "512 MiB", "backend": "hooked"})
    assert (made.device, made.memory, made.backend) == ("cpu", 512 * 2**20, "hooked")
    assert Experiment.model_validate(made.block()) == made


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device=gpu", "device: Input should be 'auto', 'cpu', 'cuda' or 'mps'"),
        ("memory=much", "memory: 'much' is not a size; write 2 GiB, 512 MiB or a number of bytes"),
        ("memory=0", "memory: Input should be greater than or equal to 1048576"),
        ("backend=quick", "backend: Input should be 'auto', 'hooked' or 'fast'"),
        ("seeds=[]", "seeds: a list needs at least 1 item"),
        ("seeds=[1, 2, 1]", "seeds: 1 is listed twice"),
        ("analyses.1.measures=[kl, kl]", "analyses.1.measures: KL() is listed twice"),
        (
            "analyses.1.layer={each: []}",
            "analyses.1.layer.each: a sweep needs at least one value; for",
        ),
        ("analyses.1.layer={each: [0, 0]}", "analyses.1.layer.each: 0 is listed twice"),
    ],
)
def test_a_value_that_cannot_be_is_refused(override, message):
    assert refused([override]).startswith(f"override {override!r}: {message}")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch):
    monkeypatch.setattr(
        f"torch.{'cuda' if device == 'cuda' else 'backends.mps'}.is_available", bool
    )
    made = Experiment(**FIELDS | {"device": device})
    message = f"device '{device}' is not available on this machine; choose from: auto, cpu"
    for refuse in (device_of, session_options, conditions):
        with pytest.raises(InputError, match=re.escape(message)):
            refuse(made)


def test_auto_is_the_best_device_that_there_is(monkeypatch):
    made = Experiment(**FIELDS)
    monkeypatch.setattr("torch.cuda.is_available", bool)
    monkeypatch.setattr("torch.backends.mps.is_available", bool)
    assert device_of(made) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_of(made) == "cuda"
