"""Cases of input: specs, overrides, names, paths and arguments.

Named cases are the faults that were seen, each an example of a class; the others are drawn: a valid
spec or command line with one to three random changes.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from campaign import Case

RECIPE: dict[str, Any] = {
    "name": "small",
    "task": {
        "kind": "four_digit_addition",
        "n_train": 40,
        "n_held_out": 10,
        "noise": {"kind": "uniform_wrong", "rate": 0.2},
    },
    "architecture": {"n_layers": 2, "d_model": 8, "n_heads": 2},
    "optimisation": {"n_steps": 2, "batch_size": 20, "evaluate_every": 2, "device": "cpu"},
}
WORLD: dict[str, Any] = RECIPE | {
    "name": "world",
    "task": {
        "kind": "two_hop_reasoning",
        "n_entities": 6,
        "n_relations": 3,
        "noise": {"kind": "permuted", "rate": 0.2},
    },
}
SPEC: dict[str, Any] = {
    "name": "tiny",
    "question": "Does it?",
    "training": RECIPE,
    "seeds": [0],
    "checkpoints": {"before": "initial", "after": "final"},
    "examples": {"noisy": {"noisy": True, "n": 2}},
    "analyses": [
        {
            "kind": "patch_grid",
            "site": "z",
            "layer": {"each": "all"},
            "source": {"checkpoint": "before"},
            "measures": ["accuracy_true"],
            "control": {"kind": "random_direction", "n": 2},
        },
        {"kind": "dynamics"},
    ],
    "figures": [{"kind": "curves", "table": "dynamics"}],
    "quantities": {
        "rest": {
            "table": "patch_grid",
            "where": {"place": "all", "prefix": "given", "condition": "intervened", "layer": 0},
        }
    },
    "claims": [
        {"id": "C1", "says": "it is", "holds_when": [{"quantity": "rest", "at_least": 0.1}]}
    ],
    "answer": "{rest.number}",
}
FILES = {"tiny.yaml": SPEC, "small.yaml": RECIPE, "world.yaml": WORLD}
NOTHING = lambda folder: None  # noqa: E731


def written(folder: Path) -> None:
    """The valid files of every case."""
    for name, content in FILES.items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def shown(text: str) -> str:
    """A text as the name of a case quotes it."""
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)})"


def case(
    name: str,
    area: str,
    *arguments: str,
    change: Callable[[Path], object] = NOTHING,
    **fields: Any,
) -> Case:
    """A case with the valid files in its folder.

    Args:
        name: of the case.
        area: of the case.
        arguments: of `mechmem`.
        change: is called with the folder, to damage something.
        fields: of the Case.
    """

    def prepare(folder: Path) -> Sequence[str]:
        written(folder)
        change(folder)
        return arguments

    return Case(f"{area}: {name}", area, prepare, **fields)


def cases(seed: int) -> Iterator[Case]:
    """All cases of this module; the drawn ones depend on the seed."""
    yield from valid()
    yield from bad_text()
    yield from bad_values()
    yield from bad_files()
    yield from bad_names()
    yield from bad_arguments()
    yield from drawn(random.Random(seed))


def valid() -> Iterator[Case]:
    for command, file in (("check", "tiny"), ("check", "small"), ("check", "world")):
        yield case(f"{command} {file}", "valid", command, f"{file}.yaml", must="pass")
    yield case("list", "valid", "list", must="pass")
    yield case("run", "valid", "run", "tiny.yaml", must="pass")
    yield case("train", "valid", "train", "world.yaml", must="pass")
    yield case("the largest seed", "valid", "run", "tiny.yaml", f"seeds=[{2**63 - 1}]", must="pass")


# What a file may contain

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
TEXTS: dict[str, str | bytes] = {
    "alias bomb": BOMB,
    "alias in itself": "a: &a [*a]",
    "alias in itself at the top": "&a [*a]",
    "merge onto itself": "a: &x\n  <<: *x\n",
    "unknown alias": "a: *b",
    "anchor twice": "a: &x 1\nb: &x 2",
    "300 lists": "question: " + "[" * 300 + "]" * 300,
    "300 mappings": "question: " + "{a: " * 300 + "}" * 300,
    "300 items": "question:\n" + "- " * 300,
    "100,000 brackets": "[" * 100_000,
    "unknown tag": "question: !foo [0]",
    "python tag": "question: !!python/object/apply:os.system [touch ../executed]",
    "set tag": "question: !!set {a, b}",
    "directive": "%YAML 1.1\n---\nname: yes",
    "two documents": "name: a\n---\nname: b",
    "5,000 digits": "seeds: [" + "9" * 5000 + "]",
    "5,000 hexadecimal digits": "seeds: [0x" + "f" * 5000 + "]",
    "lone surrogate": 'question: "\\ud800"',
    "null character": 'name: "a\\0b"',
    "escape code": 'question: "\\e[2J"',
    "raw escape code": b"question: \x1b[2J",
    "not UTF-8": b"question: \xff\xfe",
    "UTF-16": "question: a".encode("utf-16"),
    "a key that is a mapping": "? {a: b}\n: c",
    "keys of keys": "? " * 40,
    "a key that is a number": "1: a",
    "a key that is null": "~: a",
    "not a date": "question: 2001-99-99",
    "a date": "question: 2001-01-01",
    "half a number": "seeds: [0b_]",
    "tabs": "question:\t\n\t- a",
    "empty": "",
    "only a comment": "# nothing",
    "a list": "- a",
    "a word": "word",
    "10 MB": "question: " + "x" * 10_000_000,
    "10 MB of items": "seeds: [" + "0, " * 3_300_000 + "]",
    "300,000 lines": "#\n" * 300_000,
    "300,000 items": "seeds: [" + "0," * 300_000 + "]",
    "a long word": "question: " + "x" * 900_000,
    "a long key": "x" * 900_000 + ": 1",
    "a quoted text that never ends": "question: 'abc",
    "brackets that never end": "seeds: [0, 1",
    "random bytes": random.Random(7).randbytes(3000),
}


def bad_text() -> Iterator[Case]:
    for name, text in TEXTS.items():
        content = text.encode() if isinstance(text, str) else text

        def change(folder: Path, content: bytes = content) -> None:
            (folder / "tiny.yaml").write_bytes(content)

        for command in ("check", "train"):
            yield case(
                f"{name} ({command})",
                "text",
                command,
                "tiny.yaml",
                change=change,
                must="be refused",
                seconds=12,
            )


# What a value may be

VALUES = [
    ("seeds=[-1]", "be refused"),
    (f"seeds=[{2**63}]", "be refused"),
    (f"seeds=[{2**64}]", "be refused"),
    (f"seeds={list(range(5000))}", "be refused"),
    ("seeds=[]", "be refused"),
    ("seeds=[1.5]", "be refused"),
    ("seeds=[.nan]", "be refused"),
    ("training=''", "be refused"),
    ("training='*'", "be refused"),
    ("training='fda_s*'", "be refused"),
    ("training='[a-z]*'", "be refused"),
    ("training=/etc/passwd", "be refused"),
    ("training=../tiny", "be refused"),
    ("training=.", "be refused"),
    ("training=..", "be refused"),
    ("training=tiny", "be refused"),
    ("training=null", "be refused"),
    ("training={}", "be refused"),
    ("training.name=''", "be refused"),
    ("training.name=../x", "be refused"),
    (f"training.name={'x' * 300}", "be refused"),
    (f"name={'x' * 300}", "be refused"),
    ("name=../x", "be refused"),
    ("training.device=cuda", "be refused"),
    ("training.optimisation.device=cuda", "either"),
    ("training.optimisation.device=mps", "either"),
    ("device=mps", "either"),
    ("analyses.0.measures=[]", "be refused"),
    ("analyses.0.measures=['*']", "be refused"),
    ("analyses=[]", "be refused"),
    ("quantities.rest.value=condition", "be refused"),
    ("quantities.rest.value=place", "be refused"),
    ("claims.0.holds_when.0.at_least=.nan", "be refused"),
    ("claims.0.holds_when.0.at_least=.inf", "be refused"),
    ("claims.0.holds_when.0.at_least=-.inf", "be refused"),
    ("quantities.rest.where.layer=.nan", "be refused"),
    ("training.architecture.d_model=1000000", "be refused"),
    ("training.architecture.d_model=100000000000", "be refused"),
    ("training.architecture.n_layers=100000", "be refused"),
    ("training.architecture.d_mlp=1000000000000", "be refused"),
    ("training.architecture.d_head=1000000000000", "be refused"),
    ("training.architecture.n_heads=1000000000000", "be refused"),
    ("training.architecture.init_std=.inf", "be refused"),
    ("training.optimisation.n_steps=1e12", "be refused"),
    ("training.optimisation.n_steps=1000000000000", "be refused"),
    ("training.optimisation.batch_size=1000000000000", "be refused"),
    ("training.optimisation.learning_rate=.nan", "be refused"),
    ("training.optimisation.weight_decay=.inf", "be refused"),
    ("training.optimisation.max_grad_norm=.nan", "be refused"),
    ("training.task.n_train=1000000000000", "be refused"),
    ("training.task.n_train=10000000", "be refused"),
    ("training.task.noise.rate=.nan", "be refused"),
    ("training.task.seed=-1", "be refused"),
    ("training.task.noise.seed=-1", "be refused"),
    ("training.vary=[]", "either"),
    ("examples.noisy.n=1000000000000", "be refused"),
    ("examples.noisy.seed=-1", "be refused"),
    ("examples.noisy.skip=1000000000000", "be refused"),
    ("analyses.0.control.n=1e12", "be refused"),
    ("analyses.0.control.seed=-1", "be refused"),
    ("analyses.0.layer={each: []}", "be refused"),
    (f"analyses.0.layer={{each: {list(range(12000))}}}", "be refused"),
    ("memory=1e30", "be refused"),
    ("memory=-1", "be refused"),
    ("analyses.0={kind: ablation, n_random: 1000000000}", "be refused"),
    ("analyses.0={kind: token_replacement, n_draws: 1000000000}", "be refused"),
    ("training.task={kind: two_hop_reasoning, n_entities: 1000000000}", "be refused"),
    ("training.task={kind: two_hop_reasoning, n_entities: 100000}", "be refused"),
    ("training.task={kind: two_hop_reasoning, n_relations: 100000}", "be refused"),
    ("training.start={training: small, at: final}", "either"),
    ("plugins=[../../../etc/passwd]", "be refused"),
    ("answer='{rest.__class__}'", "be refused"),
    ("answer='{rest.number:999999999}'", "be refused"),
    ("answer='{rest.by_seed[0]}'", "be refused"),
]


def bad_values() -> Iterator[Case]:
    for override, must in VALUES:
        for command in ("check", "run"):
            name = f"{shown(override)} ({command})"
            yield case(name, "value", command, "tiny.yaml", override, must=must)


# Which files a name may mean


def linked(folder: Path) -> None:
    (folder / "loop.yaml").symlink_to("loop.yaml")


def bad_files() -> Iterator[Case]:
    kinds: dict[str, Callable[[Path], object]] = {
        "a pipe": lambda folder: os.mkfifo(folder / "p.yaml"),
        "a folder": lambda folder: (folder / "p.yaml").mkdir(),
        "a device": lambda folder: (folder / "p.yaml").symlink_to("/dev/zero"),
        "a link to itself": lambda folder: (folder / "p.yaml").symlink_to("p.yaml"),
        "a link to nothing": lambda folder: (folder / "p.yaml").symlink_to("nothing"),
        "nothing": NOTHING,
    }
    for name, change in kinds.items():
        for command in ("check", "run", "train"):
            yield case(
                f"{name} ({command})",
                "file",
                command,
                "p.yaml",
                change=change,
                must="be refused",
                seconds=10,
            )
    for path in ("/dev/stdin", "/dev/null", "/proc/self/mem", "x" * 5000, ".", "/", "", "~"):
        yield case(repr(shown(path)), "file", "check", path, must="be refused", seconds=10)

    def in_a_folder(folder: Path, name: str, text: str) -> None:
        (folder / "trainings").mkdir(exist_ok=True)
        (folder / "trainings" / name).write_text(text, encoding="utf-8")

    yield case(
        "a recipe is a pipe",
        "file",
        "check",
        "tiny.yaml",
        "training=pipe",
        change=lambda folder: os.mkfifo(folder / "pipe.yaml"),
        must="be refused",
    )
    yield case(
        "a recipe that starts from itself",
        "file",
        "check",
        "trainings/a.yaml",
        change=lambda folder: in_a_folder(
            folder, "a.yaml", json.dumps(RECIPE | {"start": {"training": "a"}})
        ),
        must="be refused",
    )

    def in_a_circle(folder: Path) -> None:
        for one, other in ("ab", "bc", "ca"):
            text = json.dumps(RECIPE | {"name": one, "start": {"training": other}})
            in_a_folder(folder, f"{one}.yaml", text)

    yield case(
        "recipes in a circle",
        "file",
        "check",
        "tiny.yaml",
        "training=a",
        change=in_a_circle,
        must="be refused",
    )
    yield case(
        "a spec with the name of its training",
        "file",
        "check",
        "fda_small.yaml",
        change=lambda folder: (folder / "fda_small.yaml").write_text(
            json.dumps(SPEC | {"training": "fda_small"}), encoding="utf-8"
        ),
        must="pass",
    )

    def elsewhere(folder: Path) -> None:
        (folder / "experiments" / "trainings").mkdir(parents=True)
        (folder / "experiments" / "trainings" / "theirs.yaml").write_text(
            json.dumps(RECIPE), encoding="utf-8"
        )

    yield case(
        "a recipe in the working directory's experiments",
        "file",
        "check",
        "tiny.yaml",
        "training=theirs",
        change=elsewhere,
        must="be refused",
    )


NAMES = (
    *(
        "",
        "*",
        "fda_s*",
        "?",
        "[a-z]*",
        ".",
        "..",
        "../fda_small",
        "/etc",
        "a/b",
        "~",
        "fda_small/",
    ),
    *("x" * 300, "\x1b[2J", "fda_small\n", "ä", "fda small", "-1", "None", "con", "%s", "{}"),
    *("fda_small-000000000000", "\ud800", "a\\b", "fda_small\t", "$HOME", "`id`", "'", '"'),
)


def bad_names() -> Iterator[Case]:
    for name in NAMES:
        for command in ("show", "draw", "shell"):
            title = f"{shown(name)!r} ({command})"
            yield case(title, "name", command, "--", name, must="be refused", seconds=20)
        yield case(
            f"{shown(name)!r} (fetch)",
            "name",
            *("fetch", "--seeds", "1", "--from", ".", "--", name),
            must="be refused",
            seconds=20,
        )


COMMANDS = ("run", "check", "train", "fetch", "list", "show", "draw", "shell", "schema", "ship")


def bad_arguments() -> Iterator[Case]:
    for command in COMMANDS:
        yield case(f"{command} --help", "arguments", command, "--help", must="pass")
        yield case(f"{command} --nonsense", "arguments", command, "--nonsense", must="be refused")
    refused = [
        ("nonsense",),
        ("run",),
        ("run", "tiny.yaml", "--memory", "9" * 5000),
        ("run", "tiny.yaml", "--memory", "1e400"),
        ("run", "tiny.yaml", "--memory", "9" * 400 + "TiB"),
        ("run", "tiny.yaml", "--device", "quantum"),
        ("run", "tiny.yaml", "--backend", ""),
        ("run", "tiny.yaml", "--runs", "tiny.yaml"),
        ("run", "tiny.yaml", "--runs", "/proc/none"),
        ("run", "tiny.yaml", "--runs", "x" * 300),
        ("train", "small.yaml", "--seed", "-1"),
        ("train", "small.yaml", "--seed", str(2**63)),
        ("train", "small.yaml", "--seed", "9" * 5000),
        ("train", "small.yaml", "--seed", "1.5"),
        ("show", "fda_small", "--seed", str(2**63)),
        ("show", "fda_small", "--seed", str(2**70)),
        ("fetch", "fda_small", "--seeds", "0-999999999999", "--from", "."),
        ("fetch", "fda_small", "--seeds", "9" * 5000, "--from", "."),
        ("fetch", "fda_small", "--seeds", "²", "--from", "."),
        ("fetch", "fda_small", "--seeds", "1", "--from", ""),
        ("fetch", "fda_small", "--seeds", "1", "--from", "file:///etc"),
        ("fetch", "fda_small", "--seeds", "1", "--from", "http://[::1"),
        ("ship", "fda_small", "0"),
    ]
    for arguments in refused:
        name = " ".join(map(shown, arguments))
        yield case(name, "arguments", *arguments, must="be refused", seconds=20)
    for override in (
        *("", "=", "=1", "a", ".=1", "..=1", "a.=1", ".a=1", "seeds.0.0=1", "seeds.99=1"),
        *("seeds.²=1", f"seeds.{'9' * 5000}=1", f"{'a.' * 5000}a=1", f"name={'x' * 10**5}"),
        *("name.a=1", "analyses.-1.kind=bars", "seeds=[", "seeds={", "seeds=*a", "seeds=!!int a"),
        *("seeds=&a [*a]", f"seeds={'[' * 300}", "\ud800=1", "name=\ud800", "question=\x1b[2J"),
        *("<<=1", "<<.a=1", "training.<<={a: b}", "1=2", "~=1", "{}=1", "[0]=1", "'=1"),
        *("seeds=\n- 0\n- a", "name=a: b", "__class__=1", "name=%YAML 1.1"),
    ):
        yield case(
            repr(shown(override)), "override", "check", "tiny.yaml", override, must="be refused"
        )


# Drawn cases

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 10**6, 2**31, 2**63, -(2**63), 2**64, 10**19, 0.5, 1e308),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        " ",
        "all",
        "*",
        "../x",
        "/etc/passwd",
        "a" * 999,
    ),
    *("ä", "{", "{rest}", "{rest.percent", "%s", "None", "\u202e", "1", "0x10", "final", "noisy"),
    *(
        [],
        {},
        [[]],
        [{}],
        {"": ""},
        {"each": "all"},
        {"each": []},
        {"each": [1, "a"]},
        [None],
        [0, 0],
    ),
    *(
        {"kind": "bars"},
        {"kind": None},
        {"kind": []},
        {"kind": "patch_grid"},
        {"a": {"b": {"c": 1}}},
    ),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all parts of a spec."""
    if at:
        yield at
    if not isinstance(value, (dict, list)):
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from places(part, (*at, key))


