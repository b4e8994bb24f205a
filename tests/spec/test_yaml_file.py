from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechmem.data.label_noise import Digit
from mechmem.experiment.claims import Claim
from mechmem.experiment.quantities import Quantity
from mechmem.spec.yaml_file import SpecError, SpecFile, write_spec
from mechmem.training.recipe import Recipe

RECIPE = """\
# a comment
name: small
task:
  kind: four_digit_addition
  n_train: 50
  noise: {kind: digit, rate: 0.1}
optimisation:
  learning_rate: 1e-3
  betas: [0.9, 0.98]
"""


@pytest.fixture
def spec(tmp_path: Path):
    """Makes a spec file of this text."""

    def make(text: str, *overrides: str, name: str = "spec.yaml") -> SpecFile:
        (tmp_path / name).write_text(text)
        return SpecFile(tmp_path / name, overrides)

    return make


def test_a_file_is_the_object_that_it_describes(spec):
    recipe = spec(RECIPE).build(Recipe)
    assert recipe.task.noise == Digit(rate=0.1)
    assert recipe.optimisation.learning_rate == 0.001
    assert recipe == Recipe.model_validate(
        {
            "name": "small",
            "task": {
                "kind": "four_digit_addition",
                "n_train": 50,
                "noise": {"kind": "digit", "rate": 0.1},
            },
            "optimisation": {"learning_rate": 0.001, "betas": (0.9, 0.98)},
        }
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("010", 10),
        ("0o10", 8),
        ("1:30", "1:30"),
        ("~", None),
        ("'1'", "1"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(spec, text, value):
    found = spec(f"value: {text}\n").data["value"]
    assert found == value
    assert isinstance(found, type(value))


# Every error says where: file:line:column, the path in the spec, and what instead.
@pytest.mark.parametrize(
    ("old", "new", "at", "says"),
    [
        (
            "n_train",
            "n_trian",
            "5:3: task.n_trian",
            "four_digit_addition has no key 'n_trian'; did you mean 'n_train'?",
        ),
        (
            "rate:",
            "rote:",
            "6:24: task.noise.rote",
            "digit has no key 'rote'; did you mean 'rate'?",
        ),
        (
            "kind: digit",
            "kind: digits",
            "6:11: task.noise.kind",
            "there is no noise 'digits'; did you mean 'digit'?",
        ),
        (
            "four_digit_addition",
            "zzz",
            "4:3: task.kind",
            "there is no task 'zzz'; choose from four_digit_addition, two_hop",
        ),
        ("four_digit_addition", "[a]", "4:3: task.kind", "there is no task ['a']; choose"),
        (
            "  kind: four_digit_addition\n",
            "",
            "3:1: task",
            "a task needs `kind:`; choose from four_digit_addition, two_hop",
        ),
        (
            "rate: 0.1",
            "rate: 2",
            "6:24: task.noise.rate",
            "Input should be less than or equal to 1",
        ),
        ("[0.9, 0.98]", "[0.9, b]", "9:16: optimisation.betas.1", "Input should be a valid number"),
        ("name: small", "nam: small", "2:1: nam", "recipe has no key 'nam'; did you mean 'name'?"),
        ("task:", "tusk:", "1:1", "'task' is missing"),
        (
            "optimisation:",
            "optimisation: 5\nx:",
            "7:1: optimisation",
            "Input should be a valid dictionary or instance of Optimisation",
        ),
    ],
)
def test_what_is_wrong_has_its_place_and_the_nearest_name(spec, old, new, at, says):
    assert RECIPE.count(old) >= 1
    file = spec(RECIPE.replace(old, new, 1))
    with pytest.raises(SpecError) as caught:
        file.build(Recipe)
    line = next(
        line for line in str(caught.value).splitlines() if line.startswith(f"{file.path}:{at}: ")
    )
    assert line.removeprefix(f"{file.path}:{at}: ").startswith(says)


def test_all_errors_are_told_at_once(spec):
    text = (
        RECIPE.replace("n_train", "n_trian")
        .replace("rate:", "rote:")
        .replace("learning_rate", "lerning_rate")
    )
    with pytest.raises(SpecError) as caught:
        spec(text).build(Recipe)
    assert [re.search(r":(\d+):\d+: ", line)[1] for line in str(caught.value).splitlines()] == [
        "5",
        "6",
        "8",
    ]


def test_a_list_is_not_called_too_short_when_its_items_are_wrong(spec):
    text = "id: C1\nsays: it\nholds_when:\n  - {quantity: q, at_last: 1}\n"
    with pytest.raises(SpecError) as caught:
        spec(text).build(Claim)
    assert "too_short" not in str(caught.value)
    assert "a list needs" not in str(caught.value)
    assert "holds_when.0.at_last: condition has no key 'at_last'; did you mean 'at_least'?" in str(
        caught.value
    )


def test_a_list_that_is_too_short_is_called_so(spec):
    with pytest.raises(SpecError, match="holds_when: a list needs at least 1 item"):
        spec("id: C1\nsays: it\nholds_when: []\n").build(Claim)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\n", ':2:1: found duplicate key "name"'),
        ("task: {kind: a, kind: b}\n", ':1:17: found duplicate key "kind"'),
        ("a: [1\nb: 2\n", ":2:2: expected ',' or ']'"),
        ("a: 1\n  b: 2\n", ":2:4: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", ":2:1: but found another document"),
        ("a: \x01\n", ": not valid YAML: unacceptable character"),
        ("", ":1:1: a spec must be a mapping"),
        ("- a\n- b\n", ":1:1: a spec must be a mapping"),
        ("text\n", ":1:1: a spec must be a mapping"),
    ],
)
def test_what_is_no_mapping_is_refused_with_its_place(spec, tmp_path, text, says):
    with pytest.raises(SpecError, match=re.escape(f"{tmp_path / 'spec.yaml'}{says}")):
        spec(text)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "spec.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"spec\.yaml:1: byte 0xff is not UTF-8"):
        SpecFile(tmp_path / "spec.yaml")


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    (tmp_path / "fda_patching.yaml").write_text(RECIPE)
    (tmp_path / "other.yaml").write_text(RECIPE)
    with pytest.raises(
        SpecError, match=re.escape(f"did you mean {tmp_path / 'fda_patching.yaml'}?")
    ):
        SpecFile(tmp_path / "fda_patchng.yaml")


