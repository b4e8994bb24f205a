"""How often the intervals of docs/methods/statistics.md cover, and how often a true effect exactly
at the threshold is called supported: `python tests/statistics/coverage_table.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from mechmem.statistics.means import N_POOLED, t_quantile
from mechmem.statistics.proportions import clopper_pearson

N_DRAWS = 20_000
SPREADS = (0.0, 0.03, 0.1)
SIZES = (50, 100, 200, 400)
SEEDS = (3, 5, 10)


@dataclass(frozen=True)
class Case:
    """A proportion in models that differ by their seeds."""

    p: float
    """Mean over seeds before clipping to 0..1."""
    n: int
    """Examples of a seed."""
    spread: float
    """Standard deviation between seeds before clipping."""
    n_seeds: int

    @property
    def estimand(self) -> float:
        """The mean over seeds: of a normal variable that is clipped to 0..1."""
        if self.spread == 0:
            return self.p
        a, b = -self.p / self.spread, (1 - self.p) / self.spread
        inside = norm.cdf(b) - norm.cdf(a)
        below = self.spread * (norm.pdf(a) - norm.pdf(b)) + self.p * inside
        return float(below + norm.sf(b))

    def shares(self, draws: int, generator: np.random.Generator) -> np.ndarray:
        """The share of right answers, `draw seed`."""
        truth = np.clip(generator.normal(self.p, self.spread, (draws, self.n_seeds)), 0, 1)
        return generator.binomial(self.n, truth) / self.n


def cases(n_seeds: int) -> Iterator[Case]:
    """Those of the design: p from 0.5 to 1 - 1/n."""
    for n in SIZES:
        for p in sorted({0.5, 0.7, 0.9, 0.95, 1 - 1 / n}):
            for spread in SPREADS:
                yield Case(p, n, spread, n_seeds)


def ends(
    case: Case, draws: int, generator: np.random.Generator, has_floor: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The interval (b) of each draw.

    Args:
        case: the models.
        draws: number of simulated studies.
        generator: of random numbers.
        has_floor: whether the study has five interior quantities of the same measure.
    """
    shares = case.shares(draws, generator)
    floor = np.zeros(draws)
    if has_floor:
        inside = Case(0.5, case.n, case.spread, case.n_seeds)
        others = [inside.shares(draws, generator).var(axis=1, ddof=1) for _ in range(N_POOLED)]
        floor = np.sqrt(np.mean(others, axis=0))
    return ends_of(shares, case.n, floor)


def ends_of(shares: np.ndarray, n: int, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval (b) of each study, vectorised; a test compares it with `Samples.estimate`.

    Args:
        shares: `draw seed`.
        n: examples of a seed.
        floor: pooled standard deviation between seeds of each study, 0 without one.
    """
    n_seeds = shares.shape[1]
    mean, spread = shares.mean(axis=1), shares.std(axis=1, ddof=1)
    width = t_quantile(n_seeds - 1, 0.975) * np.maximum(spread, floor) / np.sqrt(n_seeds)
    low, high = clopper_pearson(np.round(shares.sum(axis=1) * n), n * n_seeds)
    low, high = np.minimum(low, mean - width), np.maximum(high, mean + width)
    squeezed = (floor == 0) & ((mean + 2 * spread >= 1) | (mean - 2 * spread <= 0))
    of_seeds = clopper_pearson(np.round(shares * n), n)
    low = np.where(squeezed, np.minimum(low, of_seeds[0].min(axis=1)), low)
    high = np.where(squeezed, np.maximum(high, of_seeds[1].max(axis=1)), high)
    return np.clip(low, 0, 1), np.clip(high, 0, 1)


@dataclass(frozen=True)
class Found:
    """The least favourable of several cases."""

    coverage: float
    too_high: float
    """Share of studies that call a true effect exactly at the threshold supported (at_least)."""
    too_low: float
    """The same for `at_most`."""
    width: float
    """Mean width relative to Student's t without floors, in the interior."""
    worst: Case


def worst_of(n_seeds: int, has_floor: bool, draws: int = N_DRAWS, seed: int = 0) -> Found:
    """The lowest coverage and the highest one-sided errors over all cases."""
    generator = np.random.default_rng(seed)
    coverage, too_high, too_low, widths = [], [], [], []
    every = list(cases(n_seeds))
    for case in every:
        low, high = ends(case, draws, generator, has_floor)
        truth = case.estimand
        coverage.append(float(((low <= truth) & (truth <= high)).mean()))
        too_high.append(float((low > truth).mean()))
        too_low.append(float((high < truth).mean()))
        if case.p == 0.5:
            shares = case.shares(draws, generator)
            plain = 2 * t_quantile(n_seeds - 1, 0.975) * shares.std(axis=1, ddof=1).mean()
            widths.append(float((high - low).mean() / (plain / np.sqrt(n_seeds))))
    at = int(np.argmin(coverage))
    return Found(coverage[at], max(too_high), max(too_low), float(np.mean(widths)), every[at])


def table(draws: int = N_DRAWS) -> str:
    """The table of the page, in Markdown."""
    lines = [
        "| seeds | spread between seeds | lowest coverage | at p, n, spread | called above | "
        "called below | width |",
        "|---|---|---|---|---|---|---|",
    ]
    for has_floor in (True, False):
        for n_seeds in SEEDS:
            found = worst_of(n_seeds, has_floor, draws)
            case = found.worst
            name = "pooled over five quantities" if has_floor else "of the quantity alone"
            lines.append(
                f"| {n_seeds} | {name} | {found.coverage:.3f} | {case.p:.4g}, {case.n}, "
                f"{case.spread:g} | {found.too_high:.2%} | {found.too_low:.2%} | "
                f"{found.width:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
