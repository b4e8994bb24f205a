"""Cases of stored files: a tiny training and a run of it, damaged in every way, then used."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny
from campaign import Case, Outcome

Damage = Callable[[Path, random.Random], None]
N_RANDOM = 3
"""Draws of each random damage to each file, for each command."""


def cases(seed: int) -> Iterator[Case]:
    """All cases of this module."""
    yield from _damaged(seed)
    yield from _forged(seed)
    yield from _interrupted(seed)
    yield from _linked()
    yield from _hostile()


# What is damaged, and how


FILES: dict[str, tuple[str, Sequence[str]]] = {
    "checkpoint": (
        "trainings/small-*/seed_0/checkpoints/step_000006.safetensors",
        ("run anew", "train", "show the training"),
    ),
    "training.json": (
        "trainings/small-*/seed_0/training.json",
        ("run", "train", "show the training"),
    ),
    "recipe.yaml": ("trainings/small-*/seed_0/recipe.yaml", ("train", "show the training")),
    "run.json": ("tiny-*/run.json", ("run", "show the run", "draw")),
    "experiment.yaml": ("tiny-*/experiment.yaml", ("run", "show the run", "draw")),
    "table": ("tiny-*/tables/patch_grid.parquet", ("run", "show the run", "draw")),
    "cells": ("cells/*/*.parquet", ("run",)),
    "rules": ("rules/tiny.json", ("run",)),
    "figure": ("tiny-*/figures/*.json", ("run", "draw")),
}
"""By the name of a file: where it is, and the commands that may meet it."""


def cut(path: Path, rng: random.Random) -> None:
    """Keep the beginning."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def overwrite(path: Path, rng: random.Random) -> None:
    """Random bytes in place of up to 64."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at : at + 64] = rng.randbytes(64)
    path.write_bytes(content)


def replaced_by(content: bytes) -> Damage:
    return lambda path, rng: path.write_bytes(content) and None


def delete(path: Path, rng: random.Random) -> None:
    """Delete the file."""
    path.unlink()


def folder_instead(path: Path, rng: random.Random) -> None:
    """A folder of this name."""
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path, rng: random.Random) -> None:
    """A pipe, on which a reader would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def link_to_nothing(path: Path, rng: random.Random) -> None:
    """A link that leads nowhere."""
    path.unlink()
    path.symlink_to("nowhere")


RANDOM: dict[str, Damage] = {"cut": cut, "flipped": flip, "overwritten": overwrite}
OTHER: dict[str, Damage] = {
    "empty": replaced_by(b""),
    "zeros": replaced_by(bytes(5000)),
    "text": replaced_by("∅ no such format\n".encode()),
    "a list": replaced_by(b"[]"),
    "nested": replaced_by(b"[" * 50_000),
    "deleted": delete,
    "a folder": folder_instead,
    "a pipe": pipe_instead,
    "a dead link": link_to_nothing,
}


def _damaged(seed: int) -> Iterator[Case]:
    for file, (pattern, commands) in FILES.items():
        for command in commands:
            for damage, change in RANDOM.items():
                for i in range(N_RANDOM):
                    yield _case(file, pattern, command, f"{damage} {i}", change, seed)
            for damage, change in OTHER.items():
                yield _case(file, pattern, command, damage, change, seed)


def _case(file: str, pattern: str, command: str, damage: str, change: Damage, seed: int) -> Case:
    name = f"{file}, {damage}: {command}"

    def prepare(folder: Path) -> Sequence[str]:
        runs, rng = tiny.copied(folder), random.Random(f"{seed} {name}")
        change(rng.choice(sorted(runs.glob(pattern))), rng)
        if command == "run anew":
            for made in (runs / "cells", *runs.glob("tiny-*")):
                shutil.rmtree(made)
        return tiny.COMMANDS[command.removesuffix(" anew")]

    return Case(name, f"stored: {file}", prepare, check=lambda *found: _same(command, *found))


