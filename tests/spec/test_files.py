from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from mechmem.spec import files
from mechmem.spec.files import (
    FileError,
    read_json,
    read_note,
    read_record,
    read_tensors,
    sha256,
    write,
    write_json,
    write_record,
    write_tensors,
)

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1, -2], dtype=torch.int64),
    "none": torch.empty(0),
}
NOTE = {"step": 3, "curves": [{"held_out": 0.25}], "seconds": 1.5, "text": "∅"}


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(*_):
    raise KeyboardInterrupt


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["∅ text\n", "", b"\x00\xff bytes"])
def test_what_is_written_is_there_and_nothing_else(tmp_path, content):
    path = tmp_path / "new" / "folders" / "file"
    write(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(path.parent) == ["file"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    write(tmp_path / "file", "a longer text")
    write(tmp_path / "file", "short")
    assert (tmp_path / "file").read_text() == "short"


@pytest.mark.parametrize("step", ["fsync", "fdopen"])
def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write(path, "old")
    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(
        FileError, match=re.escape(f"cannot write {path}: No space left on device; free some space")
    ):
        write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_interruption_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, "old")
    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_nothing_stands_under_the_name_before_all_is_on_the_disk(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files.os, "fsync", lambda _: seen.append(names(tmp_path)))
    write(tmp_path / "file", "text")
    ((temporary,),) = seen  # beside the file, as a file is renamed as a whole within one disk only
    assert temporary.startswith(".file.")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "below"
    with pytest.raises(FileError, match=re.escape(f"cannot write {path}: ")):
        write(path, "text")


@pytest.mark.parametrize("value", [NOTE, [], "text", None, 0.1 + 0.2])
def test_json_comes_back_as_it_was(tmp_path, value):
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


def test_json_keeps_the_order_of_its_keys(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": 2})
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"\xff\xfe"])
def test_json_that_is_none_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(FileError, match=re.escape(f"{tmp_path / 'x.json'} cannot be read")):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("read", [read_json, read_tensors, read_note])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(FileError, match=re.escape(f"{tmp_path / 'gone'} is missing")):
        read(tmp_path / "gone")


@pytest.mark.parametrize("note", [None, NOTE, [], "text"])
def test_tensors_and_note_come_back_as_they_were(tmp_path, note):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, note)
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert read_note(path) == note


def test_parameters_and_views_are_saved_by_value(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    write_tensors(tmp_path / "x", {"whole": parameter, "turned": parameter.T})
    found = read_tensors(tmp_path / "x")
    assert torch.equal(found["turned"], found["whole"].T)
    assert not found["whole"].requires_grad


def test_the_same_tensors_and_note_give_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        write_tensors(
            tmp_path / name, {key: value.clone() for key, value in TENSORS.items()}, dict(NOTE)
        )
    write_tensors(tmp_path / "other", TENSORS, NOTE | {"step": 4})
    first, second, other = ((tmp_path / name).read_bytes() for name in ("first", "second", "other"))
    assert first == second != other


@pytest.mark.parametrize("read", [read_tensors, read_note])
@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_file_that_was_cut_off_is_named(tmp_path, read, kept):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, NOTE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FileError, match=re.escape(f"{path} is damaged") + ".*delete it"):
        read(path)


def test_a_pickle_is_not_opened(tmp_path):
    torch.save(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="is damaged"):
        read_tensors(tmp_path / "x.safetensors")


# --- checksums


class Schema(BaseModel):
    n: int
    parts: dict[str, float] = {}


def test_writing_gives_the_checksum_that_reading_verifies(tmp_path):
    path = tmp_path / "file"
    checksum = write(path, "text")
    assert checksum == sha256(b"text")
    assert files.read(path, checksum) == b"text"
    path.write_text("texT")
    with pytest.raises(FileError, match=re.escape(f"{path} is damaged (its SHA-256 is not")):
        files.read(path, checksum, "do this")


@pytest.mark.parametrize(
    "value", [{"n": 1}, {"parts": {"a": 0.1, "b": 1e300}, "n": 2, "x": [None]}]
)
def test_a_record_comes_back_without_its_checksum(value, tmp_path):
    write_record(tmp_path / "r.json", value)
    assert read_record(tmp_path / "r.json", Schema) == value
    assert "sha256" in read_json(tmp_path / "r.json")


def test_a_record_without_a_checksum_is_read_as_well(tmp_path):
    write_json(tmp_path / "r.json", {"n": 1})
    assert read_record(tmp_path / "r.json", Schema) == {"n": 1}


def test_a_changed_record_is_noticed(tmp_path):
    path = tmp_path / "r.json"
    write_record(path, {"n": 1, "x": "a"})
    path.write_text(path.read_text().replace('"a"', '"b"'))
    with pytest.raises(FileError, match=r"is damaged or was changed .*; do this$"):
        read_record(path, Schema, "do this")


@pytest.mark.parametrize("value", [[], 3, None, {}, {"n": "x"}, {"n": 1, "parts": [1]}])
def test_a_record_with_other_content_is_refused_in_one_line(value, tmp_path):
    write_json(tmp_path / "r.json", value)
    with pytest.raises(FileError, match=r"r\.json is damaged \(.*; do this$"):
        read_record(tmp_path / "r.json", Schema, "do this")


def test_any_flipped_bit_of_tensors_with_a_note_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, NOTE)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        try:
            found = read_note(path)
        except FileError:
            continue
        if found != NOTE:  # the flipped bit is in the word "note": there is none
            assert not isinstance(found, dict) or "step" not in found
            continue
        kept = read_tensors(path)  # only the layout of the header may have changed
        assert all(torch.equal(kept[name], value) for name, value in TENSORS.items())


@pytest.mark.parametrize("read", [read_json, read_tensors, read_note])
def test_a_pipe_and_a_folder_are_no_files(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileError, match=f"{name} (is not a regular file|cannot be read)"):
            read(tmp_path / name)


def test_half_a_character_can_be_written(tmp_path):
    write(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "\\ud800"
