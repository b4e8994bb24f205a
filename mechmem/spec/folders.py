"""Folders that one process works in at a time, and what killed processes left in them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mechmem.spec.files import FileError, is_left_behind, refuse_links

LOCK = ".lock"
TEMPORARY = re.compile(
    r"\..+\.(safetensors|parquet|json|yaml|html|md|py)\.[a-z0-9_]{8}", re.IGNORECASE
)
"""The names of the temporary files of `files.write`."""
YOUNG = 10.0
"""Seconds for which a temporary file is left alone: its writer may be about to lock it."""
DEEPEST = 6
"""Levels of folders below that of all runs: `trainings/shipped/NAME/seed_0/checkpoints`."""


@contextmanager
def locked(folder: Path, say: Callable[[str], None], doing: str) -> Generator[None, None, None]:
    """Work in a folder in one process at a time; a second one waits.

    A folder in which nothing was written is removed at the end.

    Args:
        folder: is made if it is not there.
        say: is called if this process has to wait.
        doing: what the other process is doing then, such as `running small`.

    Raises:
        FileError: the folder cannot be made or written.
    """
    lock = FileLock(folder / LOCK)
    try:
        _acquire(lock, folder, lambda: say(f"another process is {doing}; waiting for it"))
    except OSError as error:
        raise FileError(
            f"cannot write {folder}: {error.strerror}; choose another folder with --runs"
        ) from error
    try:
        yield
    finally:
        _remove_if_empty(folder)
        lock.release()


def _acquire(lock: FileLock, folder: Path, wait: Callable[[], None]) -> None:
    timeout = 0.0
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder / LOCK, folder)  # the lock would be written through it
        try:
            lock.acquire(timeout=timeout)
            return
        except Timeout:
            wait()
            timeout = -1.0
        except FileNotFoundError:
            continue  # the other process wrote nothing, and has removed the folder


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing but its lock; the lock must be held."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def remove_leftovers(runs: Path) -> None:
    """Remove what killed and refused commands left: temporary files, and folders of runs and
    trainings with nothing but a lock.

    Args:
        runs: folder of all runs and trainings.
    """
    for depth in range(DEEPEST):
        for path in runs.glob("*/" * depth + ".*"):
            if TEMPORARY.fullmatch(path.name):
                _remove_if_left(path)
    for lock in [*runs.glob(f"*/{LOCK}"), *runs.glob(f"trainings/*/*/{LOCK}")]:
        held = FileLock(lock)
        with suppress(Timeout, OSError):
            if len(list(lock.parent.iterdir())) == 1 and not lock.is_symlink():
                held.acquire(timeout=0)
                _remove_if_empty(lock.parent)
                held.release()
    for folder in runs.glob("trainings/*"):
        with suppress(OSError):  # one that is not empty stays
            folder.rmdir()


def _remove_if_left(temporary: Path) -> None:
    with suppress(OSError):
        is_old = time.time() - temporary.lstat().st_mtime > YOUNG
        if is_old and not temporary.is_symlink() and is_left_behind(temporary):
            temporary.unlink()
