"""Files that are whole or absent: written under a temporary name, synced to the disk and renamed.

Nothing that is read here runs code.
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
    """A file is missing, damaged or cannot be written; the message names it, the reason and a
    remedy."""


def write(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing. Raises FileError if the disk or a permission prevents it."""
    data = content.encode() if isinstance(content, str) else content
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
            Path(temporary).unlink(missing_ok=True)  # gone already where all went well


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises FileError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path} cannot be read ({error}); delete it and run again to make a new one"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Any = None) -> None:
    """Save tensors as safetensors; the same tensors and note give the same bytes.

    Args:
        path: of the file.
        tensors: by name; parameters and views are saved by value.
        note: any value that JSON can hold, read back with `read_note`.
    """
    from safetensors.torch import save

    # One key only: the format keeps no order of several, and the bytes would differ.
    metadata = None if note is None else {"note": json.dumps(note)}
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write(path, save(values, metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load safetensors. Raises FileError if the file is missing, cut off or not safetensors."""
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
    """Twelve hexadecimal digits of the SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(block, sort_keys=True).encode()).hexdigest()[:12]