def part_of(value: Any, at: Sequence[Any]) -> Any:
    """The part of a spec at a place."""
    for key in at:
        value = value[key]
    return value


def damage(spec: dict[str, Any], draw: random.Random) -> None:
    """One random change of a spec."""
    at = draw.choice(list(places(spec)))
    parent, key = part_of(spec, at[:-1]), at[-1]
    change = draw.choice(("set", "set", "set", "remove", "move", "wrap", "add"))
    if change == "set":
        parent[key] = copy.deepcopy(draw.choice(ODD))
    elif change == "remove":
        del parent[key]
    elif change == "move":
        parent[key] = copy.deepcopy(part_of(spec, draw.choice(list(places(spec)))))
    elif change == "wrap":
        parent[key] = draw.choice([[parent[key]], {"each": [parent[key]]}, {"a": parent[key]}])
    elif isinstance(parent, dict):
        other = draw.choice([k for p in places(SPEC) if isinstance(k := p[-1], str)])
        parent[other] = copy.deepcopy(draw.choice(ODD))
    else:
        parent.append(copy.deepcopy(draw.choice(ODD)))


def as_yaml(value: Any) -> str:
    """A spec in YAML's flow style, with its words for the numbers that JSON lacks."""
    text = json.dumps(value, indent=1)
    for theirs, ours in (("-Infinity", "-.inf"), ("Infinity", ".inf"), ("NaN", ".nan")):
        text = text.replace(theirs, ours)
    return text


