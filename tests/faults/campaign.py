"""The campaign of faults: damaged, hostile and huge input is given to the command line, each case
in a process and a folder of its own, and what comes of it is classified.

A feature adds its cases in a module of its own, as `inputs.py` does, and names that module in
`MODULES`. `python tests/faults` runs all cases; the tests run a seeded sample of them.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, Literal

MODULES = ("inputs", "stored", "kills", "conditions")
"""Modules with a function `cases(seed) -> Iterable[Case]`; their names are unique in the campaign.
"""
SECONDS = 30.0
"""After this time a case counts as late, and its process is ended."""
MEMORY = 12 * 2**30
"""Address space of a process in bytes: what asks for more is a case of its own, not the end of the
machine."""
LONGEST, MOST_LINES = 600, 30
"""Characters of a line and lines of a message that a person still reads."""

Kind = Literal["ok", "refused", "traceback", "late", "unclear", "accepted", "wrong"]


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    `ok`: it ended as it should, without an error; `refused`: a clear message and exit code 1 or 2;
    `traceback`; `late`: still running after 30 s; `unclear`: a message that is too long, has
    control characters, or no message at all; `accepted`: no error, though it must be refused;
    `wrong`: the case's own check found something, such as a different result.
    """

    kind: Kind
    code: int | None = None
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    note: str = ""

    @property
    def is_good(self) -> bool:
        return self.kind in ("ok", "refused")


@dataclass(frozen=True)
class Case:
    """One case.

    Args:
        name: unique, such as `spec: an alias bomb`.
        area: what is damaged, such as `spec`: a row of the table of outcomes.
        prepare: writes the files of the case into an empty folder, and returns the arguments of
            `mechmem`, which is run in this folder.
        must: `be refused` or `pass`, where that is known; otherwise both are right.
        check: is given the folder and the outcome afterwards; returns what is wrong, or "".
        seconds: time limit, where a case must be answered sooner.
        begin: is called in the process of the command before it, for conditions of the machine.
    """

    name: str
    area: str
    prepare: Callable[[Path], Sequence[str]]
    must: Literal["be refused", "pass", "either"] = "either"
    check: Callable[[Path, Outcome], str] = lambda folder, outcome: ""
    seconds: float = SECONDS
    begin: Callable[[], None] = bool


def all_cases(seed: int = 0) -> list[Case]:
    """Every case of every module; the same ones for the same seed."""
    cases = [case for name in MODULES for case in import_module(name).cases(seed)]
    twice = [name for name, n in Counter(case.name for case in cases).items() if n > 1]
    assert not twice, f"two cases have the name {twice[0]!r}"
    return cases


def sample(cases: Sequence[Case], n: int, seed: int = 0) -> list[Case]:
    """Some of the cases, the same ones for the same seed."""
    return random.Random(seed).sample(list(cases), min(n, len(cases)))


def outcomes(
    cases: Sequence[Case], folder: Path, processes: int = 2
) -> Iterator[tuple[Case, Outcome]]:
    """Run cases, and yield each with its outcome in the order of the cases.

    Args:
        cases: to run.
        folder: an empty one; each case gets a folder in it.
        processes: number of cases that run at the same time.
    """
    first = _processes().Process(target=int)  # waits for the server's imports
    first.start()
    first.join()
    with ThreadPoolExecutor(processes) as pool:
        places = [folder / f"{i:04d}" / "work" for i in range(len(cases))]
        yield from zip(cases, pool.map(run_case, cases, places), strict=True)


def run_case(case: Case, folder: Path) -> Outcome:
    """The outcome of a case.

    Args:
        case: to run.
        folder: where it is run. What appears next to this folder was written where nothing may be.
    """
    folder.mkdir(parents=True)
    arguments = list(case.prepare(folder))
    around = {*folder.parent.iterdir(), *_logs(folder)}
    outcome = classified(case, *ended(arguments, folder, case.seconds, case.begin))
    if new := sorted(path.name for path in set(folder.parent.iterdir()) - around):
        return _noted(outcome, f"wrote outside of its folder: {', '.join(new)}")
    wrong = case.check(folder, outcome) if outcome.is_good else ""
    return _noted(outcome, wrong) if wrong else outcome


def _noted(outcome: Outcome, note: str) -> Outcome:
    return Outcome("wrong", outcome.code, outcome.stdout, outcome.stderr, outcome.seconds, note)


