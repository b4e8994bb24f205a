from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from configured import BIDIRECTIONAL, configured
from sklearn.linear_model import LogisticRegression

import mechmem as mm
from mechmem.analyses.readouts.classifier import alike, fitted, shuffled_labels, thirds
from mechmem.analyses.readouts.probe import Probe
from mechmem.data.examples import Examples
from mechmem.data.label_noise import UniformWrong
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.data.tasks.two_hop_reasoning import TwoHopReasoning
from mechmem.experiment.dry_run import DryRun
from mechmem.models.architecture import Architecture
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.sweep import each

EMBED = {"site": "embed", "layer": None}


def with_digit(examples: Examples) -> Examples:
    """The last digit of a as a variable, which the embedding at a0 holds and nothing else."""
    return replace(examples, variables={**examples.variables, "a_0": examples.prompt[:, 3]})


@pytest.fixture(scope="module")
def clean() -> Examples:
    return with_digit(FourDigitAddition(n_train=10, n_held_out=900).sample("held_out"))


@pytest.fixture(scope="module")
def noisy() -> Examples:
    train = FourDigitAddition(n_train=2000, n_held_out=10, seed=1).sample("train")
    return with_digit(train.select(train.is_noisy).as_set())


@pytest.fixture
def session(model, other_model, clean, noisy) -> Session:
    return Session({"after": model, "before": other_model}, {"clean": clean, "noisy": noisy})


def probe(**fields) -> Probe:
    return Probe(**({"variable": "carry_4", "layer": 1, "position": "="} | fields))


def accuracies(table: pd.DataFrame, **where) -> pd.Series:
    """By set and condition."""
    table = table[table["measure"] == "accuracy"]
    for column, value in where.items():
        table = table[table[column] == value]
    return table.set_index([c for c in ("examples", "condition", "prefix") if c not in where])[
        "value"
    ]


def test_by_hand_an_embedding_tells_its_token_and_a_value_never_seen_is_wrong(
    session, model, clean, noisy
):
    even = clean.select(clean.variables["a_0"] % 2 == 0).as_set()
    session.example_sets["clean"] = even
    table = probe(**EMBED, variable="a_0", position="a0", seed=3).table(session)
    values = accuracies(table, prefix="given")
    fit, dev, test = thirds(len(even), 3, alike(model, even, "a0"))
    commonest = even.variables["a_0"][fit].mode().values
    known = {tuple(digits) for digits in even.prompt[torch.cat([fit, dev]), :4].tolist()}
    is_new = torch.tensor([tuple(digits) not in known for digits in noisy.prompt[:, :4].tolist()])
    digits = noisy.variables["a_0"][is_new]
    assert values["clean", "probe"] == 1
    assert values["noisy", "probe"] == pytest.approx((digits % 2 == 0).double().mean().item())
    assert values["clean", "majority"] == pytest.approx(
        (even.variables["a_0"][test] == commonest).double().mean().item()
    )
    assert values["noisy", "majority"] == pytest.approx(
        (digits == commonest).double().mean().item()
    )
    said = table.set_index("measure")["value"]
    assert said["n_values"] == 5
    assert said["penalty"] == 100  # all read everything; the largest is taken


def test_what_is_fed_is_what_a_probe_may_read(session, noisy):
    """The trap: the embedding at s4 holds the label's first digit, so its prefix decides what
    `out_4` is read as."""
    values = accuracies(
        probe(**EMBED, variable="out_4", position="s4").table(session),
        examples="noisy",
        condition="probe",
    )
    assert values["true"] == 1
    assert values["given"] == pytest.approx(
        (noisy.given[:, 0] == noisy.true[:, 0]).double().mean().item()
    )
    assert values["given"] < 0.9


def test_before_the_answer_the_prefix_makes_no_difference(session):
    values = accuracies(probe().table(session), examples="noisy")
    for condition in ("probe", "shuffled", "majority"):
        assert values[condition, "given"] == values[condition, "true"]


