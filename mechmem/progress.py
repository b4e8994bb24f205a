"""Progress of a run or a training: bars with the time left, or a line now and then, on stderr.

stdout stays for results.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

QUIET_SECONDS = 15.0
"""Seconds between two lines where the output is not a terminal."""
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What a terminal would obey instead of showing it, or could not show: control characters except
line ends and tabs, changes of the direction of text, and halves of characters."""


def printable(text: str) -> str:
    """The text with escapes in place of characters that a terminal would obey.

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass
class ProgressCallback:
    """Functions that a run calls to report its progress; by default they do nothing."""

    say: Callable[[str], None] = lambda _: None
    """Called with a line of text: what is being worked on now."""
    train: Callable[[str, int, int, dict[str, float]], None] = lambda *_: None
    """Called with a training's name, its step, its number of steps and its four curves."""
    note: Callable[[str], None] = lambda _: None
    """Called with a line of text that has to stay readable, such as a failure."""
    part: Callable[[str, int, int, float | None], None] = lambda *_: None
    """Called with the part of a larger job that begins now (a spec of a study, a file to fetch),
    the number of parts that are done, the number of all parts, and the seconds left if known."""


@contextmanager
def showing_progress(bars_only: bool = False) -> Generator[ProgressCallback, None, None]:
    """Callbacks that show progress: bars on a terminal, elsewhere a line now and then.

    Args:
        bars_only: show nothing where stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield ProgressCallback() if bars_only else _Lines().callback
        return
    # Without markup: a name in brackets is a name.
    text, left = TextColumn("{task.description}", markup=False), TimeRemainingColumn()
    columns = (SpinnerColumn(), text, BarColumn(20), MofNCompleteColumn(), left)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bars(progress).callback


class _Bars:
    """One bar for each training, one for the analysis that is running, and one for the parts of a
    larger job."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}
        self.callback = ProgressCallback(self.say, self.train, self.note, self.part)

    def say(self, text: str) -> None:
        done, total = _counted(text)
        self._show("analysis", text, done, total)

    def train(self, name: str, step: int, n_steps: int, curves: dict[str, float]) -> None:
        self._show(name, f"training {name}: {curves_line(curves)}", step, n_steps)

    def note(self, text: str) -> None:
        self.progress.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def part(self, name: str, done: int, total: int, seconds_left: float | None) -> None:
        self._show("part", f"{name}{time_left(seconds_left)}", done, total)

    def _show(self, key: str, text: str, done: int, total: int | None) -> None:
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(text, total=total)
        text = printable(text)
        self.progress.update(self.tasks[key], description=text, completed=done, total=total)


def _counted(text: str) -> tuple[int, int | None]:
    """(2, 8) for `patch_grid 3/8 layer 0`: two of eight are done; (0, None) without a count."""
    words = text.split()
    number, slash, total = words[1].partition("/") if len(words) > 1 else ("", "", "")
    if slash and number.isdigit() and total.isdigit():
        return int(number) - 1, int(total)
    return 0, None


class _Lines:
    """A line every `QUIET_SECONDS` at most."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.last_line = 0.0
        self.started: dict[str, tuple[int, float]] = {}
        self.callback = ProgressCallback(self.say, self.train, self.note, self.part)

    def note(self, text: str) -> None:
        self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def part(self, name: str, done: int, total: int, seconds_left: float | None) -> None:
        self.say(f"{done + 1}/{total} {name}{time_left(seconds_left)}")

    def say(self, text: str) -> None:
        if time.monotonic() - self.last_line > QUIET_SECONDS:
            self.last_line = time.monotonic()
            self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def train(self, name: str, step: int, n_steps: int, curves: dict[str, float]) -> None:
        first_step, started = self.started.setdefault(name, (step, time.monotonic()))
        seconds_left = None  # not known before steps were timed
        if step > first_step:
            seconds_left = (time.monotonic() - started) / (step - first_step) * (n_steps - step)
        self.say(
            f"training {name}: step {step}/{n_steps}, {curves_line(curves)}"
            f"{time_left(seconds_left)}"
        )


def curves_line(curves: dict[str, float]) -> str:
    """The four curves in a line."""
    names = ("clean", "memorised", "corrected", "held_out")
    return " ".join(f"{name} {curves[name]:.3f}" for name in names)


def time_left(seconds: float | None) -> str:
    """The end of a line of progress; empty if the time is not known.

    >>> time_left(None), time_left(20.0), time_left(130.0)
    ('', ', about 20 s left', ', about 2 min left')
    """
    if seconds is None:
        return ""
    rounded = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    return f", about {rounded} left"
