"""Files that are either complete or absent: written under a temporary name, synced to disk and
renamed. A record carries its own checksum and those of the files next to it.

Reading a file never executes code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from mechmem.spec.errors import format_error

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

M = TypeVar("M", bound=BaseModel)

SUM = "sha256"
"""Key of a record, and of a note of tensors, under which its own checksum is kept."""
AGAIN = "delete it and rerun the command to recreate it"
TRAIN_AGAIN = "delete it and train again, or restore it from a copy"


class FileError(Exception):
    """A file is missing, damaged or cannot be written; the message gives its path, the reason and a
    remedy."""


def sha256(content: bytes) -> str:
    """The SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write(path: Path, content: bytes | str, within: Path | None = None) -> str:
    """Write a complete file or none.

    Args:
        path: of the file. A link of this name is replaced, not followed.
        content: text is written in UTF-8.
        within: a folder above the file, below which no folder may be a link: it may have come from
            someone else.

    Returns:
        The SHA-256 of the content.

    Raises:
        FileError: the file system refuses, such as for lack of space or permission, or the file
            would be written through a link.
    """
    # A lone surrogate, as JSON allows, has no UTF-8.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = None
    if within is not None:
        refuse_links(path.parent, within)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            _mark_as_alive(handle)
            file.write(data)
            file.flush()
            os.fsync(handle)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
    except OSError as error:
        is_refused = isinstance(error, PermissionError)
        raise FileError(
            f"cannot write {path}: {error.strerror or error}; "
            f"{'get the right to write there' if is_refused else 'free some space'} or choose "
            "another folder with --runs"
        ) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)  # after a success, it is already renamed
    return sha256(data)


def _mark_as_alive(handle: int) -> None:
    """Lock a temporary file for as long as its writer lives: the lock ends with the process, so one
    without a lock was left behind."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_left_behind(temporary: Path) -> bool:
    """Whether no living process writes this temporary file; False where that cannot be known."""
    if fcntl is None:
        return False
    try:
        with temporary.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def refuse_links(place: Path, within: Path) -> None:
    """Raises FileError if a folder on the way down to a place is a link.

    Args:
        place: a path below `within`.
        within: where to begin; it may be a link itself, as its owner chose it.
    """
    for part in (place, *place.parents):
        if part == within:
            return
        if part.is_symlink():
            raise FileError(f"{part} is a link, and nothing is written through links; remove it")


def read(path: Path, checksum: str | None = None, remedy: str = AGAIN) -> bytes:
    """The content of a file, verified.

    Args:
        path: of the file.
        checksum: its SHA-256; None if none was recorded.
        remedy: the end of an error's message.

    Raises:
        FileError: it is missing, is no regular file (a pipe would never end), cannot be read, or
            has another checksum.
    """
    try:
        # Not blocking: to open a pipe would wait for its other end.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileError(f"{path} is not a regular file; {remedy}")
            content = file.read()
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing; {remedy}") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path} cannot be read ({reason}); {remedy}") from error
    if checksum is not None and sha256(content) != checksum:
        raise FileError(f"{path} is damaged (its SHA-256 is not the recorded one); {remedy}")
    return content


def write_json(path: Path, value: Any, within: Path | None = None) -> str:
    """Write a value as a JSON file, as `write` does."""
    return write(path, json.dumps(value, indent=2, sort_keys=False) + "\n", within)


def read_json(path: Path, remedy: str = AGAIN) -> Any:
    """The value in a JSON file. Raises FileError, which ends with the remedy, if the file is
    missing or is not JSON."""
    return _parsed(read(path, remedy=remedy), path, remedy)


def _parsed(content: bytes, path: Path, remedy: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read ({error}); {remedy}") from error


def write_record(path: Path, record: Mapping[str, Any], within: Path | None = None) -> None:
    """Write a mapping as a JSON file that carries its own checksum, as `write` does."""
    content = {key: value for key, value in record.items() if key != SUM}
    write_json(path, content | {SUM: _sum_of(content)}, within)


def read_record(
    path: Path, schema: type[BaseModel], remedy: str = AGAIN, checksum: str | None = None
) -> dict[str, Any]:
    """The mapping in a JSON file, without its checksum.

    Args:
        path: of the file; one of an earlier version has no checksum.
        schema: what the mapping must hold; other keys are left as they are.
        remedy: the end of an error's message.
        checksum: SHA-256 of the whole file, where another record has it.

    Raises:
        FileError: the file is missing, is not JSON, was changed, or holds something else.
    """
    record = _parsed(read(path, checksum, remedy), path, remedy)
    if isinstance(record, dict) and SUM in record and record.pop(SUM) != _sum_of(record):
        raise FileError(f"{path} is damaged or was changed (its SHA-256 is not its own); {remedy}")
    validated(schema, record, path, remedy)
    return record


def validated(schema: type[M], value: Any, path: Path, remedy: str) -> M:
    """A value of a file in the form of its schema.

    Args:
        schema: what the value must hold.
        value: as it was read.
        path: of the file, which an error names.
        remedy: the end of an error's message.

    Raises:
        FileError: the value holds something else.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise FileError(f"{path} is damaged ({first_error(error)}); {remedy}") from error
    except RecursionError as error:
        raise FileError(f"{path} is damaged (it is nested too deeply); {remedy}") from error


