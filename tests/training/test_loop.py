from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mechmem.data.label_noise import UniformWrong
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.files import FileError, write_tensors
from mechmem.training import loop as home
from mechmem.training.loop import _Shuffled, accuracy, curves_of, evaluation_sets, train
from mechmem.training.recipe import Phase, Recipe
from mechmem.training.store import Trained


def changed(recipe: Recipe, **fields) -> Recipe:
    return recipe.model_copy(update={"optimisation": recipe.optimisation.model_copy(update=fields)})


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all checkpoints and of the curves."""
    checkpoints = {
        path.name: path.read_bytes() for path in sorted((folder / "checkpoints").glob("step_*"))
    }
    record = json.loads((folder / "training.json").read_text())
    return checkpoints | {"curves": json.dumps([record["curves"], record["phases"]]).encode()}


def stopping_at(step: int):
    def watch(done, *_):
        if done == step:
            raise KeyboardInterrupt

    return watch


# --- going on after an interruption


@pytest.mark.parametrize("step", [1, 5, 7, 13, 19, 20])
def test_an_interrupted_training_goes_on_to_the_same_bytes(step, recipe, trained, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(recipe, 0, tmp_path, stopping_at(step))
    assert not (tmp_path / "training.json").exists()
    assert (tmp_path / "state.safetensors").exists()
    train(recipe, 0, tmp_path)
    assert content(tmp_path) == content(trained.folder)


@pytest.mark.parametrize("name", ["_save", "_close"])
def test_a_crash_between_two_files_changes_nothing(name, recipe, trained, tmp_path, monkeypatch):
    """After a checkpoint and before the state that goes with it; after the last state and before
    the record."""
    with monkeypatch.context() as patched:
        original, calls = getattr(home._Run, name), []

        def crashing(run):
            calls.append(run.step)
            if len(calls) == (3 if name == "_save" else 1):
                raise KeyboardInterrupt
            original(run)

        patched.setattr(home._Run, name, crashing)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, 0, tmp_path)
    train(recipe, 0, tmp_path)
    assert content(tmp_path) == content(trained.folder)


@pytest.fixture(scope="module")
def long_recipe(recipe) -> Recipe:
    return changed(recipe, n_steps=300, evaluate_every=25)


def test_a_training_that_is_killed_five_times_ends_at_the_same_bytes(
    long_recipe, processes, tmp_path
):
    started = time.monotonic()
    whole = processes.Process(target=train, args=(long_recipe, 0, tmp_path / "whole"))
    whole.start()
    whole.join()
    seconds, moments = time.monotonic() - started, random.Random(4)
    codes = [
        killed(processes, long_recipe, tmp_path / "broken", moments.uniform(0, seconds / 16))
        for _ in range(5)
    ]
    assert codes == [-signal.SIGKILL] * 5
    last = processes.Process(target=train, args=(long_recipe, 0, tmp_path / "broken"))
    last.start()
    last.join()
    assert (whole.exitcode, last.exitcode) == (0, 0)
    assert len(Trained(tmp_path / "whole").steps) == 13
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


def killed(processes, recipe: Recipe, folder: Path, delay: float) -> int:
    """Train until there is a new checkpoint and for `delay` seconds more, then kill -9; the exit
    code."""
    before = n_checkpoints(folder)
    process = processes.Process(target=train, args=(recipe, 0, folder))
    process.start()
    while process.is_alive() and n_checkpoints(folder) <= before:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode


def n_checkpoints(folder: Path) -> int:
    return len(list(folder.glob("checkpoints/step_*")))


def test_a_second_training_of_a_recipe_waits_for_the_first(long_recipe, processes, tmp_path):
    first = processes.Process(target=train, args=(changed(long_recipe, n_steps=10**6), 0, tmp_path))
    first.start()
    while not (tmp_path / "state.safetensors").exists():
        time.sleep(0.002)
    said = []

    def say(text):
        said.append(text)
        first.kill()  # instead of an hour of waiting; the state is taken over

    train(changed(long_recipe, n_steps=10**6, stop_at=Phase()), 0, tmp_path, say=say)
    first.join()
    assert said == [f"another process is training in {tmp_path}; waiting for it"]
    assert (tmp_path / "training.json").exists()


@pytest.mark.parametrize("n_kept", [0, 7, 1000])
def test_a_state_that_was_cut_off_is_a_clear_error_and_can_be_deleted(
    n_kept, recipe, trained, tmp_path
):
    with pytest.raises(KeyboardInterrupt):
        train(recipe, 0, tmp_path, stopping_at(12))
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:n_kept])
    with pytest.raises(
        FileError, match=r"state\.safetensors is damaged .*; delete it and train again"
    ):
        train(recipe, 0, tmp_path)
    state.unlink()
    train(recipe, 0, tmp_path)
    assert content(tmp_path) == content(trained.folder)


def test_a_state_of_another_model_is_a_clear_error(recipe, tmp_path):
    write_tensors(
        tmp_path / "state.safetensors",
        {"model.x": torch.zeros(1)},
        {"step": 5, "seconds": 0.0, "curves": []},
    )
    with pytest.raises(
        FileError, match=r"state\.safetensors does not fit .*; delete it and train again"
    ):
        train(recipe, 0, tmp_path)


def test_a_folder_that_cannot_be_made_is_a_clear_error(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FileError, match=r"cannot write .*file/run: .*; choose another folder with --runs"
    ):
        train(recipe, 0, tmp_path / "file" / "run")


def test_a_finished_training_is_taken_as_it_is(recipe, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(home, "_Run", None)
    assert train(recipe, 0, trained.folder).record == trained.record


def test_a_training_that_another_process_finished_meanwhile_is_taken_as_it_is(
    recipe, trained, tmp_path, monkeypatch
):
    """It was not there at the first look, and was finished by the time that the folder was
    locked."""
    folder, locked = tmp_path / "seed_0", home.locked

    def finished_by_another(path, *others):
        path.mkdir()
        (path / "training.json").write_bytes((trained.folder / "training.json").read_bytes())
        return locked(path, *others)

    monkeypatch.setattr(home, "locked", finished_by_another)
    monkeypatch.setattr(home, "_Run", None)
    assert train(recipe, 0, folder).record == trained.record


# --- what is trained


def test_nothing_is_left_beside_the_record_and_the_checkpoints(trained):
    assert {path.name for path in trained.folder.iterdir()} - {".lock"} == {
        "training.json",
        "recipe.yaml",
        "checkpoints",
    }
    names = sorted(path.name for path in (trained.folder / "checkpoints").iterdir())
    assert names == [f"step_{step:06d}.safetensors" for step in (0, 5, 10, 15, 20)]


def test_the_first_checkpoint_is_the_untrained_model(recipe, trained):
    built = recipe.build(0).state_dict()
    first = trained.at("initial").state_dict()
    assert all(torch.equal(built[name], first[name]) for name in built)


def test_steps_are_those_of_a_plain_loop_on_the_hooked_transformer(recipe, tmp_path):
    """AdamW on the answer tokens' cross-entropy, warm-up, clipping: written out on the model's own
    forward."""
    recipe = changed(
        recipe, n_steps=4, evaluate_every=4, schedule="linear", weight_decay=0.1, n_warmup_steps=3
    )
    spec, examples, model = recipe.optimisation, recipe.task.training_set(), recipe.build(0)
    sequences, batches = (
        torch.cat([examples.prompt, examples.given], dim=1),
        _Shuffled(torch.arange(120), 40, 0),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=spec.betas, weight_decay=0.1)
    for step in range(4):
        batch = sequences[batches.at(step)]
        loss = F.cross_entropy(model(batch[:, :-1])[:, 9:].flatten(0, 1), batch[:, 10:].flatten())
        warm = min(1, (step + 1) / 3)
        optimizer.param_groups[0]["lr"] = spec.learning_rate * warm * (0.1 + 0.9 * (1 - step / 4))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
        optimizer.step()
    found = train(recipe, 0, tmp_path).at("final").state_dict()
    for name, expected in model.state_dict().items():
        if not name.endswith("b_K"):  # has no gradient but noise, which Adam blows up
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_bytes_and_another_others(recipe, trained, tmp_path):
    short = changed(recipe, n_steps=5)
    same, other = train(short, 0, tmp_path / "same"), train(short, 1, tmp_path / "other")
    name = "checkpoints/step_000005.safetensors"
    assert (same.folder / name).read_bytes() == (trained.folder / name).read_bytes()
    assert (other.folder / name).read_bytes() != (trained.folder / name).read_bytes()


def test_training_is_watched_step_by_step(recipe, tmp_path):
    seen = []
    trained = train(
        changed(recipe, n_steps=6),
        0,
        tmp_path,
        lambda done, n, row: seen.append((done, n, row["step"])),
    )
    assert [done for done, _, _ in seen] == [0, 1, 2, 3, 4, 5, 5, 6, 6]
    assert [latest for _, _, latest in seen] == [0, 0, 0, 0, 0, 0, 5, 5, 6]
    assert {n for _, n, _ in seen} == {6}
    assert trained.curves["step"].tolist() == [0, 5, 6]


def test_training_stops_once_its_stop_held_long_enough(recipe, tmp_path):
    always = changed(recipe, stop_at=Phase(), patience=3)
    trained = train(always, 0, tmp_path / "always")
    assert trained.curves["step"].tolist() == [0, 5, 10]
    assert trained.phases["final"] == 10
    never = changed(recipe, stop_at=Phase(held_out=1.0), patience=1)
    assert train(never, 0, tmp_path / "never").curves["step"].tolist() == [0, 5, 10, 15, 20]


def test_an_interruption_does_not_delay_the_stop(recipe, tmp_path):
    stopping = changed(recipe, stop_at=Phase(), patience=3)
    with pytest.raises(KeyboardInterrupt):
        train(stopping, 0, tmp_path, stopping_at(8))
    assert train(stopping, 0, tmp_path).curves["step"].tolist() == [0, 5, 10]


def test_a_training_that_diverges_says_so(recipe, tmp_path):
    wild = changed(recipe, learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(
        ArithmeticError,
        match="training diverged before step 5: a weight is not finite; lower learning_",
    ):
        train(wild, 0, tmp_path)
    assert not (tmp_path / "training.json").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [
        "step_000000.safetensors"
    ]


# --- batches


def test_an_epoch_takes_each_instance_once():
    batches = _Shuffled(torch.arange(12), 4, seed=0)
    for epoch in range(3):
        rows = torch.cat([batches.at(3 * epoch + i) for i in range(3)])
        assert sorted(rows.tolist()) == list(range(12))


def test_the_rest_of_an_epoch_that_fills_no_batch_differs_from_epoch_to_epoch():
    batches = _Shuffled(torch.arange(11), 4, seed=0)
    left_out = []
    for epoch in range(20):
        rows = torch.cat([batches.at(2 * epoch + i) for i in range(2)]).tolist()
        assert len(set(rows)) == len(rows) == 8
        left_out.append(set(range(11)) - set(rows))
    assert set.union(*left_out) == set(range(11))


def test_batches_follow_from_seed_and_step_alone():
    forwards = [_Shuffled(torch.arange(12), 4, seed=3).at(step).tolist() for step in range(9)]
    one = _Shuffled(torch.arange(12), 4, seed=3)
    assert [one.at(step).tolist() for step in reversed(range(9))] == forwards[::-1]
    assert forwards[:3] != forwards[3:6]
    assert forwards[:3] != [
        _Shuffled(torch.arange(12), 4, seed=4).at(step).tolist() for step in range(3)
    ]


def test_a_batch_is_never_larger_than_the_training_set():
    assert sorted(_Shuffled(torch.arange(5), 500, seed=0).at(7).tolist()) == list(range(5))


# --- the curves


def test_the_curves_are_measured_on_the_first_of_each_group(recipe):
    sets = evaluation_sets(recipe.task, 10)
    train_set, held_out = recipe.task.sample("train"), recipe.task.sample("held_out")
    assert torch.equal(sets["clean"].prompt, train_set.prompt[~train_set.is_noisy][:10])
    assert torch.equal(sets["noisy"].prompt, train_set.prompt[train_set.is_noisy][:10])
    assert torch.equal(sets["held_out"].prompt, held_out.prompt[:10])


def test_accuracy_is_the_share_of_whole_greedy_answers(model, examples):
    answer = Session().greedy(model, examples)
    partly = answer.clone()
    partly[[0, 3, 4], [0, 2, 4]] = (partly[[0, 3, 4], [0, 2, 4]] + 1) % 10  # one wrong token each
    assert accuracy(model, examples.continued_with(answer)) == 1
    assert accuracy(model, examples.continued_with(partly)) == 9 / 12
    assert accuracy(model, examples.continued_with(partly), batch_size=5) == 9 / 12


def test_each_curve_has_its_group_and_label(monkeypatch):
    asked = []
    monkeypatch.setattr(
        home, "accuracy", lambda model, fed: asked.append((fed.name, fed.prefix)) or len(asked)
    )

    class Named:
        def __init__(self, name):
            self.name = name

        def with_prefix(self, prefix):
            self.prefix = prefix
            return self

    found = curves_of(None, {name: Named(name) for name in ("clean", "noisy", "held_out")})
    assert found == {"clean": 1, "memorised": 2, "corrected": 3, "held_out": 4}
    assert asked == [
        ("clean", "given"),
        ("noisy", "given"),
        ("noisy", "true"),
        ("held_out", "true"),
    ]


def test_a_training_without_noise_has_curves_without_gaps(recipe, tmp_path):
    task = FourDigitAddition(n_train=40, n_held_out=10, noise=UniformWrong(rate=0))
    trained = train(changed(recipe.model_copy(update={"task": task}), n_steps=1), 0, tmp_path)
    assert trained.curves[["memorised", "corrected"]].to_numpy().tolist() == [[0, 0], [0, 0]]


def test_a_device_that_the_machine_lacks_is_refused_before_anything_is_made(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="'cuda' is not available on this machine"):
        train(changed(recipe, device="cuda"), 0, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
