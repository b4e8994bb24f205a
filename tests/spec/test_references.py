from __future__ import annotations

import pytest
from pydantic import ValidationError

from mechmem.spec.references import CheckpointName, ExampleSetName, References, references_of
from mechmem.spec.registry import Component
from mechmem.spec.sweep import Swept, each
from mechmem.spec.yaml_file import SpecFile, write_spec


class Donor(Component):
    checkpoint: CheckpointName | None = None
    examples: ExampleSetName | None = None
    word: str = "after"


class Question(Component):
    model: Swept[CheckpointName] = "after"
    examples: Swept[ExampleSetName | None] = "noisy"
    also: tuple[ExampleSetName, ...] = ()
    named: dict[str, ExampleSetName] = {}
    donor: Donor = Donor()
    donors: tuple[Donor, ...] = ()
    method: Swept[str] = "mean"


FULL = Question(
    model=each("before", "final"),
    examples="clean",
    also=("held_out", "other"),
    named={"key": "value"},
    donor=Donor(checkpoint="donor", examples="donated"),
    donors=(Donor(checkpoint="first"), Donor(examples="second")),
    method=each("zero", "mean"),
)


def test_defaults_are_references_and_other_words_are_not():
    assert Question().references() == References(frozenset({"after"}), frozenset({"noisy"}))
    assert Donor().references() == References()


def test_references_are_found_in_sweeps_tuples_mappings_and_nested_components():
    found = FULL.references()
    assert found.checkpoints == {"before", "final", "donor", "first"}
    assert found.examples == {"clean", "held_out", "other", "value", "donated", "second"}
    assert not found.every_checkpoint
    assert not found.every_example_set


@pytest.mark.parametrize("question", [Question(), FULL])
def test_a_name_keeps_its_type_on_every_way(question, tmp_path):
    (tmp_path / "q.yaml").write_text(write_spec(question))
    read = SpecFile(tmp_path / "q.yaml").build(Question)
    for made in (question, Question.model_validate(question.block()), read):
        assert made == question
        assert made.references() == question.references()
        for _, member in made.expand({}):
            assert type(member.model) is CheckpointName
            assert type(member.examples) is ExampleSetName


def test_the_members_of_a_sweep_refer_to_what_the_sweep_refers_to():
    members = [member.references() for _, member in FULL.expand({})]
    joined = members[0]
    for one in members[1:]:
        joined |= one
    assert joined == FULL.references()


@pytest.mark.parametrize(
    ("field", "every"),
    [
        ("model", (True, False)),
        ("examples", (False, True)),
        ("method", (False, False)),
    ],
)
def test_each_all_refers_to_every_name_of_the_field_s_type(field, every):
    found = Question(**{field: {"each": "all"}}).references()
    assert (found.every_checkpoint, found.every_example_set) == every
    written_out = found.within(checkpoints=["a", "b"], examples=["c"])
    assert ({"a", "b"} <= written_out.checkpoints, "c" in written_out.examples) == every
    assert not written_out.every_checkpoint
    assert not written_out.every_example_set


def test_a_component_may_say_itself_what_it_refers_to():
    class Special(Component):
        def references(self) -> References:
            return References(examples=frozenset({"special"}))

    assert references_of((Special(), FULL)) == FULL.references() | Special().references()


def test_a_name_is_a_string_to_everything_else():
    assert Question().block()["model"] == "after"
    assert type(Question().block()["model"]) is str
    properties = Question.model_json_schema()["properties"]
    assert {"type": "string"} in properties["model"]["oneOf"]
    with pytest.raises(ValidationError, match="valid string"):
        Question(also=[3])
