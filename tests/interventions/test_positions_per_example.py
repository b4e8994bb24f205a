"""Positions of each example, prompts of several lengths: every intervention gives what it gives to
each example alone, by plain hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plain_hooks import LLAMA, activations_of, close, logits_of, transformer
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.ablate import Ablate, donors, noise
from mechmem.interventions.erase import Erase
from mechmem.interventions.freeze_pattern import FreezePattern
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.interventions.steer import Steer
from mechmem.models.sites import SITES
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.files import digest

SITES_HERE = ["resid_pre", "z", "mlp_out", "pattern"]
N = 9


def made(seed: int, lengths: list[int]) -> Examples:
    """Random examples with prompts of these lengths; every third lacks the position `sometimes`."""
    generator = torch.Generator().manual_seed(seed)
    n, length = len(lengths), torch.tensor(lengths)
    tokens = torch.randint(10, (n, max(lengths)), generator=generator)
    given, true = torch.randint(10, (2, n, 3), generator=generator)
    rows = torch.arange(n)
    return Examples(
        prompt=torch.where(torch.arange(max(lengths)) < length[:, None], tokens, -1),
        given=given,
        true=true,
        is_noisy=torch.ones(n, dtype=torch.bool),
        variables={"v": (rows // 2) % 2},
        positions={
            "first": 0,
            "middle": (length - 1) // 2,
            "sometimes": torch.where(rows % 3 == 1, -1, (length - 1) * (rows % 2)),
        },
        places=("s2", "s1", "s0"),
        vocabulary=tuple("0123456789+="),
    )


SETS = {"one length": made(1, [7] * N), "mixed": made(2, [3, 7, 5, 5, 3, 9, 7, 3, 9])}
OTHERS = {"one length": made(3, [7] * N), "mixed": made(4, [5, 9, 3, 7, 3, 5, 5, 9, 7])}
NAMES = ("middle", "sometimes")


@pytest.fixture(params=["ours", "llama"])
def models(request, model, other_model):
    """Our architecture, which `fast` runs, and one that only `hooked` does."""
    if request.param == "ours":
        return model, other_model
    return transformer(1, n_heads=2, d_head=8, **LLAMA), transformer(
        2, n_heads=2, d_head=8, **LLAMA
    )


@pytest.fixture(params=SETS)
def lengths(request) -> str:
    return request.param


@pytest.fixture
def session(models, lengths) -> Session:
    sets = {"noisy": SETS[lengths], "clean": OTHERS[lengths]}
    return Session(dict(zip(("after", "before"), models, strict=True)), sets)


@pytest.fixture
def examples(lengths) -> Examples:
    return SETS[lengths]


def part_of(hook: str, activation: Tensor, pos: int) -> Tensor:
    """The activation of one example at one position."""
    return activation[0, :, pos] if "pattern" in hook else activation[0, pos]


def alone(examples: Examples, row: int) -> Examples:
    return examples.select([row])


def values(model, examples: Examples, hook: str, name: str) -> list[Tensor | None]:
    """By example, the activation at a named position, from a run of this example alone."""
    found: list[Tensor | None] = []
    for row in range(len(examples)):
        pos = int(examples.indices(name)[row, 0])
        cache = activations_of(model, alone(examples, row)) if pos >= 0 else {}
        found.append(part_of(hook, cache[hook], pos) if pos >= 0 else None)
    return found


def one_by_one(
    model, examples: Examples, hook: str, new: Callable[[int, str], Tensor | float]
) -> Tensor:
    """The answer's logits if each example is run alone, with plain hooks.

    Args:
        model: what is run.
        examples: their rows.
        hook: what is set at the positions NAMES, where the example has them.
        new: (row, name of the position) -> what it is set to.
    """
    found = []
    for row in range(len(examples)):
        hooks = []
        for name in NAMES:
            pos = int(examples.indices(name)[row, 0])
            if pos >= 0:
                where = (0, slice(None), pos) if "pattern" in hook else (0, pos)
                hooks.append((hook, _set(where, new(row, name))))
        found.append(logits_of(model, alone(examples, row), *hooks))
    return torch.cat(found)


def _set(where, value):
    def set_(activation, hook):
        changed = activation.clone()
        changed[where] = value
        return changed

    return set_


def place(site: str) -> dict:
    return {"site": site, "layer": 0, "position": NAMES}


def check(session, examples, part: Intervention, expected: Tensor) -> None:
    """On both backends, whole and in chunks, and decoded."""
    model, sets = session.model("after"), session.example_sets
    close(session.logits(model, examples, [part]), expected)
    close(session.logits(model, examples, [part]), expected)
    hooked = Session(session.models, sets, backend="hooked")
    close(hooked.logits(model, examples, [part]), expected)
    small = Session(session.models, sets, memory=200_000)
    assert small.budget.rows_at_once(model, examples) < N
    close(small.logits(model, examples, [part]), expected)
    rows = torch.tensor([5, 1, 3])
    close(session.logits(model, examples.select(rows), [part]), expected[rows])
    assert not torch.allclose(expected, session.baseline(model, examples), atol=1e-4)


@pytest.mark.parametrize("site", SITES_HERE[:3])
def test_patch_from_another_checkpoint(site, session, models, examples):
    hook = SITES[site].hook(0)
    theirs = {name: values(models[1], examples, hook, name) for name in NAMES}
    expected = one_by_one(models[0], examples, hook, lambda row, name: theirs[name][row])
    check(session, examples, Patch(source=Source(checkpoint="before"), **place(site)), expected)


@pytest.mark.parametrize("site", SITES_HERE[:3])
def test_patch_from_other_examples_at_their_own_positions(site, session, models, examples, lengths):
    hook = SITES[site].hook(0)
    theirs = {name: values(models[0], OTHERS[lengths], hook, name) for name in NAMES}
    expected = one_by_one(models[0], examples, hook, lambda row, name: theirs[name][row])
    check(session, examples, Patch(source=Source(examples="clean"), **place(site)), expected)


@pytest.mark.parametrize("site", SITES_HERE[:3])
def test_the_mean_is_over_the_examples_that_have_the_position(
    site, session, models, examples, lengths
):
    hook = SITES[site].hook(0)
    means = {}
    for name in NAMES:
        found = [v for v in values(models[0], OTHERS[lengths], hook, name) if v is not None]
        assert len(found) == (6 if name == "sometimes" else 9)
        means[name] = torch.stack(found).mean(dim=0)
    expected = one_by_one(models[0], examples, hook, lambda row, name: means[name])
    check(session, examples, Patch(source=Source(mean_over="clean"), **place(site)), expected)
    check(session, examples, Ablate(method="mean", reference_set="clean", **place(site)), expected)


def test_ablation_by_zero(session, models, examples):
    for site in SITES_HERE:
        hook = SITES[site].hook(0)
        expected = one_by_one(models[0], examples, hook, lambda row, name: 0.0)
        check(session, examples, Ablate(method="zero", **place(site)), expected)


def test_ablation_by_noise(session, models, examples, lengths):
    hook, site = SITES["resid_pre"].hook(0), "resid_pre"
    width = int(examples.n_positions.max())
    drawn = noise(N, (width, 16), int(digest([0, hook]), 16))

    def noisy(row: int, name: str) -> Tensor:
        found = values(models[0], OTHERS[lengths], hook, name)
        there = torch.stack([value for value in found if value is not None])
        own = drawn[row, int(examples.indices(name)[row, 0])]
        return there.mean(0) + there.std(0, correction=0) * own

    expected = one_by_one(models[0], examples, hook, noisy)
    part = Ablate(method="gaussian", reference_set="clean", **place(site))
    check(session, examples, part, expected)


def test_ablation_by_another_example(session, models, examples, lengths):
    """The other example's activation at its own position of the name."""
    hook, other = SITES["resid_pre"].hook(0), OTHERS[lengths]
    lent = donors(examples, other, 0).tolist()
    theirs = values(models[0], other, hook, "middle")
    part = Ablate(
        method="resample", reference_set="clean", site="resid_pre", layer=0, position="middle"
    )
    found = []
    for row in range(N):
        pos = int(examples.indices("middle")[row, 0])
        found.append(
            logits_of(models[0], alone(examples, row), (hook, _set((0, pos), theirs[lent[row]])))
        )
    check(session, examples, part, torch.cat(found))


