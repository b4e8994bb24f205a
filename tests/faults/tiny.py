"""A tiny experiment with its training, run once, of which each case gets a copy."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from campaign import ended

SPEC = """\
name: tiny
question: Does it?
training: small
checkpoints: {before: initial, after: final}
examples: {noisy: {noisy: true, n: 4}}
analyses:
  - {kind: patch_grid, site: z, layer: {each: all}, source: {checkpoint: before}}
  - {kind: dynamics}
figures:
  - kind: bars
    table: patch_grid
    where: {place: all, prefix: given, measure: accuracy_true}
    x: layer
quantities:
  rest:
    table: patch_grid
    where: {layer: 0, place: all, prefix: given, measure: accuracy_true, condition: intervened}
claims: [{id: C1, says: it does, holds_when: [{quantity: rest, at_least: 0.1}]}]
answer: "{rest.percent}"
"""
RECIPE = """\
name: small
task:
  {kind: four_digit_addition, n_train: 40, n_held_out: 10,
   noise: {kind: uniform_wrong, rate: 0.2}}
architecture: {n_layers: 2, d_model: 8, n_heads: 2}
optimisation: {n_steps: 6, batch_size: 20, evaluate_every: 2, device: cpu}
"""
COMMANDS = {
    "run": ["run", "tiny.yaml"],
    "show the run": ["show", "tiny"],
    "draw": ["draw", "tiny"],
    "train": ["train", "small.yaml"],
    "show the training": ["show", "small"],
    "list": ["list"],
}
_lock = Lock()


def specs(folder: Path) -> None:
    """Write the experiment and the recipe of its training."""
    (folder / "tiny.yaml").write_text(SPEC)
    (folder / "small.yaml").write_text(RECIPE)


def copied(folder: Path) -> Path:
    """Fill an empty folder with what was run. Returns its folder of runs."""
    with _lock:  # cases are prepared in several threads
        whole = _whole()
    shutil.copytree(whole, folder, dirs_exist_ok=True, symlinks=True)
    return folder / "runs"


@cache
def _whole() -> Path:
    home = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    work = home / "work"
    work.mkdir()
    specs(work)
    code, _, stderr, _ = ended(COMMANDS["run"], work, 300)
    assert code == 0, stderr
    return work


@cache
def said(command: str) -> str:
    """What a command prints where nothing is damaged."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        copied(work)
        code, stdout, stderr, _ = ended(COMMANDS[command], work, 300)
    assert code == 0, stderr
    return stdout


def folders(runs: Path) -> tuple[Path, Path]:
    """The folder of the run, and that of its training."""
    return next(runs.glob("tiny-*")), next(runs.glob("trainings/small-*")) / "seed_0"


def results(runs: Path) -> dict[str, Any]:
    """All that must be the same after a fault: weights, curves, tables, figures and the answer;
    what is not there is left out."""
    found: dict[str, Any] = {}
    for pattern in ("*/tables/*.parquet", "*/figures/*.json", "trainings/*/*/checkpoints/step_*"):
        found |= {str(p.relative_to(runs)): p.read_bytes() for p in runs.glob(pattern)}
    for pattern, keys in (
        ("*/run.json", ("answer", "claims", "quantities")),
        ("trainings/*/*/training.json", ("curves", "phases")),
    ):
        for path in runs.glob(pattern):
            record = json.loads(path.read_text())
            # Whether a rule is on record depends on what the fault did to the record of rules.
            for claim in record.get("claims", ()):
                claim.pop("timing", None)
            name = str(path.relative_to(runs))
            found |= {f"{name} {key}": json.dumps(record.get(key)) for key in keys}
    return found


@cache
def right() -> dict[str, Any]:
    """The results without a fault."""
    with tempfile.TemporaryDirectory() as folder:
        return results(copied(Path(folder) / "work"))


def difference(runs: Path, word: str = "") -> str:
    """What differs from the results without a fault; empty if nothing does.

    Args:
        runs: the folder of runs.
        word: in the names of the results that are compared.
    """
    found = results(runs)
    wanted = {name: value for name, value in right().items() if word in name}
    names = [name for name, value in wanted.items() if found.get(name) != value]
    return f"another result: {', '.join(names[:3])}" if names else ""