def test_the_table_has_the_documented_columns_and_every_row_once(session):
    table = probe().table(session)
    assert list(table.columns) == list(Probe.columns)
    assert not table[["examples", "condition", "prefix", "measure"]].duplicated().any()
    assert set(table["examples"]) == {"clean", "noisy"}
    assert set(table[table["examples"] == "noisy"]["prefix"]) == {"given", "true"}
    assert set(table[table["examples"] == "clean"]["prefix"]) == {"given"}
    assert not table.isna().any(axis=None)
    by_example = table[table["measure"] == "accuracy"]
    assert all(
        len(row.per_example) == row.n and row.per_example.mean() == pytest.approx(row.value)
        for row in by_example.itertuples()
    )
    assert (by_example["low"] <= by_example["value"]).all()
    assert (by_example["value"] <= by_example["high"]).all()


def test_it_is_tested_on_what_it_was_not_fitted_on(session, clean):
    session.example_sets["more"] = clean.select(torch.arange(600)).as_set()
    table = probe(test_on=("noisy", "more")).table(session)
    n = table[table["condition"] == "majority"].groupby("examples")["n"].first()
    test = thirds(900, 0)[2]
    assert n["clean"] == 300
    assert n["noisy"] == len(session.example_sets["noisy"])
    assert n["more"] == (test < 600).sum()  # the rest of them was fitted on


