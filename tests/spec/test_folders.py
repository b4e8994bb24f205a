from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from mechmem.spec.files import FileError, refuse_links, write
from mechmem.spec.folders import locked, remove_leftovers

KILLED = """
import os, signal, sys
from pathlib import Path
from mechmem.spec import files
files.os.fsync = lambda _: os.kill(os.getpid(), {signal})
files.write(Path(sys.argv[1]), "text")
"""


def left_behind(path: Path, by: signal.Signals = signal.SIGKILL) -> tuple[Path, subprocess.Popen]:
    """The temporary file of a writer that was stopped in the middle, and the writer."""
    code = KILLED.format(signal=int(by))
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    if by == signal.SIGKILL:
        process.wait()
    while not (found := list(path.parent.glob(f".{path.name}.*"))) or not found[0].stat().st_size:
        time.sleep(0.01)
    return found[0], process


def aged(path: Path) -> Path:
    os.utime(path, (1, 1), follow_symlinks=False)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "small-0123456789ab/run.json",
        "small-0123456789ab/tables/a.parquet",
        "trainings/small-0123456789ab/seed_0/checkpoints/step_000005.safetensors",
        "trainings/shipped/small/seed_1/checkpoints/step_000005.safetensors",
        "cells/0123456789ab/0.parquet",
        "rules/small.json",
    ],
)
def test_a_temporary_file_of_a_killed_process_is_removed(name, tmp_path):
    temporary = tmp_path / name
    temporary = temporary.with_name(f".{temporary.name}.ab1_xy9z")
    temporary.parent.mkdir(parents=True)
    temporary.write_text("half")
    remove_leftovers(tmp_path)
    assert temporary.exists()  # it is young: its writer may be about to lock it
    aged(temporary)
    remove_leftovers(tmp_path)
    assert not temporary.exists()


def test_what_kill_9_leaves_is_removed_and_what_is_being_written_is_not(tmp_path):
    dead, _ = left_behind(tmp_path / "dead.json")
    stopped, writer = left_behind(tmp_path / "alive.json", signal.SIGSTOP)
    try:
        aged(dead), aged(stopped)
        remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [stopped.name]
    finally:
        writer.send_signal(signal.SIGCONT)
        writer.wait()


@pytest.mark.parametrize(
    "name", [".hidden", ".vimrc.json", ".a.json.12345678x", ".a.txt.12345678", "a.json.12345678"]
)
def test_hidden_files_of_others_are_left_alone(name, tmp_path):
    path = tmp_path / "small-0123456789ab" / name
    path.parent.mkdir()
    path.write_text("mine")
    aged(path)
    remove_leftovers(tmp_path)
    assert path.exists()


def test_folders_of_refused_runs_are_removed_and_others_are_not(tmp_path):
    refused = [tmp_path / "small-0123456789ab", tmp_path / "trainings" / "a-0" / "seed_0"]
    for folder in [*refused, tmp_path / "used", tmp_path / "busy"]:
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
    (tmp_path / "used" / "run.json").touch()
    with FileLock(tmp_path / "busy" / ".lock"):
        remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["busy", "trainings", "used"]
    assert list((tmp_path / "trainings").iterdir()) == []


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new", print, "running"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "new", print, "running"):
        (tmp_path / "new" / "file").touch()
    assert (tmp_path / "new" / "file").exists()


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(FileError, match=r"\.lock is a link, and nothing is written through links"),
        locked(tmp_path / "run", print, "running"),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "figures").symlink_to(tmp_path / "outside")
    path = tmp_path / "run" / "figures" / "new" / "1.json"
    with pytest.raises(FileError, match=r"figures is a link, .*; remove it"):
        write(path, "text", within=tmp_path / "run")
    assert list((tmp_path / "outside").iterdir()) == []
    refuse_links(tmp_path / "run" / "figures", tmp_path / "run" / "figures")  # its owner's choice


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "outside")
    write(tmp_path / "file", "text", within=tmp_path)
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tmp_path / "file").is_symlink()
