"""docs/extending.md, followed to the letter in a folder of its own by a user who does not touch the
package."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from plain_hooks import close, logits_of
from plugin import plugin

from mechmem.session import Session

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files that the page tells to write: blocks of one title make one file."""
    folder = tmp_path_factory.mktemp("mine")
    for title, text in re.findall(
        r"```\w+ title=(\S+)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL
    ):
        with (folder / title).open("a") as file:
            file.write(text + "\n\n")
    return folder


def mechmem(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    program = "from mechmem.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True
    )


def test_the_page_as_a_user_follows_it(folder):
    for command in re.findall(r"^mechmem (.+)$", PAGE.read_text(), flags=re.MULTILINE):
        ran = mechmem(folder, *command.split())
        assert ran.returncode == 0, ran.stderr
        assert "Traceback" not in ran.stderr
    (made,) = (folder / "runs").glob("damped-*")
    norms = pd.read_parquet(made / "tables" / "head_norms.parquet")
    assert len(norms) == 2 * 4 * 2  # layers, heads, example sets
    assert (norms["value"] > 0).all()
    damped = pd.read_parquet(made / "tables" / "intervene.parquet")
    margins = damped[
        (damped["measure"] == "margin") & (damped["prefix"] == "given") & (damped["place"] == "all")
    ]
    by = margins.pivot(index="factor", columns="condition", values="value")
    assert by.loc[1.0, "intervened"] == pytest.approx(by.loc[1.0, "baseline"], abs=1e-4)  # neutral
    assert by.loc[0.0, "intervened"] < by.loc[1.0, "intervened"] - 1
    # A measure that judges answers has greedy rows, one of logits has none.
    by_prefix = damped.groupby("measure")["prefix"].unique()
    assert {*by_prefix["copied"]} == {*by_prefix["accuracy_given"]} == {"given", "true", "greedy"}
    assert {*by_prefix["margin"]} == {"given", "true"}
    assert (
        "norm of the head" in (made / "report.html").read_text()
    )  # the user's own columns are explained


def test_a_wrong_key_of_ones_own_class_has_its_place_in_the_file(folder):
    wrong = (folder / "question.yaml").read_text().replace("factor: {each", "facter: {each")
    (folder / "wrong.yaml").write_text(wrong)
    ran = mechmem(folder, "run", "wrong.yaml")
    assert ran.returncode == 2
    assert re.search(
        r"wrong.yaml:\d+:\d+: .*dampen has no key 'facter'; did you mean 'factor'", ran.stderr
    )


@pytest.fixture(scope="module")
def mine(folder):
    """The page's module, whose kinds are not left in the registries of other test files."""
    spec = importlib.util.spec_from_file_location("mine", folder / "mine.py")
    sys.modules["mine"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kind in (module.Dampen, module.Margin, module.Copied, module.HeadNorms):
        plugin(kind)
    yield module
    del sys.modules["mine"]


def test_the_pages_intervention_is_what_plain_hooks_give(mine, model, examples, others):
    """As the page advises: against TransformerLens's hooks, in the neutral setting, and in any
    other one."""
    session = Session({"after": model}, {"clean": others})
    mean = model.run_with_cache(others.tokens)[1]["blocks.1.attn.hook_z"].mean(dim=0)
    chosen = {"site": "z", "layer": 1, "head": 1, "position": ("=", "s4")}

    def damp(activation, hook):
        for pos in (9, 10):
            own, centre = activation[:, pos, 1], mean[pos, 1]
            activation[:, pos, 1] = centre + 0.3 * (own - centre)
        return activation

    found = session.logits(model, examples, [mine.Dampen(factor=0.3, **chosen)])
    close(found, logits_of(model, examples, ("blocks.1.attn.hook_z", damp)))
    neutral = session.logits(model, examples, [mine.Dampen(factor=1, **chosen)])
    close(neutral, logits_of(model, examples))
    assert (found - neutral).abs().max() > 1e-2
    small = Session({"after": model}, {"clean": others}, memory=300_000)
    assert small.budget.rows_at_once(model, examples) < len(examples)
    close(small.logits(model, examples, [mine.Dampen(factor=0.3, **chosen)]), found)


def test_the_pages_measure_judges_answers_and_the_other_one_does_not(mine, model, examples):
    logits = logits_of(model, examples)
    answer, d_vocab = logits.argmax(-1), logits.shape[-1]
    judged = mine.Copied().of_answer(answer, examples, d_vocab)
    assert judged.tolist() == mine.Copied()(logits, examples, logits).tolist()
    by_hand = [
        [float(token in prompt) for token in row]
        for row, prompt in zip(answer.tolist(), examples.prompt.tolist(), strict=True)
    ]
    assert judged.tolist() == by_hand
    assert mine.Margin().of_answer(answer, examples, d_vocab) is None
