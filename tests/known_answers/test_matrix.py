"""Known answers: every method must tell apart models of which it is known what it should find.

By default a few cells are judged; `--whole-matrix` judges all, and with `--write-docs` writes the
table of docs/known_answers.md and its records. Models are built once per session.
"""

from __future__ import annotations

import json
import re

import matrix
import pytest
import torch
from edited import EDITED, answers, noisy_and_clean
from matrix import CELLS, EXPECTED, RECORD, ROOT

from mechmem.data.example_set import ExampleSet
from mechmem.data.label_noise import Digit, UniformWrong
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.training.recipe import named_recipe
from mechmem.training.store import find

PAGE = ROOT / "docs" / "known_answers.md"
TABLE = re.compile(r"(?<=<!-- known answers -->\n).*?(?=\n<!-- end -->)", flags=re.DOTALL)
DIFFERENT = {("C2", "planted_head"): "U"}
"""Cells that came out differently from what was expected; docs/log.md says what was wrong."""
QUICK = [("C2", "untrained"), ("C2", "planted_look_up"), ("C6", "planted_look_up")]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Where the models of this session are built."""
    return tmp_path_factory.mktemp("known_answers") / "runs"


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return []


@pytest.mark.parametrize(("claim", "model"), CELLS, ids=lambda part: part)
def test_a_cell_is_as_expected(claim, model, runs, found, request):
    if not request.config.getoption("whole_matrix") and (claim, model) not in QUICK:
        pytest.skip("only with --whole-matrix")
    cell = matrix.judged(claim, model, runs)
    found.append(cell)
    if (claim, model) in DIFFERENT:
        assert cell["found"] == DIFFERENT[claim, model], cell["reason"]
    else:
        assert cell["matches"] is not False, cell["reason"]


def test_the_page_shows_the_records(found, request):
    options = request.config
    if options.getoption("whole_matrix") and options.getoption("write_docs"):
        RECORD.write_text(json.dumps({"cells": found}, indent=1, ensure_ascii=False) + "\n")
        text = PAGE.read_text()
        PAGE.write_text(TABLE.sub(lambda _: matrix.table(found), text))
    cells = json.loads(RECORD.read_text())["cells"] if RECORD.exists() else []
    assert TABLE.search(PAGE.read_text())[0] == matrix.table(cells)


# --- the matrix itself


@pytest.mark.parametrize("claim", EXPECTED)
def test_a_claim_has_a_model_that_must_support_it_and_one_that_must_refute_it(claim):
    verdicts = set(EXPECTED[claim].values())
    assert verdicts <= {"S", "R", "NT", "?"}
    # No number of neurons tells a tuned last MLP from a tuned head: both cells of C7 are "?".
    assert verdicts >= ({"R"} if claim == "C7" else {"S", "R"})


@pytest.mark.parametrize("model", sorted({model for _, model in CELLS} - {*EDITED}))
def test_every_model_is_a_training_by_name(model):
    assert named_recipe(model, ROOT / "experiments").name == model


@pytest.mark.parametrize("name", EDITED)
def test_the_hooks_of_an_edited_model_act_on_noisy_prompts_alone(name, tmp_path):
    edit, checkpoint = EDITED[name]
    trained = find("fda_small", 0, tmp_path)
    base, noisy, clean = trained.at(checkpoint), *noisy_and_clean(trained.task)
    edited = edit(base, trained.task)
    right = (answers(edited, noisy) == noisy.given).all(dim=1).float().mean()
    assert right == 0 if name == "overwritten" else right > 0.9
    assert torch.equal(answers(edited, clean), answers(base, clean))
    assert not torch.equal(answers(edited, noisy), answers(base, noisy))


def test_the_rule_alone_is_the_shipped_twin_under_another_name():
    names = ("rule_only", "fda_small_clean")
    rule_only, twin = (named_recipe(name, ROOT / "experiments") for name in names)
    assert rule_only.recipe_hash == twin.recipe_hash


def test_halves_stay_disjoint_halves_where_there_are_fewer_instances():
    task = FourDigitAddition(n_train=300, n_held_out=20, noise=Digit(rate=0.1))
    sets = {
        "ranked": ExampleSet(noisy=True, n=200),
        "tested": ExampleSet(noisy=True, n=200, skip=200),
        "clean": ExampleSet(noisy=False, n=100),
    }
    small = {name: ExampleSet(**block) for name, block in matrix.fitted(sets, task).items()}
    assert (small["ranked"].n, small["tested"].n, small["tested"].skip) == (15, 15, 15)
    assert small["clean"] == sets["clean"]
    both = {small[name].of(task).text(i) for name in ("ranked", "tested") for i in range(15)}
    assert len(both) == 30


def test_held_out_instances_stand_in_where_none_is_clean():
    task = FourDigitAddition(n_train=30, n_held_out=20, noise=UniformWrong(rate=1))
    fitted = matrix.fitted({"clean": ExampleSet(noisy=False, n=100)}, task)["clean"]
    assert (fitted["split"], fitted["noisy"], fitted["n"]) == ("held_out", None, 20)


def test_a_cell_that_comes_out_differently_is_bold():
    cell = {"claim": "C2", "model": "rote", "expected": "NT", "found": "S", "matches": False}
    row = next(line for line in matrix.table([cell]).splitlines() if line.startswith("| rote"))
    assert "| **NT / S** |" in row
    assert "R / not run" in row
