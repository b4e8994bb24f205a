from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import json_schema as schemas
import pytest
from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from mechmem.analyses.effects.intervene import Intervene
from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.data.label_noise import Digit, LabelNoise, Systematic, UniformWrong
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.data.tasks.task import Task
from mechmem.experiment.claims import Condition
from mechmem.experiment.quantities import Quantity
from mechmem.experiment.spec import Experiment
from mechmem.experiment.study import Study  # noqa: F401 no registry loads it
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.patch_path import PatchPath, Receiver
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.models.architecture import Architecture
from mechmem.spec.errors import InputError
from mechmem.spec.json_schema import json_schema
from mechmem.spec.registry import Component, load_all
from mechmem.spec.sweep import each
from mechmem.spec.yaml_file import SpecFile, write_spec
from mechmem.training.recipe import Recipe

BEFORE = Source(checkpoint="before")


load_all()


def below(cls: type[Component]) -> Iterator[type[Component]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from below(subclass)


OURS = [cls for cls in below(Component) if cls.__module__.startswith("mechmem.")]
CONCRETE = {(cls.registry, cls.kind): cls for cls in OURS if not inspect.isabstract(cls)}
REGISTRIES = {cls.registry: cls for cls in OURS if cls.__bases__ == (Component,) and cls.registry}


def _blocks() -> list[tuple[str | None, str, Any]]:
    file = YAML(typ="safe", pure=True).load(Path(__file__).with_name("kinds.yaml"))
    registered = [
        (registry, block["kind"], block)
        for registry, blocks in file["registries"].items()
        for block in blocks
    ]
    return registered + [
        (None, kind, block) for kind, blocks in file["parts"].items() for block in blocks
    ]


BLOCKS = _blocks()
KEYS = list(dict.fromkeys((registry, kind) for registry, kind, _ in BLOCKS))
REGISTERED = [key for key in KEYS if key[0]]
CASES = [
    pytest.param((registry, kind), block, id=f"{registry or 'part'}-{kind}")
    for registry, kind, block in BLOCKS
]


def built(key: tuple[str | None, str], block: Any) -> Component:
    return CONCRETE[key].model_validate(block)


# Round trips, over every member of every registry


def test_every_kind_has_a_block_in_kinds_yaml():
    assert set(KEYS) == set(CONCRETE)
    assert set(REGISTRIES) == set(Component.registries)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[1])
def test_the_blocks_of_a_kind_leave_no_field_at_its_default(key):
    made = [built(key, block) for *of, block in BLOCKS if tuple(of) == key]
    for name, field in CONCRETE[key].model_fields.items():
        default = field.get_default(call_default_factory=True)
        is_free = not field.is_required() and not field.exclude
        assert not is_free or any(getattr(m, name) != default for m in made), name


@pytest.mark.parametrize(("key", "block"), CASES)
def test_object_to_block_and_back(key, block):
    made = built(key, block)
    assert built(key, made.block()) == made
    assert built(key, json.loads(json.dumps(made.block()))) == made
    assert built(key, made) is made


@pytest.mark.parametrize(("key", "block"), CASES)
def test_object_to_yaml_and_back(key, block, tmp_path):
    made = built(key, block)
    (tmp_path / "spec.yaml").write_text(write_spec(made))
    assert SpecFile(tmp_path / "spec.yaml").build(CONCRETE[key]) == made


@pytest.mark.parametrize(("key", "block"), CASES)
def test_the_block_says_what_the_file_says(key, block):
    """What is written of the parts is what the user wrote, with the defaults beside it."""
    written = built(key, block).block()
    for name, value in block.items():
        assert _agree(written[name], value), name


def _agree(written: Any, value: Any) -> bool:
    if isinstance(written, dict) and isinstance(value, str):  # a shorthand
        return value.startswith(written["kind"]) if "kind" in written else value == written["phase"]
    if isinstance(value, dict):
        return all(_agree(written[key], part) for key, part in value.items())
    if isinstance(value, list):
        return len(value) == len(written) and all(map(_agree, written, value))
    return written == value