def drawn(draw: random.Random) -> Iterator[Case]:
    for i in range(260):
        file = draw.choice(("tiny.yaml", "tiny.yaml", "tiny.yaml", "small.yaml", "world.yaml"))
        spec = copy.deepcopy(FILES[file])
        for _ in range(draw.choice((1, 1, 2, 3))):
            if spec:
                damage(spec, draw)
        text = as_yaml(spec)
        yield case(f"{i} {file}", "drawn spec", "check", file, change=_writes(file, text.encode()))
    for i in range(120):
        text = bytearray(as_yaml(SPEC).encode())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(text))
            change = draw.choice(("byte", "cut", "double", "sign"))
            if change == "byte":
                text[at] = draw.randrange(256)
            elif change == "cut":
                del text[at : at + draw.randint(1, 30)]
            elif change == "double":
                text[at:at] = text[at : at + draw.randint(1, 200)]
            else:
                text[at:at] = draw.choice((b"&a ", b"*a ", b"!x ", b"- ", b": ", b"{", b"]", b"? "))
        yield case(f"{i}", "drawn bytes", "check", "tiny.yaml", change=_writes("tiny.yaml", text))
    for i in range(100):
        at = ".".join(map(str, draw.choice(list(places(SPEC)))))
        value = as_yaml(draw.choice(ODD)).replace("\n", " ")
        yield case(f"{i} {at[:40]}", "drawn override", "check", "tiny.yaml", f"{at}={value}")


def _writes(file: str, content: bytes | bytearray) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(bytes(content))
