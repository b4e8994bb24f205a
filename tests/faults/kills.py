"""Cases of kill -9: a command is killed at a random moment and given again; the results are those
of a command that was not killed."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import tiny
from campaign import Case, Outcome, started

N = {"train": 35, "run": 30, "run anew": 20, "draw": 15}
"""Kills of each command; `run anew` computes the sweep of a training that is there."""


def cases(seed: int) -> Iterator[Case]:
    """All cases of this module."""
    for command, n in N.items():
        for i in range(n):
            yield _case(f"kill -9 of {command} {i}", command, seed)


def _case(name: str, command: str, seed: int) -> Case:
    arguments = tiny.COMMANDS[command.removesuffix(" anew")]

    def prepare(folder: Path) -> Sequence[str]:
        _fill(folder, command)
        share = random.Random(f"{seed} {name}").uniform(0.02, 0.95)
        delay = share * _seconds(command)
        while True:
            process = started(arguments, folder)
            process.join(delay)
            was_running = process.is_alive()
            process.kill()
            process.join()
            if was_running:
                return arguments
            delay /= 2  # this time it was faster: once more from the start
            shutil.rmtree(folder)
            folder.mkdir()
            _fill(folder, command)

    def check(folder: Path, outcome: Outcome) -> str:
        return tiny.difference(folder / "runs", "trainings" if command == "train" else "")

    return Case(name, "kill -9", prepare, must="pass", check=check, seconds=60)


def _fill(folder: Path, command: str) -> None:
    """What is there before the command."""
    if command in ("train", "run"):
        tiny.specs(folder)
        return
    runs = tiny.copied(folder)
    if command == "run anew":
        for made in (runs / "cells", *runs.glob("tiny-*")):
            shutil.rmtree(made)
    else:
        shutil.rmtree(next(runs.glob("tiny-*")) / "figures")


@cache
def _seconds(command: str) -> float:
    """How long a command takes if it is not killed."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "work"
        folder.mkdir()
        _fill(folder, command)
        begun = time.monotonic()
        process = started(tiny.COMMANDS[command.removesuffix(" anew")], folder)
        process.join()
        return time.monotonic() - begun