@pytest.mark.parametrize(("key", "block"), CASES)
def test_equal_content_has_equal_hashes(key, block):
    made = built(key, block)
    again = built(key, made.block())
    assert hash(again) == hash(made)
    assert again.content_hash == made.content_hash


def test_other_content_has_another_hash():
    assert len(
        {built((registry, kind), block).content_hash for registry, kind, block in BLOCKS}
    ) == len(BLOCKS)


@pytest.mark.parametrize(("key", "block"), [case for case in CASES if case.values[0][0]])
def test_behind_its_shelf_a_kind_keeps_its_own_fields(key, block):
    made = TypeAdapter(REGISTRIES[key[0]]).validate_python(block)
    assert type(made) is CONCRETE[key]
    assert made == built(key, block)
    assert TypeAdapter(REGISTRIES[key[0]]).dump_python(made, mode="json") == made.block()


@pytest.mark.parametrize(("key", "block"), CASES)
def test_components_are_frozen(key, block):
    made = built(key, block)
    for name in type(made).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(made, name, getattr(made, name))


@pytest.mark.parametrize("key", REGISTERED, ids=lambda key: key[1])
def test_a_word_is_the_kind_with_its_defaults_where_it_has_them(key):
    if any(field.is_required() for field in CONCRETE[key].model_fields.values()):
        with pytest.raises(ValidationError, match="Field required"):
            TypeAdapter(REGISTRIES[key[0]]).validate_python(key[1])
    else:
        assert TypeAdapter(REGISTRIES[key[0]]).validate_python(key[1]) == CONCRETE[key]()


# Content


def test_content_hash_is_pinned():
    # it names run folders and blocks of every run there is: it may change only on purpose
    assert Condition(quantity="q", at_least=0.5).content_hash == "1bb1409eae63"


def test_content_hash_does_not_depend_on_the_order_of_keys():
    first, second = ({"a": 1, "b": "x"}, {"b": "x", "a": 1})
    assert Quantity(table="t", where=first) == Quantity(table="t", where=second)
    assert (
        Quantity(table="t", where=first).content_hash
        == Quantity(table="t", where=second).content_hash
    )


def test_two_kinds_of_the_same_fields_differ():
    assert UniformWrong() != Digit()
    assert UniformWrong().content_hash != Digit().content_hash
    assert len({UniformWrong(), Digit(), UniformWrong(rate=0.05)}) == 2


def test_a_base_typed_field_keeps_what_its_subclass_adds():
    recipes = [Recipe(task=FourDigitAddition(noise=Systematic(shift=shift))) for shift in (1, 2)]
    assert [recipe.block()["task"]["noise"]["shift"] for recipe in recipes] == [1, 2]
    assert recipes[0] != recipes[1]
    assert recipes[0].content_hash != recipes[1].content_hash


def test_a_block_and_a_call_are_one_object():
    block = {
        "task": {"kind": "four_digit_addition", "noise": "digit"},
        "architecture": {"n_layers": 3},
    }
    assert Recipe.model_validate(block) == Recipe(
        task=FourDigitAddition(noise=Digit()), architecture=Architecture(n_layers=3)
    )


# What cannot be


def errors(cls: type[Component], block: Any) -> dict[tuple[Any, ...], str]:
    with pytest.raises(ValidationError) as caught:
        cls.model_validate(block)
    return {error["loc"]: error["msg"] for error in caught.value.errors()}