def test_a_donor_that_lacks_the_position_is_refused(session, models, examples):
    """Else a value that is no number would take the place of the activation."""
    n_refused, has_it = 0, torch.arange(N) % 3 != 1
    for seed in range(8):
        part = Ablate(method="resample", reference_set="clean", seed=seed, **place("resid_pre"))
        lent = donors(examples, session.examples("clean"), seed)
        if not (lent[has_it] % 3 == 1).any():
            assert session.logits(models[0], examples, [part]).isfinite().all()
            continue
        n_refused += 1
        with pytest.raises(InputError, match="the other example lacks a position that an edited"):
            session.logits(models[0], examples, [part])
    assert 0 < n_refused < 8


@pytest.mark.parametrize("site", SITES_HERE[:3])
def test_steering(site, session, models, examples, lengths):
    hook, other = SITES[site].hook(0), OTHERS[lengths]
    value_of = other.variables["v"].tolist()
    steps = {}
    for name in NAMES:
        found = values(models[0], other, hook, name)
        ends = []
        for value in (1, 0):
            of = [v for v, it in zip(found, value_of, strict=True) if it == value and v is not None]
            ends.append(torch.stack(of).mean(dim=0))
        steps[name] = 2 * (ends[0] - ends[1])
    own = {name: values(models[0], examples, hook, name) for name in NAMES}
    # At one position of a site of one layer the steering of another does not matter.
    expected = one_by_one(models[0], examples, hook, lambda row, name: own[name][row] + steps[name])
    part = Steer(variable="v", towards=1, away=0, factor=2.0, **place(site))
    check(session, examples, part, expected)


