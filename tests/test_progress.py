from __future__ import annotations

import subprocess
import sys

import pytest

from mechmem import progress
from mechmem.progress import ProgressCallback, curves_line, printable, showing_progress

CURVES = {"step": 3, "clean": 1.0, "memorised": 0.25, "corrected": 0.5, "held_out": 0.125}
IN_A_LINE = "clean 1.000 memorised 0.250 corrected 0.500 held_out 0.125"


@pytest.fixture
def terminal(monkeypatch):
    """stderr is a terminal; gives what the bars show when they are updated."""
    shown = []

    def update(self, task, *, description, completed, total):
        shown.append((task, description, completed, total))

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress.Progress, "update", update)
    return shown


def test_the_curves_in_a_line():
    assert curves_line(CURVES) == IN_A_LINE


def test_a_callback_is_silent_unless_it_is_given_functions():
    silent = ProgressCallback()
    assert silent.say("x") is None
    assert silent.train("x", 1, 2, CURVES) is None


@pytest.mark.parametrize(
    ("text", "done", "total"),
    [
        ("patch_grid 3/8 layer 0", 2, 8),
        ("patch_grid 1/1 ", 0, 1),
        ("model after ran on the backend fast: all is supported", 0, None),
        ("waiting", 0, None),
        ("read a/b", 0, None),
    ],
)
def test_the_bar_of_an_analysis_counts_the_members_of_its_sweep(terminal, text, done, total):
    with showing_progress() as shown:
        shown.say(text)
    assert [line[1:] for line in terminal] == [(text, done, total)]


def test_each_training_has_a_bar_of_its_own(terminal):
    with showing_progress() as shown:
        shown.train("a", 5, 20, CURVES)
        shown.train("b", 1, 20, CURVES)
        shown.train("a", 10, 20, CURVES)
    assert [line[2:] for line in terminal] == [(5, 20), (1, 20), (10, 20)]
    assert terminal[0][0] == terminal[2][0] != terminal[1][0]
    assert terminal[0][1] == f"training a: {IN_A_LINE}"


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with showing_progress() as shown:
        shown.say("first")
        shown.say("too soon")
        now[0] += progress.QUIET_SECONDS + 1
        shown.train("tiny", 10, 40, CURVES)
        now[0] += 60
        shown.train("tiny", 20, 40, CURVES)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "first"
    assert lines[1].startswith("training tiny: step 10/40, clean 1.000")
    assert lines[2].endswith("2 min left")  # ten steps took a minute, twenty are left
    assert len(lines) == 3


def test_without_a_terminal_bars_only_show_nothing(capsys):
    with showing_progress(bars_only=True) as shown:
        shown.say("x")
        shown.train("x", 1, 2, CURVES)
    assert capsys.readouterr().err == ""


def test_progress_imports_nothing_of_the_package():
    program = (
        "import sys, mechmem.progress; print(*(n for n in sys.modules if n[:8] == 'mechmem.'))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["mechmem.progress"]


def test_what_a_terminal_would_obey_is_printed_as_escapes():
    found = printable("a\tb\n\x1b[31m\x07\x9b\u202e\ud800é∅")
    assert found == "a\tb\n\\x1b[31m\\x07\\x9b\\u202e\\ud800é∅"
