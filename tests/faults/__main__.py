"""`python tests/faults`: run the campaign, print what went wrong and the table of outcomes.

`--seed N` draws other cases, `--sample N` runs some of them, `--only WORD` those with a word in
their name or area; `-v` prints every message; `--write` writes the table to docs/reliability.md.
The exit code is 1 if any outcome is bad.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from campaign import all_cases, outcomes, sample, table

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
OUTCOMES = re.compile(r"(?<=<!-- outcomes -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)


def say(*lines: str) -> None:
    """Print lines at once."""
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the cases that the arguments choose."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=None)
    parser.add_argument("--only", default="")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    cases = [c for c in all_cases(asked.seed) if asked.only in f"{c.area} {c.name}"]
    if asked.sample is not None:
        cases = sample(cases, asked.sample, asked.seed)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case, outcome in outcomes(cases, Path(folder), asked.processes):
            found.append((case, outcome))
            if asked.verbose or not outcome.is_good:
                said = outcome.stderr.strip().splitlines()[:3]
                say(f"{outcome.kind:<9} {outcome.seconds:5.1f} s  {case.name}: {outcome.note}")
                say(*(f"    {line[:300]}" for line in said))
    say(table(found))
    if asked.write:
        bad = [f"- {case.name}: {o.kind}. {o.note}".rstrip() for case, o in found if not o.is_good]
        text = "\n".join([f"{len(found):,} cases, seed {asked.seed}.", "", table(found), "", *bad])
        PAGE.write_text(OUTCOMES.sub(lambda _: text.rstrip() + "\n", PAGE.read_text()))
    return int(not all(outcome.is_good for _, outcome in found))


if __name__ == "__main__":
    sys.exit(main())
