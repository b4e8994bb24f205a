"""docs/extending.md, followed to the letter in a folder of its own by a user who does not touch the
package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

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
    assert len(norms) == 3 * 4 * 2
    assert (norms["value"] > 0).all()
    damped = pd.read_parquet(made / "tables" / "intervene.parquet")
    margins = damped[
        (damped["measure"] == "margin") & (damped["prefix"] == "given") & (damped["place"] == "all")
    ]
    by = margins.pivot(index="factor", columns="condition", values="value")
    assert by.loc[1.0, "intervened"] == pytest.approx(by.loc[1.0, "baseline"], abs=1e-4)  # neutral
    assert by.loc[0.0, "intervened"] < by.loc[1.0, "intervened"] - 1
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