@pytest.mark.parametrize("folder", [".", "gone"])
def test_a_missing_file_in_a_folder_without_specs(tmp_path, folder):
    path = tmp_path / folder / "a.yaml"
    with pytest.raises(
        SpecError, match=re.escape(f"{path} does not exist; {path.parent} holds no .yaml file")
    ):
        SpecFile(path)


def test_a_folder_is_no_spec(tmp_path):
    with pytest.raises(
        SpecError, match=re.escape(f"{tmp_path} is a folder; name a .yaml file in it")
    ):
        SpecFile(tmp_path)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("name=other", ["name"], "other"),
        ("task.n_train=7", ["task", "n_train"], 7),
        ("task.noise.rate=1e-2", ["task", "noise", "rate"], 0.01),
        ("optimisation.betas.1=0.5", ["optimisation", "betas", 1], 0.5),
        ("optimisation.betas=[0.1, 0.2]", ["optimisation", "betas"], [0.1, 0.2]),
        ("optimisation.stop_at={memorised: 0.9}", ["optimisation", "stop_at"], {"memorised": 0.9}),
        ("optimisation.stop_at.memorised=0.9", ["optimisation", "stop_at", "memorised"], 0.9),
        ("architecture.n_layers=3", ["architecture", "n_layers"], 3),
        ("architecture.norm=", ["architecture", "norm"], None),
        ("architecture.attn_only=true", ["architecture", "attn_only"], True),
    ],
)
def test_overrides_replace_what_the_file_says(spec, override, path, value):
    file = spec(RECIPE, override)
    node: Any = file.data
    for part in path:
        node = node[part]
    assert node == value
    assert isinstance(node, type(value))
    file.build(Recipe)


def test_an_override_ends_at_its_first_equals_sign(spec):
    assert spec(RECIPE, "name=a=b").data["name"] == "a=b"


