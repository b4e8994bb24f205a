"""Files that are either complete or absent: written under a temporary name, synced to disk and
renamed.

Reading a file never executes code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class FileError(Exception):
    """A file is missing, damaged or cannot be written; the message gives its path, the reason and a
    remedy."""


def write(path: Path, content: bytes | str) -> None:
    """Write a complete file or none. Raises FileError if the file system refuses, such as for lack
    of space or permission."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise FileError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another "
            "folder with --runs"
        ) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)  # after a success, it is already renamed


def write_json(path: Path, value: Any) -> None:
    """Write a value as a JSON file, as `write` does."""
    write(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises FileError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path} cannot be read ({error}); delete it and rerun the command to recreate it"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Any = None) -> None:
    """Save tensors as safetensors; the same tensors and note give the same bytes.

    Args:
        path: path of the file.
        tensors: tensors by name; parameters and views are saved by value.
        note: any JSON-serialisable value; `read_note` returns it.
    """
    from safetensors.torch import save

    # A single key: the format does not keep the order of several, so the bytes would vary.
    metadata = None if note is None else {"note": json.dumps(note)}
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write(path, save(values, metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. Raises FileError if it is missing, truncated or
    invalid."""
    from safetensors.torch import load

    with _explained(path):
        return load(path.read_bytes())


def read_note(path: Path) -> Any:
    """The note that was saved with the tensors. Raises FileError as `read_tensors` does."""
    from safetensors import safe_open

    with _explained(path), safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("note", "null"))


@contextmanager
def _explained(path: Path) -> Generator[None, None, None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing") from error
    except (SafetensorError, ValueError) as error:
        raise FileError(
            f"{path} is damaged ({error}); delete it and train again, or restore it from a copy"
        ) from error


def digest(block: Any) -> str:
    """The first twelve hexadecimal digits of the SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(block, sort_keys=True).encode()).hexdigest()[:12]
