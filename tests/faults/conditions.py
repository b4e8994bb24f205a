"""Cases of the machine: a folder without permission, a full disk, several runs at once."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import tiny
from campaign import Case, Outcome, ended, started

N_AT_ONCE = 4


def cases(seed: int) -> Iterator[Case]:
    """All cases of this module."""
    for command in tiny.COMMANDS:
        yield _without_permission(command)
    for name, command in (
        ("*/run.json", "show the run"),
        ("*/tables/*.parquet", "draw"),
        ("*/experiment.yaml", "draw"),
        ("trainings/*/*/training.json", "show the training"),
        ("trainings/*/*/checkpoints/step_*", "run"),
    ):
        yield _unreadable(name, command)
    for n_written in range(0, 24, 2):
        yield _full_disk("run", n_written)
    for n_written in range(0, 10, 2):
        yield _full_disk("train", n_written)
    for command in ("run", "train", "draw"):
        yield _at_once(command)


def give_up_rights() -> None:
    """Permissions hold for root as well from here on, as for every other owner of a file."""
    if os.geteuid() != 0:
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 bits
    assert libc.capget(version, sets) == 0
    for i in (0, 1, 2):
        sets[i] &= ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert libc.capset(version, sets) == 0, os.strerror(ctypes.get_errno())


def _without_permission(command: str) -> Case:
    """Nothing may be written. What only reads must work; what writes must say where it cannot."""

    def prepare(folder: Path) -> Sequence[str]:
        runs = tiny.copied(folder)
        if command in ("run", "train"):
            shutil.rmtree(runs)
        _lock(folder)
        return tiny.COMMANDS[command]

    reads = command.startswith(("show", "list"))
    return Case(
        f"no permission to write: {command}",
        "no permission",
        prepare,
        must="pass" if reads else "be refused",
        check=_says("" if reads else "ermission"),
        begin=give_up_rights,
    )


def _unreadable(name: str, command: str) -> Case:
    def prepare(folder: Path) -> Sequence[str]:
        path = next(tiny.copied(folder).glob(name))
        _lock(folder)
        path.chmod(0)
        return tiny.COMMANDS[command]

    return Case(
        f"no permission to read {name}",
        "no permission",
        prepare,
        must="be refused",
        check=_says("ermission"),
        begin=give_up_rights,
    )


def _lock(folder: Path) -> None:
    """Everybody may read what is in a folder, and nobody may write."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def _says(word: str) -> Callable[[Path, Outcome], str]:
    def check(folder: Path, outcome: Outcome) -> str:
        return "" if word in outcome.stderr else f"the message lacks {word!r}"

    return check


def fill_disk(n_written: int) -> None:
    """After this number of files, there is no space for another one."""
    from mechmem.spec import files

    n_left, sync = [n_written], os.fsync

    def full(handle: int) -> None:
        n_left[0] -= 1
        if n_left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    files.os.fsync = full  # ty: ignore[invalid-assignment]


def _full_disk(command: str, n_written: int) -> Case:
    """The command is refused; given again with space, its results are those without a fault."""
    arguments = tiny.COMMANDS[command]

    def prepare(folder: Path) -> Sequence[str]:
        tiny.specs(folder)
        return arguments

    def check(folder: Path, outcome: Outcome) -> str:
        if outcome.kind == "refused":
            if "No space left" not in outcome.stderr:
                return "the message does not say that the disk is full"
            code, _, stderr, _ = ended(arguments, folder, 60)
            if code != 0:
                return f"given again: {stderr.strip()[-200:]}"
        return _difference(folder, command)

    return Case(
        f"a disk that is full after {n_written} files: {command}",
        "full disk",
        prepare,
        check=check,
        begin=partial(fill_disk, n_written),
    )


def _at_once(command: str) -> Case:
    others: dict[Path, list] = {}

    def prepare(folder: Path) -> Sequence[str]:
        if command == "draw":
            shutil.rmtree(next(tiny.copied(folder).glob("tiny-*")) / "figures")
        else:
            tiny.specs(folder)
        arguments = tiny.COMMANDS[command]
        others[folder] = [started(arguments, folder) for _ in range(N_AT_ONCE - 1)]
        return arguments

    def check(folder: Path, outcome: Outcome) -> str:
        for process in others[folder]:
            process.join(60)
        codes = [process.exitcode for process in others[folder]]
        return f"exit codes {codes}" if any(codes) else _difference(folder, command)

    return Case(
        f"{N_AT_ONCE} at once: {command}",
        "at once",
        prepare,
        must="pass",
        check=check,
        seconds=60,
    )


def _difference(folder: Path, command: str) -> str:
    """What differs from the results without a fault, as far as the command makes them."""
    return tiny.difference(folder / "runs", "trainings" if command == "train" else "")