def first_error(error: ValidationError) -> str:
    """The first error of a validation, with its place."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ": ".join(
        part for part in (".".join(map(str, first["loc"])), format_error(first)) if part
    )


def _sum_of(value: Any) -> str:
    """The SHA-256 of a value as JSON holds it, whatever the order of its keys."""
    return sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], note: Any = None, within: Path | None = None
) -> str:
    """Save tensors as safetensors; the same tensors and note give the same bytes.

    Args:
        path: path of the file.
        tensors: tensors by name; parameters and views are saved by value.
        note: any JSON-serialisable value; `read_note` returns it. A file with a note carries its
            own checksum.
        within: as for `write`.

    Returns:
        The SHA-256 of the file.
    """
    from safetensors.torch import save

    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if note is None:
        return write(path, save(values), within)
    # A single key: the format does not keep the order of several, so the bytes would vary.
    metadata = {"note": json.dumps({"note": note, SUM: _sum_with(note, save(values))})}
    return write(path, save(values, metadata), within)


def _sum_with(note: Any, tensors: bytes) -> str:
    return sha256(_sum_of(note).encode() + tensors)


def read_tensors(
    path: Path, checksum: str | None = None, remedy: str = TRAIN_AGAIN
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Args:
        path: of the file.
        checksum: its SHA-256; None if none was recorded.
        remedy: the end of an error's message.

    Raises:
        FileError: it is missing, damaged or invalid.
    """
    from safetensors.torch import load

    content = read(path, checksum, remedy)
    with _explained(path, remedy):
        return load(content)


def read_note(path: Path, remedy: str = TRAIN_AGAIN) -> Any:
    """The note that was saved with the tensors; None without one.

    Args:
        path: of the file; one of an earlier version has no checksum.
        remedy: the end of an error's message.

    Raises:
        FileError: it is missing, damaged or invalid.
    """
    from safetensors.torch import load, save

    content = read(path, remedy=remedy)
    with _explained(path, remedy):
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        kept = json.loads(metadata.get("note", "null"))
        if not isinstance(kept, dict) or kept.keys() != {"note", SUM}:
            return kept
        if kept[SUM] != _sum_with(kept["note"], save(tensors)):
            raise ValueError("its SHA-256 is not its own")
        return kept["note"]


@contextmanager
def _explained(path: Path, remedy: str) -> Generator[None, None, None]:
    from safetensors import SafetensorError

    try:
        yield
    # An invalid header makes safetensors raise errors of many kinds, also of torch.
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FileError(f"{path} is damaged ({error}); {remedy}") from error


def digest(block: Any) -> str:
    """The first twelve hexadecimal digits of the SHA-256 of a JSON-serialisable value."""
    return sha256(json.dumps(block, sort_keys=True).encode())[:12]