def test_rows_that_are_alike_stand_in_one_third():
    alike = torch.randint(40, (200,), generator=torch.Generator().manual_seed(0))
    parts = thirds(200, 1, alike)
    assert torch.cat(parts).sort().values.tolist() == list(range(200))
    groups = [set(alike[part].tolist()) for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 40
    assert [len(group) for group in groups] == [14, 13, 13]
    for mine, plain in zip(thirds(200, 1, torch.arange(200)), thirds(200, 1), strict=True):
        assert mine.tolist() == plain.tolist()  # where all rows differ nothing changes


def test_a_random_label_of_what_was_read_so_far_cannot_be_known_of_another_prompt():
    """A random world is learnt by heart by a wide enough probe; on first hops it never met it has
    to guess."""
    task = TwoHopReasoning(n_entities=30, n_relations=10, noise=UniformWrong(rate=0.1))
    model = Architecture(n_layers=1, d_model=64, n_heads=2).build(
        len(task.vocabulary), task.n_context, 0
    )
    sets = {
        name: task.sample(split) for name, split in (("clean", "atomic"), ("two_hop", "held_out"))
    }
    session = Session(
        {"after": model}, {name: examples.as_set() for name, examples in sets.items()}
    )
    table = Probe(
        variable="bridge",
        layer=0,
        position="r1",
        test_on=("two_hop",),
        penalties=(0.01,),
        control_task=("e", "r1"),
    ).table(session)
    found = table[table["measure"] == "accuracy"].set_index(["examples", "condition"])
    assert (found["value"] < 0.15).all()  # chance is 1/30; the same rows fitted on are read at 1.00
    assert found.loc[("two_hop", "probe"), "n"] < len(sets["two_hop"]) / 2


def test_the_thirds_hold_every_row_once():
    parts = thirds(100, 1)
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
    assert [len(part) for part in parts] == [34, 33, 33]
    assert not torch.equal(parts[0], thirds(100, 2)[0])


def test_labels_shuffled_by_instance_cannot_be_read(session):
    values = accuracies(
        probe(**EMBED, variable="a_0", position="a0").table(session),
        examples="clean",
        prefix="given",
    )
    assert values["probe"] == 1
    assert values["shuffled"] < 0.2


def test_labels_shuffled_between_what_the_activation_tells_apart_can_be_read_by_heart(session):
    """A control task: a label for each digit at random. What reads that is the probe, not the
    model."""
    table = probe(**EMBED, variable="a_0", position="a0", control_task=("a_0",)).table(session)
    values = accuracies(table, prefix="given")
    assert values["clean", "control_task"] == values["noisy", "control_task"] == 1
    assert values["clean", "shuffled"] < 0.2  # a label for each prompt cannot be known


def test_selectivity_is_the_accuracy_minus_that_of_the_control_by_example(session):
    table = probe(variable="digit_sum_1", layer=0, control_task=("a_1", "b_1")).table(session)
    at = table.set_index(["measure", "examples", "prefix", "condition"]).sort_index()
    for name, prefix in (("clean", "given"), ("noisy", "given"), ("noisy", "true")):
        read = at.loc["accuracy", name, prefix]["per_example"]
        gained = at.loc["selectivity", name, prefix]
        assert set(gained.index) == {"shuffled", "control_task"}
        for control, row in gained.iterrows():
            np.testing.assert_array_equal(row["per_example"], read["probe"] - read[control])
            assert row["value"] == pytest.approx(row["per_example"].mean())


def test_a_control_task_has_the_values_of_the_variable_and_is_a_function_of_its_inputs(clean):
    """The control of a digit sum: a random table of the two digits."""
    digits, sums = ("a_1", "b_1"), clean.variables["digit_sum_1"]
    (labels,) = shuffled_labels([clean], sums, digits, seed=0)
    table = {}
    for a, b, label in zip(
        *(clean.variables[d].tolist() for d in digits), labels.tolist(), strict=True
    ):
        assert table.setdefault((a, b), label) == label
    assert len(table) == 100
    assert set(labels.tolist()) <= set(sums.tolist())
    assert len(set(labels.tolist())) > 12  # of 19


def test_rows_of_two_checkpoints_are_of_the_same_examples_in_the_same_order(session, model):
    """So that a difference after - before is paired: a model read twice differs by exactly 0."""
    session.models["before"] = model
    table = probe(model=each("before", "after"), control_task=("a_3", "b_3")).run(session, {})
    before, after = (
        table[table["model"] == name].drop(columns="model") for name in ("before", "after")
    )
    pd.testing.assert_frame_equal(before.reset_index(drop=True), after.reset_index(drop=True))


def test_the_majority_is_the_same_in_every_checkpoint(session):
    """It depends on the labels alone, so equal values mean equal instances in equal order."""
    table = probe(model=each("before", "after"), layer=each(0, 1)).run(session, {})
    majority = table[table["condition"] == "majority"]
    for _, rows in majority.groupby(["examples", "prefix"]):
        assert len(rows) == 4
        assert len({values.tobytes() for values in rows["per_example"]}) == 1


def test_shuffled_labels_by_hand(clean, noisy):
    labels = shuffled_labels([clean, noisy], clean.variables["a_0"], ("carry_1", "carry_2"), seed=0)
    assert [len(part) for part in labels] == [len(clean), len(noisy)]
    of_type = {}
    for examples, part in zip((clean, noisy), labels, strict=True):
        kinds = zip(
            examples.variables["carry_1"].tolist(),
            examples.variables["carry_2"].tolist(),
            strict=True,
        )
        for kind, label in zip(kinds, part.tolist(), strict=True):
            assert of_type.setdefault(kind, label) == label
    assert len(of_type) == 4
    single = shuffled_labels([clean], clean.variables["a_0"], (), seed=0)[0]
    assert set(single.tolist()) == set(range(10))
    assert (single == clean.variables["a_0"]).double().mean() < 0.2
    assert not torch.equal(single, shuffled_labels([clean], clean.variables["a_0"], (), seed=1)[0])


def test_the_penalty_is_the_one_that_reads_most_of_the_second_third():
    generator = torch.Generator().manual_seed(0)
    x, values = (
        torch.randn(90, 40, generator=generator),
        torch.randint(2, (90,), generator=generator),
    )
    x[:, 0] += 2 * values
    grid = (0.01, 1.0, 100.0)
    dev = thirds(90, 0)[1]
    right = {
        p: (fitted(x, values, [p], 0)(x[dev]) == values[dev]).double().mean().item() for p in grid
    }
    assert len(set(right.values())) > 1
    found = fitted(x, values, grid, 0)
    assert right[found.penalty] == max(right.values())
    assert found.penalty == max(p for p in grid if right[p] == max(right.values()))


@pytest.fixture(scope="module")
def shipped() -> Session:
    trained = mm.load("fda_small")
    sets = {"clean": mm.ExampleSet(noisy=False, n=900), "noisy": mm.ExampleSet(noisy=True, n=300)}
    return Session(
        {"after": trained.at("memorised")},
        {name: chosen.of(trained.task) for name, chosen in sets.items()},
    )


@pytest.mark.parametrize(("variable", "position"), [("out_1", "s2"), ("digit_sum_1", "s3")])
def test_it_reads_what_scikit_learn_reads(variable, position, shipped):
    at = {"site": "resid_mid", "layer": 1, "position": position}
    part = Probe(variable=variable, **at, penalties=(10,), seed=2)
    table = part.table(shipped)
    sets, hook = shipped.example_sets, "blocks.1.hook_resid_mid"
    read = {
        name: shipped.activation(shipped.model("after"), examples, hook)[
            :, examples.positions[position]
        ].double()
        for name, examples in sets.items()
    }
    train, _, test = thirds(900, 2)
    x, y = read["clean"][train], sets["clean"].variables[variable][train]
    mean, scale = x.mean(0), x.var(0).mean().sqrt()
    oracle = LogisticRegression(C=1 / 10, max_iter=20_000, tol=1e-10).fit(
        ((x - mean) / scale).numpy(), y.numpy()
    )
    mine = fitted(read["clean"], sets["clean"].variables[variable], [10], 2)
    np.testing.assert_allclose((mine.weight * scale).numpy(), oracle.coef_, atol=1e-4)
    values = accuracies(table, condition="probe", prefix="given")
    for name, rows in (("clean", test), ("noisy", torch.arange(300))):
        right = (
            oracle.predict(((read[name][rows] - mean) / scale).numpy())
            == sets[name].variables[variable][rows].numpy()
        )
        # An example may lie on the edge between two values, within the fits' tolerance.
        assert values[name] == pytest.approx(right.mean(), abs=1.5 / len(rows))
    assert values["clean"] > 0.3


def test_a_carry_is_read_where_the_shipped_model_needs_it(shipped):
    values = accuracies(
        Probe(variable="carry_2", site="resid_mid", layer=1, position="s3").table(shipped),
        prefix="given",
    )
    for name in ("clean", "noisy"):
        assert values[name, "probe"] > 0.9 > 0.7 > values[name, "majority"]
        assert values[name, "shuffled"] < 0.7


def test_heads_are_read_together(session, model, clean):
    table = probe(site="z", layer=0).table(session)
    x = session.activation(model, clean, "blocks.0.attn.hook_z")[:, 9].flatten(1)
    found = fitted(x, clean.variables["carry_4"], [1.0, 10.0, 100.0], 0)
    test = thirds(900, 0)[2]
    right = (found(x[test]) == clean.variables["carry_4"][test]).double().mean().item()
    assert accuracies(table)["clean", "probe", "given"] == pytest.approx(right)


def test_the_same_spec_gives_the_same_bytes_and_another_seed_another_split(
    session, model, clean, noisy
):
    again = Session({"after": model}, {"clean": clean, "noisy": noisy})
    pd.testing.assert_frame_equal(probe().table(session), probe().table(again))
    assert not accuracies(probe().table(session)).equals(accuracies(probe(seed=1).table(session)))


@pytest.mark.parametrize("position", ["=", "s3"])
def test_a_dry_run_on_four_examples_has_the_same_labels(position, session, model, clean, noisy):
    few = {
        name: s.select(torch.arange(4)).as_set() for name, s in (("clean", clean), ("noisy", noisy))
    }
    few["more"] = few["clean"]  # at four examples, sets that differ may be the same
    dry = DryRun(dict.fromkeys(few, 1000), models={"after": model}, example_sets=few)
    session.example_sets["more"] = clean.select(torch.arange(600)).as_set()
    part = probe(variable="digit_sum_3", position=position, test_on=("noisy", "more"))
    labels = ["examples", "condition", "prefix", "measure", "unit"]
    pd.testing.assert_frame_equal(part.table(dry)[labels], part.table(session)[labels])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variable": "cary_4"}, "there is no variable 'cary_4'; did you mean 'carry_4'?"),
        ({"control_task": ("cary_4",)}, "there is no variable 'cary_4'"),
        ({"position": "s9"}, "there is no position 's9'"),
        ({"position": "readout"}, "a probe reads one position, but `readout` means several"),
        ({"layer": 2}, "layer 2 is out of range"),
        ({"layer": None}, "site 'resid_post' needs a layer"),
        ({"site": "pattern"}, "a probe reads a site of `batch pos ...`, not 'pattern'"),
        ({"site": "rezid"}, "there is no site 'rezid'"),
        ({"fit_on": "cleam"}, "there is no example set 'cleam'"),
        ({"test_on": ("noizy",)}, "there is no example set 'noizy'"),
        ({"model": "later"}, "there is no checkpoint 'later'"),
        ({"fit_on": "noisy"}, "in 'noisy' are noisy; give `fit_on` a set made with `noisy: false`"),
        ({"fit_on": "three"}, "'three' has 3 examples: a probe needs at least 4"),
        ({"fit_on": "uniform"}, "carry_4 is always 1; choose a set in which it varies"),
        (
            {"test_on": ("seen",)},
            "fitted on every activation that 'seen' has at this position, so none is left",
        ),
    ],
)
def test_what_cannot_be_is_refused(fields, message, session, clean):
    session.example_sets |= {
        "three": clean.select(torch.arange(3)).as_set(),
        "uniform": clean.select(clean.variables["carry_4"] == 1).as_set(),
        "seen": clean.select(thirds(len(clean), 0)[0]).as_set(),
    }
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        probe(**fields).table(session)