def test_all_errors_come_at_once_each_with_its_place():
    block = {
        "task": {
            "kind": "four_digit_addition",
            "n_trian": 5,
            "noise": {"kind": "digt"},
            "seed": "x",
        },
        "architecture": {"d_modl": 8, "n_layers": 0},
        "optimisatin": {},
    }
    assert errors(Recipe, block) == {
        ("task", "n_trian"): "four_digit_addition has no key 'n_trian'; did you mean 'n_train'?",
        ("task", "noise", "value", "kind"): "there is no noise 'digt'; did you mean 'digit'?",
        ("task", "seed"): "Input should be a valid integer, unable to parse string as an integer",
        ("architecture", "d_modl"): "architecture has no key 'd_modl'; did you mean 'd_model'?",
        ("architecture", "n_layers", "value"): "Input should be greater than or equal to 1",
        ("optimisatin",): "recipe has no key 'optimisatin'; did you mean 'optimisation'?",
    }


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[1])
def test_an_unknown_key_is_refused_by_every_kind_with_its_own_keys(key):
    block = next(block for *of, block in BLOCKS if tuple(of) == key)
    found = errors(CONCRETE[key], block | {"zzzzz": 1})
    fields = ", ".join(CONCRETE[key].model_fields)
    known = f"choose from {fields}" if fields else "there are none"
    assert found == {("zzzzz",): f"{key[1]} has no key 'zzzzz'; {known}"}


@pytest.mark.parametrize("registry", REGISTRIES)
def test_an_unknown_kind_is_refused_with_those_that_there_are(registry):
    kinds = ", ".join(REGISTRIES[registry].kinds())
    assert errors(REGISTRIES[registry], {"kind": "zzzzz"}) == {
        ("kind",): f"there is no {registry} 'zzzzz'; choose from {kinds}"
    }
    article = "an" if registry in ("analysis", "intervention") else "a"
    message = f"{article} {registry} needs `kind:`; choose from {kinds}"
    assert errors(REGISTRIES[registry], {}) == {(): message}


@pytest.mark.parametrize("kind", [["a"], {"a": 1}, 3, True])
def test_a_kind_that_is_no_word_is_refused(kind):
    found = errors(Task, {"kind": kind})[("kind",)]
    assert found.startswith(f"there is no task {kind!r}; choose from ")


@pytest.mark.parametrize("value", [5, None, [], UniformWrong()])
def test_what_is_no_block_is_refused(value):
    assert errors(Task, value) == {(): "Input should be a valid dictionary or instance of Task"}


def test_another_kind_cannot_stand_where_one_is_wanted():
    assert errors(Digit, {"kind": "permuted"}) == {(): "kind must be 'digit' here"}


def test_text_in_a_message_is_no_template():
    assert errors(Recipe, {"task": {"kind": "{kind}"}})[("task", "kind")].startswith(
        "there is no task '{kind}'"
    )


# Registries


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("KL", "kl"),
        ("FourDigitAddition", "four_digit_addition"),
        ("NeuronTopK", "neuron_top_k"),
        ("TopKCurve", "top_k_curve"),
        ("INLPErasure", "inlp_erasure"),
        ("LEACE", "leace"),
        ("Layer2Patch", "layer2_patch"),
    ],
)
def test_the_kind_is_the_name_in_snake_case(name, kind):
    assert type(name, (Component,), {"__module__": "made_here"}).kind == kind


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_a_class_stands_on_its_shelf_if_and_only_if_it_is_concrete(cls):
    is_registered = cls in Component.registries.get(cls.registry or "", {}).values()
    assert is_registered == (cls.registry is not None and not inspect.isabstract(cls))


@pytest.fixture
def registries(monkeypatch):
    """Whatever a test puts on a registry is gone after it."""
    monkeypatch.setattr(
        Component,
        "registries",
        {registry: dict(members) for registry, members in Component.registries.items()},
    )


@pytest.mark.usefixtures("registries")
def test_a_class_without_a_method_that_it_needs_is_named_with_the_method():
    class Unfinished(Task):
        pass

    message = errors(Task, {"kind": "unfinished"})[("kind",)]
    assert message.startswith("there is no task 'unfinished'; its class Unfinished does not define")
    assert all(name in message for name in Task.__abstractmethods__)


@pytest.mark.usefixtures("registries")
def test_two_classes_cannot_be_the_same_kind():
    with pytest.raises(TypeError, match=r"are both the noise 'digit': rename one"):
        type("Digit", (Digit,), {"__module__": "a_plugin"})
    assert LabelNoise.kinds()["digit"] is Digit


