"""The index of the shipped trainings: the SHA-256 of every file. It comes with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, RootModel

from mechmem.spec.files import FileError, read, read_json, sha256, validated, write_json

INDEX = "checksums.json"
"""The index: by path below the shipped trainings, the SHA-256 and the bytes of every file."""
RECORD = "training.json"
"""The file that makes a folder a finished training."""
REINSTALL = "install mechmem again (in a clone: `git checkout mechmem/shipped`)"


class _Sum(BaseModel):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class _Index(RootModel[dict[str, _Sum]]):
    pass


@dataclass(frozen=True)
class Entry:
    """A file in the index."""

    path: str
    """Relative to the folder of the shipped trainings."""
    sha256: str
    n_bytes: int

    def is_at(self, folder: Path) -> bool:
        """Whether this very file is in a folder."""
        try:
            read(folder / self.path, self.sha256)
        except FileError:
            return False
        return True


def write_index(shipped: Path) -> Path:
    """Write the index of all files of all seeds. Returns its path."""
    files = sorted(path for path in shipped.rglob("*") if path.is_file() and path.name != INDEX)
    entries = {
        path.relative_to(shipped).as_posix(): {
            "sha256": sha256(path.read_bytes()),
            "bytes": path.stat().st_size,
        }
        for path in files
    }
    write_json(shipped / INDEX, entries)
    return shipped / INDEX


def read_index(shipped: Path) -> list[Entry]:
    """The files in the index. Raises FileError if it is missing or damaged."""
    found = validated(_Index, read_json(shipped / INDEX, REINSTALL), shipped / INDEX, REINSTALL)
    return [Entry(path, entry.sha256, entry.bytes) for path, entry in found.root.items()]


def sums_of(shipped: Path, name: str, seed: int) -> dict[str, str]:
    """By path below the folder of a seed, the SHA-256 of its files; empty if the index lacks it.

    Args:
        shipped: the folder with the index.
        name: of the training.
        seed: of the training.

    Raises:
        FileError: the index is damaged.
    """
    if not (shipped / INDEX).exists():
        return {}
    prefix = f"{name}/seed_{seed}/"
    return {
        entry.path.removeprefix(prefix): entry.sha256
        for entry in read_index(shipped)
        if entry.path.startswith(prefix)
    }