def classified(case: Case, code: int | None, stdout: str, stderr: str, seconds: float) -> Outcome:
    """The outcome of a process.

    Args:
        case: that it ran.
        code: its exit code; None if it had to be ended.
        stdout: what it printed.
        stderr: likewise.
        seconds: that it took.
    """
    kind, note = _kind(case, code, stdout, stderr)
    return Outcome(kind, code, stdout, stderr, seconds, note)


def _kind(case: Case, code: int | None, stdout: str, stderr: str) -> tuple[Kind, str]:
    if code is None:
        return "late", f"no answer within {case.seconds:g} s"
    if "Traceback (most recent call last)" in stderr or code not in (0, 1, 2):
        return "traceback", (stderr.strip().splitlines() or [f"exit code {code}"])[-1]
    if controls := re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", stdout + stderr):
        return "unclear", f"prints the control character {controls[0]!r}"
    if code == 0:
        return ("accepted", "no error") if case.must == "be refused" else ("ok", "")
    message = stderr[stderr.find("mechmem: ") :] if "mechmem: " in stderr else ""
    lines = message.splitlines()
    if not message and not stderr.startswith("Usage"):
        return "unclear", "an exit code without a message"
    if len(lines) > MOST_LINES or any(len(line) > LONGEST for line in lines):
        longest = max(map(len, lines))
        return "unclear", f"a message of {len(lines)} lines, of up to {longest} characters"
    if case.must == "pass":
        return "wrong", f"refused: {lines[0] if lines else stderr}"
    return "refused", ""


def ended(
    arguments: Sequence[str], folder: Path, seconds: float, begin: Callable[[], None] = bool
) -> tuple[int | None, str, str, float]:
    """Exit code, stdout, stderr and seconds of a command; the code is None if it had to be ended.

    Args:
        arguments: of `mechmem`.
        folder: the working directory.
        seconds: after which it is ended.
        begin: is called in its process before the command.
    """
    begun = time.monotonic()
    process = started(arguments, folder, begin)
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    took = time.monotonic() - begun
    stdout, stderr = (
        path.read_bytes().decode(errors="replace") if path.exists() else ""  # ended before it began
        for path in _logs(folder)
    )
    return code, stdout, stderr, took


def started(arguments: Sequence[str], folder: Path, begin: Callable[[], None] = bool) -> Any:
    """The process of a command that was just started.

    Args:
        arguments: of `mechmem`.
        folder: the working directory.
        begin: is called in the process before the command.
    """
    process = _processes().Process(target=_command, args=(list(arguments), folder, begin))
    process.start()
    return process


def _logs(folder: Path) -> tuple[Path, Path]:
    return folder.parent / "stdout.txt", folder.parent / "stderr.txt"


def _processes() -> Any:
    """Processes that start in milliseconds: their server has imported all of mechmem once."""
    import mechmem

    modules = [found.name for found in walk_packages(mechmem.__path__, "mechmem.")]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*modules, "transformer_lens", "scipy.stats"])
    return context


def _command(arguments: list[str], folder: Path, begin: Callable[[], None]) -> None:
    """Run `mechmem` in this process, with its output in files next to the folder."""
    for stream, path in zip((1, 2), _logs(folder), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(0),
        os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace"),
        os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace"),
    )
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(folder)
    begin()
    from mechmem.cli.main import main

    sys.argv = ["mechmem", *arguments]
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def table(found: Sequence[tuple[Case, Outcome]]) -> str:
    """The table of outcomes in Markdown: a row for each area, and one for all."""
    kinds = ("ok", "refused", "traceback", "late", "unclear", "accepted", "wrong")
    counts: dict[str, Counter[str]] = {}
    for case, outcome in found:
        counts.setdefault(case.area, Counter())[outcome.kind] += 1
    whole = sum(counts.values(), Counter())
    lines = [
        f"| area | cases | {' | '.join(kinds)} | slowest |",
        "|---|" + "---|" * (len(kinds) + 2),
    ]
    for area, count in [*counts.items(), ("all", whole)]:
        slowest = max(o.seconds for c, o in found if area in (c.area, "all"))
        numbers = " | ".join(str(count[kind]) for kind in kinds)
        lines.append(f"| {area} | {count.total()} | {numbers} | {slowest:.1f} s |")
    return "\n".join(lines)