@pytest.mark.usefixtures("registries")
def test_a_class_that_is_defined_again_takes_its_own_place():
    first, second = (
        type("Mine", (Digit,), {"__module__": "a_plugin", "__qualname__": "Mine"}) for _ in range(2)
    )
    assert first is not second
    assert LabelNoise.kinds()["mine"] is second


# Sweeps


def test_each_by_hand():
    grid = PatchGrid(site=each("z", "attn_out"), layer=each(), source=BEFORE)
    members = grid.expand({"layer": range(2)})
    assert [labels for labels, _ in members] == [
        {"site": "z", "layer": 0},
        {"site": "z", "layer": 1},
        {"site": "attn_out", "layer": 0},
        {"site": "attn_out", "layer": 1},
    ]
    for labels, member in members:
        assert member == PatchGrid(site=labels["site"], layer=labels["layer"], source=BEFORE)


def test_a_sweep_reaches_into_the_parts():
    inner = Patch(site="z", layer=each(0, 1), head=each(0, 1, 2), source=BEFORE)
    members = Intervene(model=each("a", "b"), intervention=RandomDisplacement(of=inner)).expand({})
    assert len(members) == 12
    labels, member = members[-1]
    assert labels == {"model": "b", "layer": 1, "head": 2}
    assert member == Intervene(
        model="b",
        intervention=RandomDisplacement(of=Patch(site="z", layer=1, head=2, source=BEFORE)),
    )


@pytest.mark.parametrize(("key", "block"), CASES)
def test_a_member_of_a_sweep_sweeps_nothing_and_differs_from_the_others_in_its_labels(key, block):
    made, sweep_domain = built(key, block), {"layer": (0, 1), "model": ("a", "b")}
    members = made.expand(sweep_domain)
    assert len({json.dumps(labels, default=repr) for labels, _ in members}) == len(members)
    assert len({member for _, member in members}) == len(members)
    for _, member in members:
        assert member.expand({}) == [({}, member)]
    assert (members == [({}, made)]) == ('"each"' not in json.dumps(made.block()))


def test_each_all_needs_to_know_all_of_what():
    with pytest.raises(
        InputError, match=r"`layer: \{each: all\}` is not defined for this field; list the values"
    ):
        PatchGrid(site="z", layer=each(), source=BEFORE).expand({"head": (0, 1)})


@pytest.mark.parametrize(
    ("block", "swept"),
    [
        ({"each": [[0, 1], [0], 1]}, each((0, 1), (0,), 1)),
        ({"each": "all"}, each()),
        ({"each": [None, 0]}, each(None, 0)),
    ],
)
def test_a_swept_block_and_a_swept_call_are_one_object(block, swept):
    from_block, from_call = (
        PatchGrid(site="z", layer=layer, source=BEFORE) for layer in (block, swept)
    )
    assert from_block == from_call
    assert from_block.content_hash == from_call.content_hash


def test_swept_parts_are_the_same_from_a_block_and_from_a_call():
    sender = Patch(site="z", layer=0, source=BEFORE)
    swept = PatchPath(
        sender=sender, receivers=each((Receiver(site="logits"),), (Receiver(site="q", layer=1),))
    )
    block = {"each": [[{"site": "logits"}], [{"site": "q", "layer": 1}]]}
    assert PatchPath(sender=sender, receivers=block) == swept
    assert [member.receivers for _, member in swept.expand({})] == [*swept.receivers.each]


@pytest.mark.parametrize(
    ("layer", "place", "message"),
    [
        ({"each": [0, "x"]}, 1, "Input should be a valid integer"),
        ({"each": []}, "each", "Value error, a sweep needs at least one value"),
        ({"each": "al"}, "all", "Input should be 'all'"),
        ({"each": 5}, "values", "Input should be a valid tuple"),
        ({"each": [0], "layer": 1}, "layer", "Extra inputs are not permitted"),
    ],
)
def test_a_sweep_of_what_cannot_be_is_refused_at_once(layer, place, message):
    found = errors(PatchGrid, {"site": "z", "layer": layer, "source": {"checkpoint": "before"}})
    assert any(place in loc and text.startswith(message) for loc, text in found.items())
    assert all(loc[0] == "layer" for loc in found)


