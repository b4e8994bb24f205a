"""What a person sees while something runs: bars with time left, on stderr, so that stdout stays for
results."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from mechmem.experiment.cells import ProgressCallback

QUIET_SECONDS = 15.0
"""Seconds between two lines where the output is no terminal."""


@contextmanager
def showing_progress(bars_only: bool = False) -> Generator[ProgressCallback, None, None]:
    """A progress that shows a bar for a training and a line for what is being analysed; where there
    is no terminal, a line now and then, or nothing with `bars_only`."""
    if not sys.stderr.isatty():
        yield ProgressCallback() if bars_only else _Lines().progress
        return
    text, left = TextColumn("{task.description}"), TimeRemainingColumn()
    columns = (SpinnerColumn(), text, BarColumn(20), MofNCompleteColumn(), left)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bars(progress).progress


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self.progress, self.tasks = progress, {}
        self.progress = ProgressCallback(say=self.say, train=self.train)

    def say(self, text: str) -> None:
        count = text.partition(" ")[2].partition(" ")[0].split("/")
        done, total = (
            (int(count[0]) - 1, int(count[1]))
            if len(count) == 2 and count[1].isdigit()
            else (0, None)
        )
        self._show("analysis", text, done, total)

    def train(self, name: str, step: int, n_steps: int, curves: dict[str, float]) -> None:
        self._show(name, f"training {name}: {curves_line(curves)}", step, n_steps)

    def _show(self, key: str, text: str, done: int, total: int | None) -> None:
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(text, total=total)
        self.progress.update(self.tasks[key], description=text, completed=done, total=total)


class _Lines:
    def __init__(self) -> None:
        self.console, self.last, self.started = Console(stderr=True), 0.0, {}
        self.progress = ProgressCallback(say=self.say, train=self.train)

    def say(self, text: str) -> None:
        self._line(text)

    def train(self, name: str, step: int, n_steps: int, curves: dict[str, float]) -> None:
        first, at = self.started.setdefault(name, (step, time.monotonic()))
        left = (time.monotonic() - at) / max(step - first, 1) * (n_steps - step)
        self._line(
            f"training {name}: step {step}/{n_steps}, {curves_line(curves)}, {left / 60:.0f} min left"
        )

    def _line(self, text: str) -> None:
        if time.monotonic() - self.last > QUIET_SECONDS:
            self.last = time.monotonic()
            self.console.print(text, highlight=False, soft_wrap=True)


def curves_line(curves: dict[str, float]) -> str:
    """The four curves in a line."""
    return " ".join(
        f"{name} {curves[name]:.3f}" for name in ("clean", "memorised", "corrected", "held_out")
    )
