"""Fetching the other seeds of a shipped training, each file verified by its SHA-256.

The index of all files comes with the package; whatever a source says of itself is not trusted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

from mechmem.spec.errors import InputError, suggest
from mechmem.spec.files import FileError, sha256, write
from mechmem.spec.limits import MOST_SEEDS
from mechmem.training import store
from mechmem.training.index import INDEX, RECORD, Entry, read_index
from mechmem.training.recipe import Recipe

TIMEOUT = 60.0
"""Seconds without an answer after which a server counts as unreachable."""
AGAIN = "then run the same command again: what was fetched is kept"

FileCallback = Callable[[str, int, int, float | None], None]
"""Called before each file with its name, the files done, the files in all, and the seconds left."""


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds of `1-5`, `1,3` or `0,2-4`, sorted. Raises InputError for anything else.

    >>> seeds_of("0,2-4")
    (0, 2, 3, 4)
    """
    seeds: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*([0-9]{1,19})(?:-([0-9]{1,19}))?\s*", part)
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise InputError(f"--seeds {text[:40]!r} is not of the form 1-5 or 1,3")
        if int(ends[2] or ends[1]) - int(ends[1]) >= MOST_SEEDS:
            raise InputError(f"--seeds {text[:40]!r} has more than {MOST_SEEDS:,} seeds")
        seeds |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return tuple(sorted(seeds))


def fetch(
    name: str,
    seeds: Sequence[int],
    source: str,
    runs: Path,
    on_file: FileCallback = lambda *_: None,
) -> list[Path]:
    """Get seeds of a shipped training that this installation lacks.

    Files that are here and right are kept, so an interrupted call is resumed.

    Args:
        name: of the training.
        seeds: to get.
        source: a folder (such as a clone's `mechmem/shipped`), or the http(s) address of one.
        runs: folder of all runs; the seeds are kept in its `trainings/shipped/`.
        on_file: called before each file.

    Returns:
        The folder of each seed, in the package if it ships with it.

    Raises:
        InputError: no such training, seed or source is known.
        FileError: a file cannot be had, is not the right one, or cannot be written.
    """
    wanted = {seed: _entries(name, seed) for seed in seeds}
    read = _reader(source)
    folders = {seed: _home(entries, runs) for seed, entries in wanted.items()}
    missing = [
        (entry, folders[seed])
        for seed, entries in wanted.items()
        for entry in entries
        if not entry.is_at(folders[seed])
    ]
    started, n_bytes, n_fetched = time.monotonic(), sum(e.n_bytes for e, _ in missing), 0
    for i, (entry, folder) in enumerate(missing):
        elapsed = time.monotonic() - started
        left = elapsed * (n_bytes - n_fetched) / n_fetched if n_fetched else None
        on_file(entry.path, i, len(missing), left)
        write(folder / entry.path, _verified(entry, read, source))
        n_fetched += entry.n_bytes
    store.forget()
    return [folders[seed] / name / f"seed_{seed}" for seed in seeds]


def _entries(name: str, seed: int) -> list[Entry]:
    """The files of one seed, the record last: without it, a folder is no finished training."""
    index = read_index(store.SHIPPED)
    prefix = f"{name}/seed_{seed}/"
    found = [entry for entry in index if entry.path.startswith(prefix)]
    if not found:
        names = dict.fromkeys(entry.path.split("/")[0] for entry in index)
        if name not in names:
            raise InputError(f"there is no shipped training {name!r}; {suggest(name, names)}")
        seeds = ", ".join(map(str, shipped_seeds(name)))
        raise InputError(f"{name} is shipped with the seeds {seeds}; there is no seed {seed}")
    return sorted(found, key=lambda entry: entry.path.endswith(f"/{RECORD}"))


def shipped_seeds(name: str) -> list[int]:
    """The seeds of a training that are in the index, whether or not their files are here."""
    if not (store.SHIPPED / INDEX).exists():  # nothing is known: there is nothing to recommend
        return []
    seeds = [
        re.fullmatch(rf"{re.escape(name)}/seed_(\d+)/{RECORD}", entry.path)
        for entry in read_index(store.SHIPPED)
    ]
    return sorted(int(found[1]) for found in seeds if found)


def _home(entries: Iterable[Entry], runs: Path) -> Path:
    """The package if it has the seed, also a damaged one, which is repaired there; else the folder
    of fetched trainings."""
    is_here = any((store.SHIPPED / entry.path).is_file() for entry in entries)
    return store.SHIPPED if is_here else store.fetched(runs)


def _reader(source: str) -> Callable[[Entry], bytes]:
    """A function that reads a file of a source, at most one byte more than it should have."""
    try:
        scheme = urlsplit(source).scheme
    except ValueError as error:
        raise InputError(f"--from {source} is no address: {error}") from error
    if not source:
        raise InputError("--from is empty; name a folder or an http(s) address")
    if scheme in ("http", "https"):
        return lambda entry: _downloaded(f"{source.rstrip('/')}/{quote(entry.path)}", entry.n_bytes)
    if "://" in source:
        raise InputError(f"--from {source} must be a folder or an http(s) address")
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"--from {source} is not a folder; name a clone's mechmem/shipped")
    return lambda entry: _copied(folder / entry.path, entry.n_bytes)


def _downloaded(url: str, n_bytes: int) -> bytes:
    try:
        with urlopen(url, timeout=TIMEOUT) as answer:
            return answer.read(n_bytes + 1)
    except HTTPError as error:
        with error:
            reason = f"{error.code} {error.reason}"
        raise FileError(
            f"{url} cannot be fetched ({reason}); --from must be the address of a folder laid "
            f"out like mechmem/shipped; correct it, {AGAIN}"
        ) from error
    except (URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise FileError(
            f"{url} cannot be reached ({reason}); check the address and the network, {AGAIN}"
        ) from error


def _copied(path: Path, n_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(n_bytes + 1)
    except OSError as error:
        raise FileError(
            f"{path} cannot be read ({error.strerror}); --from must be a folder laid out like "
            f"mechmem/shipped; correct it, {AGAIN}"
        ) from error


def _verified(entry: Entry, read: Callable[[Entry], bytes], source: str) -> bytes:
    content = read(entry)
    if len(content) < entry.n_bytes:
        wrong = f"it ends after {len(content):,} of {entry.n_bytes:,} bytes"
    elif sha256(content) != entry.sha256:
        wrong = "its SHA-256 is another"
    else:
        return content
    raise FileError(
        f"{source.rstrip('/')}/{entry.path} is not the file of this version of mechmem ({wrong}); "
        f"nothing of it was kept; use a source of the same version, {AGAIN}"
    )


def how_to_get(missing: Iterable[tuple[Recipe, int]]) -> dict[str, str]:
    """By name, the commands that fetch the shipped ones of trainings that are not here.

    Args:
        missing: recipe and seed of each.
    """
    seeds: dict[str, set[int]] = {}
    for recipe, seed in missing:
        name = store.shipped_name(recipe)
        if name is not None and seed in shipped_seeds(name):
            seeds.setdefault(name, set()).add(seed)
    return {
        name: f"mechmem fetch {name} --seeds {','.join(map(str, sorted(found)))} --from URL|FOLDER"
        for name, found in seeds.items()
    }
