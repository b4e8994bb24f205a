"""How much memory a patch grid over many examples takes: `python tests/benchmarks/memory.py`.

Prints the growth of resident memory (its peak minus what was resident before) of a grid over 30,000
examples of `fda_small`, against the default budget of a session. Takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import mechmem as mm
from mechmem.session.budget import MEMORY


def resident(field: str) -> int:
    """Bytes that are resident now (`VmRSS`) or were at most (`VmHWM`), on Linux.

    getrusage's ru_maxrss would count what the process was started from, too: all of pytest.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def growth(
    n_examples: int, positions: list[str], n_draws: int, memory: int, is_quick: bool
) -> dict[str, float]:
    """Run the grid once.

    Args:
        n_examples: examples that are patched.
        positions: names of the patched positions, a cell each.
        n_draws: draws of the control; 0 for none.
        memory: the budget in bytes.
        is_quick: feed the given prefix only, and do not decode.
    """
    trained = mm.load("fda_small")
    task = trained.task.model_copy(update={"n_train": n_examples})
    examples = task.sample("train").with_name("noisy")
    models = {"after": trained.at("memorised"), "before": trained.at("before")}
    session = mm.Session(models=models, example_sets={"noisy": examples}, memory=memory)
    fed = {"prefixes": ("given",), "greedy": False} if is_quick else {}
    control = {"control": {"kind": "random_direction", "n": n_draws}} if n_draws else {}
    grid = mm.PatchGrid(
        site="resid_pre",
        layer=1,
        position=mm.each(*positions),
        source=mm.Source(checkpoint="before"),
        n_control_greedy=1,
        **control,
        **fed,
    )
    models["after"](examples.tokens[:100])  # the first forward loads libraries
    before, started = resident("VmRSS"), time.process_time()
    grid.run(session, {})
    return {
        "growth_bytes": resident("VmHWM") - before,
        "budget_bytes": memory,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=30_000)
    parser.add_argument("--positions", nargs="+", default=["a3", "b0", "=", "s4", "s2", "s1"])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--memory", type=int, default=MEMORY, help="budget in bytes")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = growth(chosen.examples, chosen.positions, chosen.draws, chosen.memory, chosen.quick)
    sys.stdout.write(json.dumps(found) + "\n")