def _same(command: str, folder: Path, outcome: Outcome) -> str:
    """What is wrong with an outcome: no answer may differ from the one without damage."""
    if outcome.kind != "ok":
        return ""
    if command.startswith("show"):
        return "" if outcome.stdout == tiny.said(command) else "it shows something else"
    if command.startswith("run"):
        return tiny.difference(folder / "runs")
    found, right = tiny.results(folder / "runs"), tiny.right()
    written = "trainings" if command == "train" else "figures"
    wrong = [name for name in right if written in name and found.get(name) != right[name]]
    return f"another result: {wrong[0]}" if wrong else ""


# Records with wrong content, whose checksum fits or is not there


WRONG: list[Any] = [None, -1, 10**30, "text", [], {}, [[]], float("nan"), "\x1b[31m", "\ud800"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a JSON value."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(part, (dict, list)):
            yield from places(part, (*path, key))
        else:
            yield (*path, key)


def _forged(seed: int) -> Iterator[Case]:
    """Someone else's record may hold anything: it is used or refused, in one line."""
    for file, commands in (
        ("training.json", ("show the training", "run")),
        ("run.json", ("show the run", "draw", "run")),
        ("rules", ("run",)),
    ):
        for i in range(12 if file == "rules" else 24):
            command = commands[i % len(commands)]
            yield _forged_case(f"{file}, forged {i}: {command}", file, command, seed)


def _forged_case(name: str, file: str, command: str, seed: int) -> Case:
    def prepare(folder: Path) -> Sequence[str]:
        from mechmem.spec.files import write_record

        runs, rng = tiny.copied(folder), random.Random(f"{seed} {name}")
        path = next(runs.glob(FILES[file][0]))
        record = json.loads(path.read_text())
        *at, last = rng.choice([place for place in places(record) if place])
        node = record
        for key in at:
            node = node[key]
        if rng.random() < 0.2 and isinstance(node, dict):
            del node[last]
        else:
            node[last] = rng.choice(WRONG)
        if rng.random() < 0.5:
            path.write_text(json.dumps({k: v for k, v in record.items() if k != "sha256"}))
        else:
            write_record(path, record)
        return tiny.COMMANDS[command]

    return Case(name, f"forged: {file}", prepare)


# An interrupted training


def _interrupted(seed: int) -> Iterator[Case]:
    for damage, change in (RANDOM | OTHER).items():
        for i in range(N_RANDOM if damage in RANDOM else 1):
            yield _interrupted_case(f"state, {damage} {i}: train", change, seed)


def _interrupted_case(name: str, change: Damage, seed: int) -> Case:
    def prepare(folder: Path) -> Sequence[str]:
        tiny.specs(folder)
        state = _stopped(folder)
        change(state, random.Random(f"{seed} {name}"))
        return tiny.COMMANDS["train"]

    return Case(name, "stored: state", prepare, check=lambda *found: _same("train", *found))


def _stopped(folder: Path) -> Path:
    """Stop the training after its fourth step. Returns the path of its state."""
    from mechmem.spec.yaml_file import SpecFile
    from mechmem.training.loop import train
    from mechmem.training.recipe import Recipe
    from mechmem.training.store import own_folder

    def stop(step: int, *_: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt

    recipe = SpecFile(folder / "small.yaml").build(Recipe)
    place = own_folder(recipe, 0, folder / "runs")
    try:
        train(recipe, 0, place, stop)
    except KeyboardInterrupt:
        return place / "state.safetensors"
    raise AssertionError("the training was not stopped")


# Links


def _linked() -> Iterator[Case]:
    """Folders and files that are links to a place outside: nothing is written through them."""
    for place in ("tables", "figures", "report.html", ".lock", "run.json"):
        for command in ("run", "draw"):
            yield _linked_case(f"a run's {place} is a link: {command}", "tiny-*", place, command)
    for place in ("checkpoints", ".lock", "recipe.yaml"):
        name = f"a training's {place} is a link: train"
        yield _linked_case(name, "trainings/*/seed_0", place, "train")


def _linked_case(name: str, pattern: str, place: str, command: str) -> Case:
    def prepare(folder: Path) -> Sequence[str]:
        runs, outside = tiny.copied(folder), folder.parent / "outside"
        path = next(runs.glob(pattern)) / place
        if command == "train":
            (path.parent / "training.json").unlink()
        if path.exists():
            shutil.move(path, outside)
        else:
            outside.mkdir()
        path.symlink_to(outside)
        for file in [outside, *outside.rglob("*")]:
            os.utime(file, (1, 1))
        return tiny.COMMANDS[command]

    def check(folder: Path, outcome: Outcome) -> str:
        outside = folder.parent / "outside"
        changed = [p.name for p in [outside, *outside.rglob("*")] if p.stat().st_mtime != 1]
        return f"wrote through a link: {changed[0]}" if changed else ""

    return Case(name, "links", prepare, check=check)


# A stranger's run


EVIL = 'from pathlib import Path\n(Path(__file__).parents[3] / "executed").touch()\n'


def _hostile() -> Iterator[Case]:
    """Plug-ins that came with a run are not executed, and nothing that it says moves a terminal."""
    for command in ("show the run", "draw", "list"):
        yield Case(
            f"a stranger's plug-in: {command}",
            "hostile",
            lambda folder, command=command: _with_plugin(folder, tiny.COMMANDS[command]),
        )
    for command in ("run", "check"):
        yield Case(
            f"a stranger's plug-in: {command} its spec",
            "hostile",
            lambda folder, command=command: _with_plugin(folder, [command, "SPEC"]),
            must="be refused",
        )
    for name in ("../evil.py", "/tmp/evil.py", "a/../../evil.py", "linked.py"):
        for command in ("run", "check"):
            yield Case(
                f"the plug-in {name}: {command}",
                "hostile",
                lambda folder, command=command, name=name: _with_far_plugin(folder, command, name),
                must="be refused",
            )
    for command in ("show the run", "draw", "run"):
        for text in ("\x1b[2J\x1b[31m", "\x07\x08\r", "\u202eevil", "</script><script>x</script>"):
            yield Case(
                f"a question with {text!a}: {command}",
                "hostile",
                lambda folder, command=command, text=text: _saying(folder, command, text),
            )


def _with_plugin(folder: Path, arguments: Sequence[str]) -> Sequence[str]:
    run, _ = tiny.folders(tiny.copied(folder))
    (run / "evil.py").write_text(EVIL)
    spec = run / "experiment.yaml"
    spec.write_text(spec.read_text().replace("plugins: []", "plugins: [evil.py]"))
    record = json.loads((run / "run.json").read_text())
    del record["files"], record["sha256"]
    (run / "run.json").write_text(json.dumps(record))
    return [str(spec.relative_to(folder)) if part == "SPEC" else part for part in arguments]


def _with_far_plugin(folder: Path, command: str, name: str) -> Sequence[str]:
    tiny.specs(folder)
    (folder / "specs").mkdir()
    for spec in ("tiny.yaml", "small.yaml"):
        shutil.move(folder / spec, folder / "specs" / spec)
    (folder / "evil.py").write_text(EVIL)
    (folder / "specs" / "linked.py").symlink_to(folder / "evil.py")
    with (folder / "specs" / "tiny.yaml").open("a") as file:
        file.write(f"plugins: [{name}]\n")
    return [command, "specs/tiny.yaml"]


def _saying(folder: Path, command: str, text: str) -> Sequence[str]:
    run, _ = tiny.folders(tiny.copied(folder))
    record = json.loads((run / "run.json").read_text())
    del record["sha256"]
    record |= {"question": text, "answer": text}
    (run / "run.json").write_text(json.dumps(record))
    return tiny.COMMANDS[command]
