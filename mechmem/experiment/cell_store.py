"""The store of cells: the rows of each member of a sweep, kept in chunks under a key.

A key holds all that decides the rows, so a cell is never out of date: a changed one has another
key. Rows come back as they were computed, whatever other cells are in their chunk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mechmem.spec.files import digest, write

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
        self._chunks: dict[str, Path] = {}
        for path in sorted(folder.glob("*.parquet")):
            self._chunks |= dict.fromkeys(_keys_in(path), path)

    def __contains__(self, key: str) -> bool:
        return key in self._chunks

    def write(self, cells: Mapping[str, pd.DataFrame]) -> None:
        """Keep these tables, by key. Raises FileError if they cannot be written."""
        for alike in _of_one_schema(cells):
            path = self.folder / f"{digest(sorted(alike))}.parquet"
            write(path, _chunk(alike))
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
        return found

    def _read_chunk(self, path: Path, keys: Sequence[str]) -> dict[str, pd.DataFrame]:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        try:
            chunk = pq.read_table(path, page_checksum_verification=True)
            cells = {key: chunk.filter(pc.field(KEY) == key).drop_columns(KEY) for key in keys}
        except (pa.ArrowException, OSError):
            path.unlink(missing_ok=True)
            self._chunks = {key: at for key, at in self._chunks.items() if at != path}
            return {}
        return {key: cell.to_pandas() for key, cell in cells.items()}


def _keys_in(path: Path) -> list[str]:
    """The keys of the cells in a chunk; none if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads((pq.read_schema(path).metadata or {})[KEYS])
    except (pa.ArrowException, OSError, KeyError, ValueError):
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
