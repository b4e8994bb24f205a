"""How much faster than TransformerLens, as ratios in one run; nothing is asserted, as machines
differ.

Skipped unless asked for: `OMP_NUM_THREADS=1 pytest tests/benchmarks -o addopts= -s` (which also
leaves the shape checks of the other tests out, as they cost time).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformer_lens import patching

from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.interventions.patch import Source
from mechmem.models.architecture import Architecture
from mechmem.models.fast import plain_logits
from mechmem.session import Session
from mechmem.spec.sweep import each

ARCHITECTURE = Architecture(n_layers=3, d_model=128, n_heads=4, d_mlp=512)
N_ANSWER = 5


@pytest.fixture(scope="module")
def large_task() -> FourDigitAddition:
    return FourDigitAddition(n_train=1000, n_held_out=200)


@pytest.fixture(scope="module")
def large_model(large_task):
    return ARCHITECTURE.build(len(large_task.vocabulary), large_task.n_context)


def report(
    benchmark, name: str, fast: Callable[[], object], slow: Callable[[], object], rounds: int
) -> None:
    """Times both in turns, in CPU time; prints the ratio of the medians."""
    fast(), slow()
    seconds = {function: [] for function in (fast, slow)}
    for _ in range(rounds):
        for function, found in seconds.items():
            start = time.process_time()
            function()
            found.append(time.process_time() - start)
    ratio = statistics.median(seconds[slow]) / statistics.median(seconds[fast])
    benchmark.extra_info["times_faster"] = round(ratio, 2)
    benchmark.pedantic(fast, rounds=3)
    print(f"\n{name}: {ratio:.1f} times as fast as TransformerLens")  # noqa: T201


def step(model, batch, optimizer, logits_of) -> None:
    loss = F.cross_entropy(
        logits_of(model, batch[:, :-1]).flatten(0, 1), batch[:, -N_ANSWER:].flatten()
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def test_training_step(benchmark, large_task, large_model):
    """A batch of 500 of the reference FDA model: forward, backward, clip and AdamW."""
    train = large_task.training_set()
    batch = torch.cat([train.prompt, train.given], dim=1)[:500]
    optimizer = torch.optim.AdamW(large_model.parameters(), 1e-3)

    def fast() -> None:
        step(large_model, batch, optimizer, lambda m, tokens: plain_logits(m, tokens, N_ANSWER))

    def slow() -> None:
        step(large_model, batch, optimizer, lambda m, tokens: m(tokens)[:, -N_ANSWER:])

    report(benchmark, "training step", fast, slow, rounds=7)


@pytest.mark.parametrize("site", ["resid_pre", "attn_out"])
def test_patch_grid(site, benchmark, large_task, large_model, monkeypatch):
    """100 examples patched at every layer and position. Ours also gives every place and an interval
    for each cell."""
    monkeypatch.setattr(patching, "tqdm", list)
    examples = large_task.sample("held_out")
    corrupted, clean = (examples.select(torch.arange(100) + 100 * i).as_set() for i in (0, 1))
    grid = PatchGrid(
        site=site, layer=each(), position=each(), source=Source(examples="clean"), greedy=False
    )
    sweep_domain = {"layer": range(3), "position": tuple(corrupted.positions)}
    oracle = {
        "resid_pre": patching.get_act_patch_resid_pre,
        "attn_out": patching.get_act_patch_attn_out,
    }[site]

    def ours() -> None:
        grid.run(
            Session({"after": large_model}, {"noisy": corrupted, "clean": clean}), sweep_domain
        )

    @torch.no_grad()
    def theirs() -> None:
        _, cache = large_model.run_with_cache(clean.tokens)
        right = lambda logits: (logits[:, -N_ANSWER:].argmax(-1) == corrupted.true).float().mean()  # noqa: E731
        oracle(large_model, corrupted.tokens, cache, right)

    report(benchmark, f"patch grid at {site}", ours, theirs, rounds=3)