def test_later_overrides_win_and_can_go_into_earlier_ones(spec):
    file = spec(
        RECIPE,
        "optimisation={n_steps: 5, batch_size: 6}",
        "optimisation.n_steps=7",
        "name=a",
        "name=b",
    )
    recipe = file.build(Recipe)
    assert (recipe.name, recipe.optimisation.n_steps, recipe.optimisation.batch_size) == ("b", 7, 6)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("name", "override 'name' is not of the form key.sub=value"),
        ("=1", "override '=1' is not of the form key.sub=value"),
        ("optimisation.betas.2=1", "has nothing at 2"),
        ("optimisation.betas.first=1", "has nothing at 'first'"),
        ("optimisation.betas.2.x=1", "has nothing at 2"),
        ("name.x=1", "has nothing at 'x'"),
        ("name.x.y=1", "has nothing at 'x'"),
        ("name=[1", "override 'name=[1': the value:1:3: expected ',' or ']'"),
        ("name={a: 1, a: 2}", "found duplicate key"),
    ],
)
def test_overrides_that_cannot_be_are_refused(spec, override, says):
    with pytest.raises(SpecError, match=re.escape(says)):
        spec(RECIPE, override)


@pytest.mark.parametrize(
    ("override", "at", "says"),
    [
        ("nam=x", "override 'nam=x': nam", "recipe has no key 'nam'; did you mean 'name'?"),
        (
            "optimisation.n_step=5",
            "override 'optimisation.n_step=5': optimisation.n_step",
            "optimisation has no key 'n_step'",
        ),
        (
            "task.n_train=0",
            "override 'task.n_train=0': task.n_train",
            "Input should be greater than or equal to 1",
        ),
        (
            "task.noise={kind: digt}",
            "override 'task.noise={kind: digt}': task.noise.kind",
            "there is no noise 'digt'",
        ),
    ],
)
def test_an_error_that_an_override_made_says_so(spec, override, at, says):
    with pytest.raises(SpecError, match=re.escape(f"{at}: {says}")):
        spec(RECIPE, override).build(Recipe)


@pytest.mark.parametrize(
    "overrides", [(), ("name=!!python/object/apply:os.system ['touch pwned']",)]
)
@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/object/new:os.system ['touch pwned']",
        "!!python/name:os.system ''",
        "!!python/module:this ''",
        "!run touch pwned",
    ],
)
def test_no_tag_runs_code(spec, tmp_path, monkeypatch, value, overrides):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "system", lambda _: Path("pwned").touch())
    with pytest.raises(SpecError):
        spec(RECIPE.replace("name: small", f"name: {value}"), *overrides).build(Recipe)
    assert not Path("pwned").exists()


def test_written_with_every_default_in_the_order_of_the_fields(spec):
    written = write_spec(spec(RECIPE).build(Recipe))
    lines = [line for line in written.splitlines() if not line.startswith((" ", "-"))]
    assert [line.partition(":")[0] for line in lines] == [*Recipe.model_fields]
    assert lines[:4] == ["name: small", "task:", "architecture:", "optimisation:"]
    assert "true_labels: false" in lines
    assert "    rate: 0.1\n" in written
    assert "  n_warmup_steps: 100\n" in written


# Control characters are refused; ruamel.yaml 0.19 folds the line breaks of Unicode into spaces.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"))


@settings(max_examples=25)
@given(text=TEXT, key=TEXT, number=st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_written_is_read_as_the_same_object(tmp_path_factory, text, key, number):
    quantity = Quantity(
        table=text, where={key: number, "word": text, "flag": True, "count": 3}, value=key
    )
    path = tmp_path_factory.mktemp("written", numbered=True) / "q.yaml"
    path.write_bytes(write_spec(quantity).encode())
    found = SpecFile(path).build(Quantity)
    assert found == quantity
    assert found.content_hash == quantity.content_hash  # which tells 1, 1.0 and true apart


@pytest.mark.parametrize(
    "word",
    [
        "1e-3",
        "yes",
        "null",
        "~",
        "0x10",
        "01",
        "1_000",
        ".inf",
        "2020-01-01",
        "=",
        "<<",
        "- a",
        "a: b",
        "#",
        " ",
        "true",
        "!x",
        "&a",
        "*a",
        "\n\t",
        "\ufeff",
        "é∅",
    ],
)
def test_words_that_look_like_something_else_stay_words(spec, word):
    quantity = Quantity(table=word, where={word: word})
    assert spec(write_spec(quantity)).build(Quantity) == quantity