def test_steering_where_no_example_of_a_value_has_the_position_is_refused(
    session, models, examples
):
    session.example_sets["clean"] = session.examples("clean").select([1, 4, 2, 6]).as_set()
    part = Steer(variable="v", towards=0, away=1, site="resid_pre", layer=0, position="sometimes")
    with pytest.raises(InputError, match="the mean lacks a position that an edited"):
        session.logits(models[0], examples, [part])


def test_a_source_that_lacks_the_position_is_refused(session, models, examples):
    without = session.examples("clean").select([1, 4, 7, 1, 4, 7, 1, 4, 7]).as_set()
    part = Patch(source=without, **place("resid_pre"))
    with pytest.raises(InputError, match="the source lacks a position that an edited"):
        session.logits(models[0], examples, [part])


def test_a_mean_over_examples_that_all_lack_the_position_is_refused(session, models, examples):
    session.example_sets["clean"] = session.examples("clean").select([1, 4, 7]).as_set()
    for part in (
        Patch(source=Source(mean_over="clean"), **place("resid_pre")),
        Ablate(method="mean", reference_set="clean", **place("resid_pre")),
        Ablate(method="gaussian", reference_set="clean", **place("resid_pre")),
    ):
        with pytest.raises(InputError, match="lacks a position that an edited example"):
            session.logits(models[0], examples, [part])


PARTS = {
    "patch": Patch(source=Source(checkpoint="before"), **place("z")),
    "mean": Ablate(reference_set="clean", **place("mlp_out")),
    "steer": Steer(variable="v", towards=1, away=0, **place("resid_pre")),
    "readout": Ablate(method="zero", site="attn_out", layer=0, position="readout"),
    "first": Ablate(method="zero", site="attn_out", layer=0, position="first"),
    "erase": Erase(variable="v", site="resid_pre", layer=0, position=NAMES, seed=1),
    "displaced": RandomDisplacement(of=Patch(source=Source(checkpoint="before"), **place("z"))),
    "everywhere": Ablate(method="zero", site="z", layer=0, head=1),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_mixed_lengths_give_what_each_length_alone_gives(part, models):
    mixed, model = SETS["mixed"], models[0]
    fit = made(7, [3, 5, 7, 9] * 10)  # enough to fit an eraser on
    session = Session(
        dict(zip(("after", "before"), models, strict=True)), {"clean": fit, "noisy": mixed}
    )
    assert len(mixed.buckets()) == 4
    whole, answer = session.logits(model, mixed, [part]), session.greedy(model, mixed, [part])
    for rows, bucket in mixed.buckets():
        close(session.logits(model, bucket, [part]), whole[rows])
        assert torch.equal(session.greedy(model, bucket, [part]), answer[rows])
        if not isinstance(part, RandomDisplacement):  # its draw is of the width of the set
            close(session.logits(model, bucket.as_set(), [part]), whole[rows])
    assert not torch.allclose(whole, session.baseline(model, mixed), atol=1e-4)


def test_what_needs_whole_activations_of_several_lengths_is_refused(models):
    mixed = SETS["mixed"]
    session = Session({"after": models[0], "before": models[1]}, {"noisy": mixed})
    for part in (
        Patch(site="z", layer=0, source=Source(checkpoint="before")),
        Ablate(site="z", layer=0),
        FreezePattern(layer=0),
    ):
        with pytest.raises(InputError, match="prompts of several lengths"):
            session.logits(models[0], mixed, [part])


def test_an_example_that_lacks_every_position_is_left_as_it_is(session, models, examples):
    lacking = torch.arange(N) % 3 == 1
    for site in SITES_HERE:
        part = Ablate(method="zero", site=site, layer=0, position="sometimes")
        found = session.logits(models[0], examples, [part])
        plain = session.baseline(models[0], examples)
        close(found[lacking], plain[lacking])
        changed = (found[~lacking] - plain[~lacking]).abs().amax(dim=(1, 2))
        assert (changed > 1e-4).all()


def test_baseline_and_activations_of_each_example_are_its_own(session, models, examples):
    expected = torch.cat([logits_of(models[0], alone(examples, row)) for row in range(N)])
    close(session.baseline(models[0], examples), expected)
    part = Ablate(site="z", layer=0, position=NAMES)
    at = part.at("blocks.0.attn.hook_z", models[0], examples)
    found = session.activation(models[0], examples, at)
    for i, name in enumerate(NAMES):
        for row, value in enumerate(values(models[0], examples, at.hook, name)):
            if value is None:
                assert found[row, i].isnan().all()
            else:
                close(found[row, i], value)