@pytest.fixture(scope="module")
def looking_ahead(task):
    return configured(len(task.vocabulary), task.n_context, **BIDIRECTIONAL)


def test_where_attention_looks_ahead_only_whole_prompts_are_alike(model, looking_ahead, task):
    a, b = torch.tensor([1234, 1234, 1234, 5678]), torch.tensor([1111, 2222, 1111, 1111])
    examples = task.examples(a, b)
    assert alike(model, examples, "a0").tolist() == [0, 0, 0, 1]
    assert alike(model, examples, "=").tolist() == [0, 1, 0, 2]
    for position in ("a0", "="):
        assert alike(looking_ahead, examples, position).tolist() == [0, 1, 0, 2]
    for of, is_same in ((model, True), (looking_ahead, False)):
        x = Session().activation(of, examples, "blocks.1.hook_resid_post")[:, 3]  # a0
        assert torch.allclose(x[0], x[1], atol=1e-5) == is_same
        torch.testing.assert_close(x[0], x[2])


def test_a_probe_of_such_a_model_is_tested_on_prompts_that_only_begin_alike(
    model, looking_ahead, task, clean
):
    """The second set has the first numbers of the first set, and other second numbers."""
    twice = replace(clean, prompt=clean.prompt.clone())
    twice.prompt[:, 5:9] = clean.prompt.roll(1, dims=0)[:, 5:9]
    sets = {"clean": clean, "noisy": twice}
    n = {}
    for name, of in (("causal", model), ("looking_ahead", looking_ahead)):
        table = probe(**EMBED, variable="a_0", position="a0").table(Session({"after": of}, sets))
        is_tested = (table["examples"] == "noisy") & (table["condition"] == "majority")
        n[name] = table.loc[is_tested, "n"].tolist()
    assert n["looking_ahead"] == [900]
    assert n["causal"][0] <= 300  # all but a third of the first numbers were fitted or tuned on


@pytest.mark.parametrize("penalties", [(), (0,), (-1.0,)])
def test_penalties_are_positive(penalties):
    with pytest.raises(ValueError, match="penalties"):
        probe(penalties=penalties)
