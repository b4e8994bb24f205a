"""The store of cells: the rows of each member of a sweep, kept in chunks under a key.

A key holds all that decides the rows, so a cell is never out of date: a changed one has another
key. Rows come back as they were computed, whatever other cells are in their chunk. A chunk is named
by the SHA-256 of its content, so that damage is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mechmem.spec.files import FileError, read, sha256, write

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

KEY = "cell_key"
"""Column of a chunk that names the cell of a row."""
KEYS = b"cell_keys"
"""Metadata of a chunk: the keys of its cells, also of those without a row."""


class CellStore:
    """The cells in one folder.

    Args:
        folder: of the chunks of one kind of analysis on one training, so that few are searched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        """Chunks of which cells are lost; they are deleted by `read`."""
        self._chunks: dict[str, Path] = {}
        for path in sorted(folder.glob("*.parquet")):
            keys = _keys_in(path)
            self.damaged += [] if keys else [path]
            self._chunks |= dict.fromkeys(keys, path)

    def __contains__(self, key: str) -> bool:
        return key in self._chunks

    def write(self, cells: Mapping[str, pd.DataFrame]) -> None:
        """Keep these tables, by key. Raises FileError if they cannot be written."""
        for alike in _of_one_schema(cells):
            content = _chunk(alike)
            path = self.folder / f"{sha256(content)}.parquet"
            write(path, content)
            self._chunks |= dict.fromkeys(alike, path)

    def read(self, keys: Sequence[str]) -> dict[str, pd.DataFrame]:
        """The tables of these cells, as far as they are here and whole.

        A chunk that turns out to be damaged is deleted, so that its cells are missing afterwards.
        """
        wanted: dict[Path, list[str]] = {}
        for key in keys:
            if key in self._chunks:
                wanted.setdefault(self._chunks[key], []).append(key)
        found: dict[str, pd.DataFrame] = {}
        for path, its_keys in wanted.items():
            found |= self._read_chunk(path, its_keys)
        for path in self.damaged:
            with suppress(OSError):
                path.unlink()
        return found

    def _read_chunk(self, path: Path, keys: Sequence[str]) -> dict[str, pd.DataFrame]:
        has_checksum = len(path.stem) == 64
        try:
            content = read(path, path.stem if has_checksum else None)
            return _cells_in(content, keys)
        except Exception as error:
            # What is as it was written cannot be damaged; in a chunk of version 0.2, which has no
            # checksum, damage makes pyarrow raise anything.
            if has_checksum and not isinstance(error, FileError):
                raise
            self.damaged.append(path)
            self._chunks = {key: at for key, at in self._chunks.items() if at != path}
            return {}


def _cells_in(content: bytes, keys: Sequence[str]) -> dict[str, pd.DataFrame]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    chunk = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    cells = {key: chunk.filter(pc.field(KEY) == key).drop_columns(KEY) for key in keys}
    return {key: cell.to_pandas() for key, cell in cells.items()}


def _keys_in(path: Path) -> list[str]:
    """The keys of the cells in a chunk; none if it is damaged."""
    import pyarrow.parquet as pq

    try:
        if not path.is_file():  # a pipe would never end
            return []
        return [str(key) for key in json.loads((pq.read_schema(path).metadata or {})[KEYS])]
    except Exception:  # damaged metadata makes pyarrow raise anything
        return []


def _of_one_schema(cells: Mapping[str, pd.DataFrame]) -> list[dict[str, pa.Table]]:
    """The cells in groups of one schema: joined with others, a column would change its type."""
    import pyarrow as pa

    groups: list[tuple[pa.Schema, dict[str, pa.Table]]] = []
    for key, frame in cells.items():
        table = pa.Table.from_pandas(frame, preserve_index=False)
        for schema, group in groups:
            if schema.equals(table.schema, check_metadata=True):
                group[key] = table
                break
        else:
            groups.append((table.schema, {key: table}))
    return [group for _, group in groups]


def _chunk(cells: Mapping[str, pa.Table]) -> bytes:
    """The bytes of a chunk that holds these cells."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    named = [
        table.append_column(KEY, pa.array([key] * len(table), pa.string()))
        for key, table in cells.items()
    ]
    joined = pa.concat_tables(named)
    metadata = (joined.schema.metadata or {}) | {KEYS: json.dumps(list(cells)).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(joined.replace_schema_metadata(metadata), sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()
