from __future__ import annotations

import os
import time

import pytest

from mechmem.spec.bounded_yaml import DEEPEST, MOST_BYTES, MOST_LINES, BoundsError, load
from mechmem.spec.yaml_file import SpecError, SpecFile

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, ":5:1"),
        (BOMB, "more than 20,000 keys and values"),
        ("a: &a [*a]", ":1:8: &a contains itself"),
        ("&a [*a]", ":1:5: &a contains itself"),
        ("a: &x\n  <<: *x", ":2:7: &x contains itself"),
        ("a: *b", ":1:4: no part of the file is named &b"),
        ("a: &x 1\nb: &x 2", ":2:4: &x is defined twice"),
        ("a: !foo [0]", ":1:4: a spec has no tags; remove !foo"),
        ("%YAML 1.1\n---\na: yes", "a spec has no % directives"),
        ("a: " + "9" * 5000, ":1:4: an integer of 5,000 digits; at most 20"),
        ("a: 0x" + "f" * 5000, ":1:4: an integer of 5,002 digits"),
        ('a: "\\ud800"', r":1:4: \\ud800 is no character of a text"),
        ('a: "b\\0"', r":1:4: \\u0000 is no character of a text"),
        ('a: "\\e[2J"', r":1:4: \\u001b is no character of a text"),
        ("a: " + "[" * 300 + "]" * 300, f"nested more than {DEEPEST} levels deep"),
        ("a:\n" + "- " * 300, f":2:99: nested more than {DEEPEST} levels deep"),
        ("a: " + "{b: " * 300 + "}" * 300, f"nested more than {DEEPEST} levels deep"),
        ("? {a: b}\n: c", ":1:3: a key must be a text"),
        ("? " * 40, ":1:3: a key must be a text"),
        ("3: a", ":1:1: the key 3 must be a text; put it in quotes"),
        ("~: a", ":1:1: the key ~ must be a text; put it in quotes"),
        ("a: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ("a: 0b_", "not valid YAML"),
        ("x" * (MOST_BYTES + 1), "at most 200,000 are read"),
        ("#\n" * (MOST_LINES + 1), "10,001 lines; at most 10,000 are read"),
    ],
    ids=lambda value: value[:24],
)
@pytest.mark.parametrize("typ", ["rt", "safe"])
def test_what_cannot_be_built_is_refused_with_its_place(typ, text, says):
    started = time.process_time()
    with pytest.raises(BoundsError, match=says.replace("[", r"\[")):
        load(text, typ)
    assert time.process_time() - started < 10


def test_depth_is_that_after_aliases_are_replaced():
    part = "[" * 20 + "]" * 20
    assert load(f"a: &a {part}\nb: [*a]")["b"][0] == load(part)
    nested = f"a: &a {part}\nb: &b {'[' * 20}*a{']' * 20}\nc: {'[' * 20}*b{']' * 20}"
    with pytest.raises(BoundsError, match=r":3:24: nested more than"):
        load(nested)


def test_aliases_within_the_bounds_are_allowed():
    assert load("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}")["d"]["b"] == 1


def test_an_override_changes_only_its_own_copy_of_an_alias(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("a: &a {b: {c: 1}}\nd: *a\n", encoding="utf-8")
    data = SpecFile(path, ["d.b.c=2"]).data
    assert (data["a"]["b"]["c"], data["d"]["b"]["c"]) == (1, 2)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "spec.yaml")
    with pytest.raises(SpecError, match="is not a regular file; write the spec to a file first"):
        SpecFile(tmp_path / "spec.yaml")


def test_a_large_file_is_refused_within_a_second(tmp_path):
    (tmp_path / "spec.yaml").write_bytes(b"a: [" + b"0, " * 3_300_000)
    started = time.process_time()
    with pytest.raises(SpecError, match="has 9,900,004 bytes; a spec has at most 200,000"):
        SpecFile(tmp_path / "spec.yaml")
    assert time.process_time() - started < 1


def test_a_file_is_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    path = tmp_path / "spec.yaml"
    path.write_bytes("a: e r1 ∅\n".encode())
    assert SpecFile(path).data["a"] == "e r1 ∅"
    path.write_bytes(b"a: b\nc: \xff\n")
    with pytest.raises(SpecError, match=r"spec.yaml:2: byte 0xff is not UTF-8"):
        SpecFile(path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("a.²=1", "has nothing at"),
        (f"{'a.' * 60}b=1", "a key has at most 50 parts"),
        ("a=&x [*x]", "the value:1:5: &x contains itself"),
        (f"a={'[' * 300}", "nested more than 50 levels deep"),
        ("a=!foo b", "a spec has no tags"),
    ],
)
def test_overrides_have_the_same_bounds(tmp_path, override, says):
    path = tmp_path / "spec.yaml"
    path.write_text("a: [1]\n", encoding="utf-8")
    with pytest.raises(SpecError, match=says.replace("[", r"\[")) as caught:
        SpecFile(path, [override])
    assert len(str(caught.value)) < 300
