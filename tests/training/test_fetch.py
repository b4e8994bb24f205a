"""Fetching: every file is the one of the index or is not kept, from a folder or a server."""

from __future__ import annotations

import json
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from mechmem.experiment.cost import fetch_or_train
from mechmem.spec.errors import InputError
from mechmem.spec.files import FileError
from mechmem.training import fetch as engine
from mechmem.training import store
from mechmem.training.fetch import fetch, seeds_of, shipped_seeds
from mechmem.training.index import read_index, write_index
from mechmem.training.store import SHIPPED, find, folder_of, names, ship, shipped_name

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(trained, tmp_path) -> Path:
    """The shipped trainings of a clone: two seeds of the tiny training, and the index."""
    folder = tmp_path / "clone"
    for seed in (0, 3):
        ship(trained, [0, 20], folder / "tiny" / f"seed_{seed}")
        record = folder / "tiny" / f"seed_{seed}" / "training.json"
        record.write_text(json.dumps(trained.record | {"seed": seed}))
    write_index(folder)
    return folder


@pytest.fixture
def installed(clone, tmp_path, monkeypatch) -> Path:
    """What a wheel carries of it: seed 0, and the index."""
    folder = tmp_path / "installed"
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns("seed_3"))
    monkeypatch.setattr(store, "SHIPPED", folder)
    return folder


@pytest.fixture
def runs(installed, tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def server(clone):
    """Serves the clone on loopback; gives its address and the paths that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_):
            asked.append(self.path)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(clone))) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}", asked
        serving.shutdown()
        thread.join()


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


CHECKPOINT = "checkpoints/step_000020.safetensors"


# --- the index


def test_the_index_is_true_of_the_shipped_files():
    on_disk = {path for path in SHIPPED.rglob("*") if path.is_file() and path.name != engine.INDEX}
    entries = read_index(SHIPPED)
    assert {SHIPPED / entry.path for entry in entries} == on_disk
    assert [entry.path for entry in entries if not entry.is_at(SHIPPED)] == []
    assert all((SHIPPED / entry.path).stat().st_size == entry.n_bytes for entry in entries)


def test_the_index_has_size_and_checksum_of_every_file(tmp_path):
    (tmp_path / "a" / "seed_0").mkdir(parents=True)
    (tmp_path / "a" / "seed_0" / "card.md").write_bytes(b"abc")
    write_index(tmp_path)
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # NIST's example
    expected = {"a/seed_0/card.md": {"sha256": sha256, "bytes": 3}}
    assert json.loads((tmp_path / "checksums.json").read_text()) == expected
    write_index(tmp_path)  # the index is not a file of the index
    assert json.loads((tmp_path / "checksums.json").read_text()) == expected


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", (3,)), ("1-5", (1, 2, 3, 4, 5)), ("1,3", (1, 3)), ("4,0-2,1", (0, 1, 2, 4))],
)
def test_seeds_are_a_range_or_a_list(text, seeds):
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "5-1", "1-", "-1", "1;2", "1,,2", "1.5"])
def test_other_seeds_are_refused(text):
    with pytest.raises(InputError, match="is not of the form 1-5 or 1,3"):
        seeds_of(text)


# --- a fetch


def test_a_fetched_seed_is_found_like_a_shipped_one(installed, runs, clone, recipe, trained):
    assert folder_of(recipe, 3, runs).parent.name == f"tiny-{recipe.recipe_hash}"  # to be made
    (folder,) = fetch("tiny", [3], str(clone), runs)
    assert folder == runs / "trainings" / "shipped" / "tiny" / "seed_3"
    assert files(folder) == files(clone / "tiny" / "seed_3")
    assert folder_of(recipe, 3, runs) == folder
    found = find("tiny", 3, runs)
    assert (found.seed, found.steps) == (3, [0, 20])
    assert torch.equal(found.at("final").W_E, trained.at("final").W_E.half().float())
    assert names(runs) == ["tiny"]


def test_a_server_gives_the_same_as_a_folder(runs, clone, server):
    address, asked = server
    (folder,) = fetch("tiny", [3], address + "/", runs)
    assert files(folder) == files(clone / "tiny" / "seed_3")
    assert len(asked) == len(files(folder))
    assert asked[-1] == "/tiny/seed_3/training.json"  # last: it makes the folder a training


def test_verified_files_are_kept_and_damaged_ones_fetched_again(runs, server):
    address, asked = server
    (folder,) = fetch("tiny", [3], address, runs)
    (folder / CHECKPOINT).write_bytes(b"damaged")
    (folder / "card.md").unlink()
    whole = files(folder)
    asked.clear()
    fetch("tiny", [3], address, runs)
    assert sorted(asked) == [f"/tiny/seed_3/{name}" for name in ("card.md", CHECKPOINT)]
    assert len(files(folder)) == len(whole) + 1
    asked.clear()
    fetch("tiny", [3], address, runs)
    assert asked == []


def test_what_the_package_has_is_not_fetched(installed, runs, server):
    address, asked = server
    assert fetch("tiny", [0], address, runs) == [installed / "tiny" / "seed_0"]
    assert asked == []
    assert not runs.exists()


def test_progress_counts_the_files_and_estimates_the_time_left(runs, clone):
    heard = []
    fetch("tiny", [3], str(clone), runs, lambda *event: heard.append(event))
    n = len(files(clone / "tiny" / "seed_3"))
    assert [event[1:3] for event in heard] == [(i, n) for i in range(n)]
    assert heard[0][3] is None
    assert all(event[3] >= 0 for event in heard[1:])


@pytest.mark.parametrize("over", ["http", "folder"])
def test_a_wrong_file_is_named_and_not_kept(over, runs, clone, server):
    """The source's own index is not believed: it is true of the forged file."""
    path = clone / "tiny" / "seed_3" / CHECKPOINT
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    write_index(clone)
    with pytest.raises(FileError, match=r"step_000020.safetensors is not the file .* SHA-256"):
        fetch("tiny", [3], server[0] if over == "http" else str(clone), runs)
    left = files(runs)
    assert not [name for name in left if "step_000020" in name or "training.json" in name]
    path.write_bytes(b"too short")
    with pytest.raises(FileError, match="it ends after 9 of"):
        fetch("tiny", [3], server[0] if over == "http" else str(clone), runs)
    assert files(runs) == left


def test_an_endless_file_is_not_read_to_its_end(runs, clone, monkeypatch):
    path = clone / "tiny" / "seed_3" / "card.md"
    n_bytes = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"x" * 1000)
    read = engine._copied
    sizes = []

    def measured(*arguments):
        content = read(*arguments)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(engine, "_copied", measured)
    with pytest.raises(FileError, match="its SHA-256 is another"):
        fetch("tiny", [3], str(clone), runs)
    assert n_bytes + 1 in sizes