def test_a_member_that_cannot_be_is_named():
    recipe = Recipe(
        task=FourDigitAddition(), architecture=Architecture(d_model=each(8, 12, 10), n_heads=4)
    )
    with pytest.raises(
        InputError, match=r"with d_model 10: .*d_model 10 is not a multiple of n_heads 4"
    ):
        recipe.expand({})


# The schema that editors use


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """Made when it is first needed: other test files may add kinds while tests are collected."""
    return json_schema(Experiment)


def test_every_shelf_in_the_schema_is_one_of_its_real_kinds(schema):
    for registry, members in Component.registries.items():
        refs = [{"$ref": f"#/$defs/{registry}.{kind}"} for kind in members]
        assert schema["$defs"][registry] == {"oneOf": [*refs, {"type": "string"}]}
        for kind, member in members.items():
            body = schema["$defs"][f"{registry}.{kind}"]
            assert body["properties"].keys() >= {"kind", *member.model_fields}
            assert body["properties"]["kind"] == {"const": kind}


def test_every_reference_in_the_schema_leads_somewhere(schema):
    def references(node: Any) -> Iterator[str]:
        for key, part in (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list)
            else ()
        ):
            yield from [part] if key == "$ref" else references(part)

    found = set(references(schema))
    assert "#/$defs/task" in found
    assert all(schemas.at(reference, schema) for reference in found)
    assert "x-registry" not in json.dumps(schema)


@pytest.mark.parametrize(("key", "block"), [case for case in CASES if case.values[0][0]])
def test_the_schema_takes_every_kind_as_written_and_as_read(schema, key, block):
    for written in (block, built(key, block).block()):
        assert schemas.is_valid(written, {"$ref": f"#/$defs/{key[0]}"}, schema)
        assert not schemas.is_valid(written | {"zzzzz": 1}, {"$ref": f"#/$defs/{key[0]}"}, schema)
        assert not schemas.is_valid(
            written | {"kind": "zzzzz"}, {"$ref": f"#/$defs/{key[0]}"}, schema
        )
        kindless = {name: value for name, value in written.items() if name != "kind"}
        assert not schemas.is_valid(kindless, {"$ref": f"#/$defs/{key[0]}"}, schema)


EXPERIMENT = next(block for _, kind, block in BLOCKS if kind == "experiment")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": "fda_small", "also": ["thr_small"]},
        {"checkpoints": {"a": {"phase": "final", "training": "b"}}},
    ],
)
def test_the_schema_takes_an_experiment(schema, changes):
    assert schemas.is_valid(EXPERIMENT | changes, schema, schema)


@pytest.mark.parametrize(
    "changes",
    [
        {"sedes": [1]},
        {"analyses": []},
        {"analyses": [{"kind": "curves", "table": "dynamics"}]},
        {"seeds": ["a"]},
        {"checkpoints": {"before": "generalized"}},
        {"examples": {"noisy": {"split": "train", "n": 0}}},
        {"name": "a/b"},
    ],
)
def test_the_schema_refuses_what_an_experiment_refuses(schema, changes):
    assert not schemas.is_valid(EXPERIMENT | changes, schema, schema)
    with pytest.raises(ValidationError):
        Experiment.model_validate(EXPERIMENT | changes)


EXPERIMENTS = sorted(
    path
    for path in Path("experiments").rglob("*.yaml")
    if path.parent.name != "trainings" and path.name != "study.yaml"
)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_the_schema_takes_every_experiment_of_ours(schema, path):
    assert schemas.is_valid(YAML(typ="safe", pure=True).load(path), schema, schema)


def test_a_value_that_is_swept_twice_is_refused():
    with pytest.raises(ValidationError, match="1 is listed twice"):
        each(0, 1, 1)