def test_a_file_that_the_source_lacks_is_named(runs, clone, server):
    (clone / "tiny" / "seed_3" / CHECKPOINT).unlink()
    with pytest.raises(FileError, match=r"/tiny/seed_3/.*step_000020.* \(404 .*laid out like"):
        fetch("tiny", [3], server[0], runs)
    with pytest.raises(FileError, match=r"step_000020\.safetensors cannot be read"):
        fetch("tiny", [3], str(clone), runs)
    assert not list(runs.rglob("training.json"))


def test_an_unreachable_server_is_a_clear_error(runs):
    with pytest.raises(FileError, match=r"cannot be reached .*check the address and the network"):
        fetch("tiny", [3], "http://127.0.0.1:9", runs)  # the discard port: nothing listens there
    assert not runs.exists()


@pytest.mark.parametrize(
    ("name", "seed", "source", "message"),
    [
        ("tinny", 3, None, "there is no shipped training 'tinny'; did you mean 'tiny'?"),
        ("tiny", 4, None, "tiny is shipped with the seeds 0, 3; there is no seed 4"),
        ("tiny", 3, "nowhere", "--from nowhere is not a folder"),
        ("tiny", 3, "ftp://host/x", "must be a folder or an http(s) address"),
        ("tiny", 3, "file:///etc", "must be a folder or an http(s) address"),
    ],
)
def test_what_cannot_be_fetched_is_refused(name, seed, source, message, runs, clone):
    with pytest.raises(InputError, match=re.escape(message)):
        fetch(name, [seed], source or str(clone), runs)
    assert not runs.exists()


# --- what a run recommends


def test_a_missing_seed_is_fetched_or_trained(installed, recipe):
    assert shipped_name(recipe) == "tiny"
    assert shipped_seeds("tiny") == [0, 3]
    (line,) = fetch_or_train([(recipe, 3), (recipe, 7)])
    assert line.startswith(
        "tiny: seeds are not installed; fetch them with "
        "`mechmem fetch tiny --seeds 3 --from URL|FOLDER`, or they are trained (about "
    )


def test_a_training_that_is_not_shipped_is_not_recommended(installed, recipe):
    other = recipe.model_copy(
        update={"optimisation": recipe.optimisation.model_copy(update={"n_steps": 10})}
    )
    assert fetch_or_train([(other, 3)]) == []
    assert fetch_or_train([(recipe, 7)]) == []


# --- the wheel


def test_the_wheel_carries_seed_0_and_the_index(monkeypatch):
    """As setuptools itself finds the files."""
    from setuptools import Distribution

    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    assert distribution.include_package_data is False
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    packaged = [Path(folder) / name for _, folder, _, names in build.data_files for name in names]
    found = {path for path in packaged if "shipped" in path.parts}
    expected = {path.relative_to(ROOT) for path in SHIPPED.glob("*/seed_0/**/*") if path.is_file()}
    assert found == expected | {Path("mechmem/shipped/checksums.json")}
    assert sum(path.stat().st_size for path in found) < 55e6
    assert not [name for name in build.packages if "shipped" in name]


# --- damage of what is installed or was fetched


@pytest.mark.parametrize("file", [CHECKPOINT, "training.json"])
@pytest.mark.parametrize("damage", ["flipped", "deleted"])
@pytest.mark.parametrize("seed", [0, 3])
def test_a_damaged_shipped_training_is_refused_and_the_remedy_restores_it(
    seed, file, damage, clone, runs
):
    (folder,) = fetch("tiny", [seed], str(clone), runs)
    path = folder / file
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    if damage == "deleted":
        path.unlink()
    if damage == "flipped" or file != "training.json":  # without it, there is no such training
        with pytest.raises(FileError) as raised:
            store.find("tiny", seed, runs)
        message = str(raised.value)
        assert message.startswith(f"{path} is ")
        assert f"`mechmem fetch tiny --seeds {seed} --from URL|FOLDER" in message
        assert (f"--runs {runs}" in message) == (seed == 3)
    fetch("tiny", [seed], str(clone), runs)
    assert path.read_bytes() == content
    assert store.find("tiny", seed, runs).at(20)


def test_a_damaged_index_is_a_clear_error(installed, runs):
    (installed / "checksums.json").write_text('{"tiny/seed_0/training.json": {"sha256": 3}}')
    with pytest.raises(FileError, match=r"checksums\.json is damaged .*; install mechmem again"):
        store.find("tiny", 0, runs)
