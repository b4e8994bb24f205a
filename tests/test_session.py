"""The session: what it keeps and forgets, how it keeps to its budget, what it refuses. What users'
hooks do is tested by interventions/test_user_hooks.py."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_hooks import LLAMA, activations_of, close, logits_of, transformer
from plugin import plugin
from torch import Tensor

from mechmem.analyses.neurons.neuron_shift import NeuronShift
from mechmem.data.examples import Examples
from mechmem.interventions.ablate import Ablate
from mechmem.interventions.erase import Erase
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.steer import Steer
from mechmem.interventions.swap_weights import SwapWeights
from mechmem.models.backend import FAST, HOOKED
from mechmem.models.edits import At, Edit
from mechmem.session import Session, budget
from mechmem.session.budget import Budget
from mechmem.spec.errors import InputError
from mechmem.spec.references import References

RESID, NEURONS = "blocks.1.hook_resid_pre", "blocks.0.mlp.hook_post"
KINDS = {"fast": {}, "hooked": {"n_heads": 2, "d_head": 8, **LLAMA}}
"""Configs that the backends of these names run."""


@pytest.fixture(params=KINDS)
def any_model(request) -> Any:
    """A model of this test's own, as it is changed."""
    return transformer(0, **KINDS[request.param])


@pytest.fixture
def forwards(monkeypatch) -> list[tuple[int, int]]:
    """(examples, layer at which it began) of each forward."""
    done: list[tuple[int, int]] = []

    def recorded(kind: type) -> Any:
        plain = kind.run

        def run(self, model, tokens, rows, readout, *, resume=None, **options):
            done.append((len(tokens), 0 if resume is None else resume[0]))
            return plain(self, model, tokens, rows, readout, resume=resume, **options)

        return run

    for backend in (FAST, HOOKED):
        monkeypatch.setattr(type(backend), "run", recorded(type(backend)))
    return done


@plugin
class Changed(Intervention):
    """Does something by hand: for tests of how a session runs it."""

    by_example = True
    hook: str = RESID
    how: str = "roll"

    def edits(self, session, model, examples) -> list[Edit]:
        functions = {
            "roll": lambda own, _: own.roll(1, dims=-1),
            "zero": lambda own, _: torch.zeros_like(own),
        }
        return [Edit(At(self.hook), functions[self.how])]


# Names


def test_unknown_names_are_refused_with_the_nearest(session):
    with pytest.raises(InputError, match="no checkpoint 'befor'; did you mean 'before'"):
        session.model("befor")
    with pytest.raises(InputError, match="no example set 'noise'; did you mean 'noisy'"):
        session.examples("noise")


def test_models_and_examples_themselves_are_taken_as_they_are(session, other_model, others):
    with session.declaring(References()):
        assert session.model(other_model) is other_model
        assert session.examples(others) is others


def test_what_is_not_declared_is_refused_while_something_is_declared(session, model, examples):
    with session.declaring(References(frozenset(["after"]), frozenset(["noisy"]))):
        assert session.model("after") is model
        assert session.examples("noisy") is examples
        with pytest.raises(InputError, match="checkpoint 'before' is used without being declared"):
            session.model("before")
        with pytest.raises(
            InputError, match=r"set 'clean' is used without being .* ExampleSetName"
        ):
            session.examples("clean")
        with pytest.raises(InputError, match="there is no checkpoint 'then'"):
            session.model("then")
    session.model("before")


def test_declarations_nest_and_end_with_an_error(session):
    inner, outer = (References(frozenset([name])) for name in ("before", "after"))

    def asked() -> set[str]:
        found = set()
        for name in ("before", "after"):
            with suppress(InputError):
                session.model(name)
                found.add(name)
        return found

    with session.declaring(outer):
        with suppress(RuntimeError), session.declaring(inner):
            assert asked() == {"before"}
            raise RuntimeError
        assert asked() == {"after"}
    assert asked() == {"before", "after"}


def test_referred_are_the_models_and_sets_that_components_name(session, model, other_model):
    shift = NeuronShift(before="before", after="after", examples="noisy", matched="clean")
    assert set(session.referred(shift)) == {model, other_model, *session.example_sets.values()}
    patch = Patch(site="z", layer=0, source=Source(checkpoint="before"))
    assert session.referred(patch) == (other_model,)
    assert session.referred(patch, patch) == (other_model, other_model)
    assert session.referred() == ()


def test_a_result_is_told_apart_from_that_of_what_had_the_name_before(session, other_model):
    shift = NeuronShift(before="before", after="after", examples="noisy", matched="clean")
    first = shift.kept(session)
    assert shift.kept(session) is first
    session.models["after"] = other_model
    # The same model before and after, and no longer the first one.
    assert (shift.kept(session)["shift_noisy"] == 0).all()


# Activations


def test_activations_are_those_of_the_model(session, any_model, examples):
    hooks = [NEURONS, "blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"]
    expected = activations_of(any_model, examples)
    for hook, found in session.activations(any_model, examples, hooks).items():
        close(found, expected[hook])
        close(session.activation(any_model, examples, hook), expected[hook])


def test_an_activation_at_a_place_is_that_part_of_the_whole(session, any_model, examples):
    rows = torch.arange(len(examples))
    for hook in (NEURONS, "blocks.0.attn.hook_pattern"):
        whole = activations_of(any_model, examples)[hook]
        pos = torch.stack([rows % 14, rows * 5 % 14], dim=1)
        for at in (At(hook, torch.tensor([[9, 3]])), At(hook, pos, (1, 0)), At(hook, None, (1,))):
            close(session.activation(any_model, examples, at), at.take(whole, rows))


def test_an_activation_is_nan_where_an_example_lacks_the_position(session, any_model, examples):
    pos = (torch.arange(12) % 4 - 1)[:, None]
    found = session.activation(any_model, examples, At(RESID, pos))
    assert found.isnan().all(dim=2)[:, 0].tolist() == (pos[:, 0] < 0).tolist()


def test_an_activation_is_computed_once_and_only_what_is_missing(
    session, any_model, examples, forwards
):
    first = session.activation(any_model, examples, NEURONS)
    assert session.activation(any_model, examples, NEURONS) is first
    both = session.activations(any_model, examples, [NEURONS, RESID])
    assert both[NEURONS] is first
    session.activation(any_model, examples, At(RESID, torch.tensor([[3]])))
    assert forwards == [(12, 0), (12, 0)]
    assert session.n_forwarded == 2 * len(examples)


def test_models_examples_and_prefixes_are_kept_apart(session, model, other_model, examples, others):
    variants = [
        (model, examples),
        (other_model, examples),
        (model, others),
        (model, examples.with_prefix("true")),
        (model, examples.select(torch.arange(6))),
    ]
    for _ in range(2):
        for which, chosen in variants:
            found = session.activation(which, chosen, "blocks.1.hook_resid_post")
            close(found, activations_of(which, chosen)["blocks.1.hook_resid_post"])
            close(session.baseline(which, chosen), logits_of(which, chosen))


def test_a_kept_activation_that_someone_changed_in_place_is_not_handed_out_again(
    session, any_model, examples
):
    expected = activations_of(any_model, examples)
    session.activation(any_model, examples, RESID).mul_(2)
    close(session.activation(any_model, examples, RESID), expected[RESID])
    session.activations(any_model, examples, [NEURONS])[NEURONS][3] = 0
    close(session.activation(any_model, examples, NEURONS), expected[NEURONS])


def test_a_forward_does_not_start_at_a_residual_that_someone_changed(session, any_model, examples):
    session.activation(any_model, examples, RESID).zero_()
    part = Changed(hook="blocks.1.hook_mlp_out")
    expected = logits_of(any_model, examples, (part.hook, lambda a, hook: a.roll(1, dims=-1)))
    close(session.logits(any_model, examples, [part]), expected)


def test_a_change_of_what_a_part_was_taken_of_changes_nothing_kept(session, model, examples):
    at = At(RESID, torch.tensor([[3]]))
    session.activation(model, examples, at).zero_()
    close(session.activation(model, examples, at), activations_of(model, examples)[RESID][:, 3:4])


def test_a_model_lives_as_long_as_its_activations_are_kept(random_models, examples):
    """Activations are kept by the model's identity, which a new model could take over from a
    forgotten one."""
    model, session = random_models(0, n_layers=1), Session()
    session.activation(model, examples, "hook_embed")
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is not None
    del session
    gc.collect()
    assert seen() is None


def test_activations_of_an_edited_run_are_those_after_the_edits(session, any_model, examples):
    edit = Edit(At("blocks.0.hook_mlp_out"), lambda own, _: own.roll(1, dims=-1))
    hooks = ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]
    found = session.edited_activations(any_model, examples, [edit], hooks)
    plain = ("blocks.0.hook_mlp_out", lambda activation, hook: activation.roll(1, dims=-1))
    expected = activations_of(any_model, examples, plain)
    for hook in hooks:
        close(found[hook], expected[hook])
        # They are kept by nobody: the unedited ones are others.
        close(
            session.activation(any_model, examples, hook), activations_of(any_model, examples)[hook]
        )


# What has changed since


def weights(model: Any) -> dict[str, Any]:
    """Ways to change a model's weights, by name."""
    w, z = model.blocks[0].mlp.W_in, model.blocks[0].attn.W_O

    def replaced() -> None:
        model.blocks[0].mlp.W_in = torch.nn.Parameter(w.detach() * 2, requires_grad=False)

    return {
        "in place": lambda: w.mul_(2),
        "one weight": lambda: w[0, 0].add_(1.0),
        "through .data": lambda: w.data.mul_(2),
        "a part through .data": lambda: z.data[0].zero_(),
        "heads swapped through .data": lambda: z.data.copy_(z.data[[1, 0, *range(2, len(z))]]),
        "neurons swapped through .data": lambda: w.data.copy_(w.data[:, torch.arange(24).flip(0)]),
        "data replaced": lambda: setattr(w, "data", w.data * 2),
        "parameter replaced": replaced,
        "state loaded": lambda: model.load_state_dict(
            {name: 1.5 * p for name, p in model.state_dict().items() if p.is_floating_point()},
            strict=False,
        ),
    }


WAYS = [*weights(transformer())]


@pytest.mark.parametrize("way", WAYS)
def test_everything_is_computed_anew_after_weights_have_changed(way, any_model, examples):
    session = Session({"after": any_model}, {"noisy": examples})
    part = Ablate(site="attn_out", layer=1, reference_set="noisy")
    made: list[int] = []

    def of_ones_own() -> int:
        return session.cached(("mine", any_model), lambda: made.append(0) or len(made))

    def results(of: Session) -> list[Tensor]:
        return [
            of.baseline(any_model, examples),
            of.activation(any_model, examples, RESID),
            of.logits(any_model, examples, [part]),
            of.greedy(any_model, examples),
        ]

    before = [result.clone() for result in results(session)]
    assert [of_ones_own(), of_ones_own()] == [1, 1]
    weights(any_model)[way]()
    fresh = results(Session({"after": any_model}, {"noisy": examples}))
    for found, expected in zip(results(session), fresh, strict=True):
        close(found, expected)
    for old, new in zip(before[:3], fresh[:3], strict=True):
        assert not torch.allclose(old, new, atol=1e-3)
    assert of_ones_own() == 2


def test_results_are_computed_anew_after_the_config_has_changed(examples):
    """As when somebody tries a soft cap on a model that has none."""
    model = transformer()
    session = Session({"after": model})
    first = session.baseline(model, examples)
    model.cfg.output_logits_soft_cap = 1.0
    second = session.baseline(model, examples)
    close(second, logits_of(model, examples))
    assert not torch.allclose(first, second, atol=1e-2)


def example_changes(examples: Examples) -> dict[str, Any]:
    return {
        "prompt": lambda: examples.prompt.__setitem__((0, 1), (examples.prompt[0, 1] + 1) % 10),
        "given": lambda: examples.given.__setitem__((2, 0), (examples.given[2, 0] + 1) % 10),
        "true": lambda: examples.true.add_(1).remainder_(10),
        "variables": lambda: examples.variables["carry_1"].mul_(-1).add_(1),
        "index": lambda: examples.index.add_(1),
        "whole prompt": lambda: examples.prompt.copy_(examples.prompt.flip(0)),
        "is_noisy": lambda: examples.is_noisy.logical_not_(),
        "another variable": lambda: examples.variables.update(carry_1=torch.arange(12)),
        "position": lambda: examples.positions["own"].add_(1),
        "pair": lambda: examples.counterfactual.true.add_(1).remainder_(10),
        "index of the pair": lambda: examples.counterfactual.index.add_(1),
    }


def changeable(task) -> Examples:
    """Examples with a pair and a position per example."""
    examples, pair = (task.sample("train").select(slice(i, i + 12)).as_set() for i in (0, 20))
    positions = {**examples.positions, "own": torch.arange(12) % 3}
    return replace(examples, positions=positions, counterfactual=pair)


FIELDS = [
    *("prompt", "given", "true", "variables", "index", "whole prompt", "is_noisy"),
    *("another variable", "position", "pair", "index of the pair"),
]


@pytest.mark.parametrize("field", FIELDS)
def test_results_are_made_anew_after_a_tensor_of_the_examples_has_changed(
    field, session, model, task
):
    examples = changeable(task)
    made: list[int] = []

    def of_ones_own() -> int:
        return session.cached(("mine", examples), lambda: made.append(0) or len(made))

    def all_results() -> list[Tensor]:
        return [session.baseline(model, examples), session.activation(model, examples, RESID)]

    before = [of_ones_own(), of_ones_own()], [result.clone() for result in all_results()]
    assert before[0] == [1, 1]
    example_changes(examples)[field]()
    assert of_ones_own() == 2
    logits, resid = all_results()
    close(logits, logits_of(model, examples))
    close(resid, activations_of(model, examples)[RESID])
    is_read = field in ("prompt", "given", "whole prompt")
    assert torch.equal(resid, before[1][1]) == (not is_read)


def test_sets_that_differ_in_what_is_known_of_them_have_results_of_their_own(session, task):
    examples = changeable(task)
    others = [
        replace(examples, positions={**examples.positions, "own": torch.zeros(12).long()}),
        replace(examples, positions={**examples.positions, "=": 3, "a0": 9}),
        replace(examples, is_noisy=~examples.is_noisy),
        replace(examples, counterfactual=None),
        examples.with_prefix("true"),
    ]
    found = [session.cached(("mine", e), object) for e in (examples, *others)]
    assert len(set(found)) == len(found)
    assert session.cached(("mine", examples.clone()), object) is found[0]


def test_the_same_tokens_with_a_shorter_answer_have_logits_of_their_own(session, model, examples):
    shorter = replace(
        examples,
        prompt=examples.tokens[:, :11],
        given=torch.cat([examples.tokens[:, 11:], examples.given[:, -1:]], dim=1),
        true=examples.true[:, 1:],
        places=examples.places[1:],
    )
    assert torch.equal(shorter.tokens, examples.tokens)
    for chosen in (examples, shorter):
        close(session.baseline(model, chosen), logits_of(model, chosen))


def test_a_steering_learns_its_direction_anew_after_a_variable_has_changed(session, model, task):
    examples = task.sample("train").select(torch.arange(12)).as_set()
    session.example_sets["noisy"] = examples
    part = Steer(site="resid_pre", layer=1, variable="carry_1", towards=1, away=0, on="noisy")
    first = session.logits(model, examples, [part])
    examples.variables["carry_1"][:] = torch.arange(12) % 2
    fresh = Session({"after": model}, {"noisy": examples}).logits(model, examples, [part])
    close(session.logits(model, examples, [part]), fresh)
    assert not torch.allclose(first, fresh, atol=1e-3)


def test_weights_that_change_between_calls_are_noticed_by_each(session, any_model, examples):
    for _ in range(3):
        any_model.blocks[1].mlp.W_out.data.mul_(1.5)
        close(session.logits(any_model, examples), logits_of(any_model, examples))


def test_within_steady_a_model_is_looked_at_once(session, any_model, examples, monkeypatch):
    from mechmem.session import state as home

    looks: list[Any] = []
    plain = home.state_of_model
    monkeypatch.setattr(home, "state_of_model", lambda m: looks.append(m) or plain(m))
    with session.steady(), session.steady():
        for _ in range(3):
            session.baseline(any_model, examples)
    assert looks == [any_model]
    session.baseline(any_model, examples)
    assert len(looks) > 1


# Cached results


def test_a_result_is_made_once_for_its_key(session, model, other_model, examples, others):
    keys = [
        ("a", model, examples),
        ("b", model, examples),
        ("a", other_model, examples),
        ("a", model, others),
        ("a", model, examples.with_prefix("true")),
        ("a", model, examples.select(torch.arange(11))),
        ("a", model, (examples, None)),
        ("a", (model, examples)),
        ("a",),
        (Ablate(site="z", layer=0), model),
        (Ablate(site="z", layer=1), model),
    ]
    made: list[int] = []

    def all_results() -> list[int]:
        return [session.cached(key, lambda: made.append(0) or len(made)) for key in keys]

    assert all_results() == list(range(1, len(keys) + 1))
    assert all_results() == list(range(1, len(keys) + 1))
    again = session.cached(("a", model, examples.select(slice(None))), lambda: "made anew")
    assert again == 1


def test_an_error_is_not_kept(session):
    def failing() -> None:
        raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"):
        session.cached(("key",), failing)
    assert session.cached(("key",), lambda: 3) == 3


# Where forwards start


@pytest.mark.parametrize(
    ("hook", "start"),
    [
        ("hook_embed", 0),
        ("blocks.0.hook_attn_out", 0),
        (RESID, 1),
        ("blocks.1.mlp.hook_post", 1),
        ("unembed.hook_out", 1),
        ("ln_final.hook_normalized", 1),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_edited_logits_resume_at_the_first_edited_layer(
    kept, hook, start, session, any_model, examples, forwards
):
    if kept:
        session.baseline(any_model, examples)
    found = session.logits(
        any_model, examples, [Changed(hook="unembed.hook_out"), Changed(hook=hook)]
    )
    assert forwards == ([(12, 0), (12, start)] if kept else [(12, 0)])
    names = ["unembed.hook_out", hook]
    plain = [(name, lambda activation, hook: activation.roll(1, dims=-1)) for name in names]
    close(found, logits_of(any_model, examples, *plain))


def test_swapped_weights_resume_at_the_first_layer_that_is_another(
    session, model, other_model, examples, forwards
):
    baseline = session.baseline(model, examples)
    part = SwapWeights(component="mlp", layer=1, source=other_model)
    swapped = session.logits(model, examples, [part])
    assert forwards == [(12, 0), (12, 1)]
    assert not torch.allclose(swapped, baseline, atol=1e-3)


def test_shortformer_never_resumes(examples, forwards):
    """Its attention adds positions that the residual does not hold."""
    model = transformer(positional_embedding_type="shortformer")
    session = Session()
    session.baseline(model, examples)
    part = Changed(hook="blocks.1.mlp.hook_post")
    found = session.logits(model, examples, [part])
    assert forwards == [(12, 0), (12, 0)]
    close(found, logits_of(model, examples, (part.hook, lambda a, hook: a.roll(1, dims=-1))))


def test_nothing_asks_for_gradients(session, model, examples):
    model = transformer().requires_grad_(True)
    assert not session.logits(model, examples).requires_grad
    assert not session.logits(model, examples, [Changed()]).requires_grad
    assert not session.activation(model, examples, "hook_embed").requires_grad


# The budget

SIZE = 12 * 14 * 16 * 4
"""Bytes of one residual: examples, positions, d_model, bytes of a number."""


def test_what_does_not_fit_is_forgotten_oldest_use_first(model, examples, forwards):
    session = Session(memory=4 * SIZE)  # half of it is for what is kept
    first, second, third = (
        f"blocks.{i}.hook_{name}" for i, name in ((0, "attn_out"), (0, "mlp_out"), (1, "attn_out"))
    )

    def n_run() -> int:
        done = sum(n for n, _ in forwards) // len(examples)
        forwards.clear()
        return done

    assert session.activation(model, examples, first).nbytes == SIZE
    session.activation(model, examples, second)
    assert n_run() == 2
    session.activation(model, examples, first)  # used again, so `second` is now the oldest
    assert n_run() == 0
    session.activation(model, examples, third)
    session.activation(model, examples, first)
    assert n_run() == 1
    session.activation(model, examples, second)
    assert n_run() == 1


@pytest.mark.parametrize("memory", [1, 3 * SIZE, 20 * SIZE])
def test_nothing_is_kept_beyond_its_share_of_the_budget(memory, any_model, examples):
    session = Session(memory=memory)
    hooks = [f"blocks.{i}.hook_{name}" for i in (0, 1) for name in ("attn_out", "resid_post")]
    references: list[Any] = []
    for hook in [*hooks, NEURONS, RESID]:
        references.append(weakref.ref(session.activation(any_model, examples, hook)))
        session.baseline(any_model, examples)
        # Not the tensors: a name for them would keep them alive.
        kept = [found.nbytes for reference in references if (found := reference()) is not None]
        found = None
        assert sum(kept) <= memory / 2
    assert bool(kept) == (memory > 2 * SIZE)


def test_more_than_is_kept_is_still_returned(any_model, examples):
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (0, 1)]
    found = Session(memory=1).activations(any_model, examples, hooks)
    expected = activations_of(any_model, examples)
    for hook in hooks:
        close(found[hook], expected[hook])


def test_a_small_budget_runs_few_rows_and_a_large_one_all(model, examples):
    assert Budget(1).rows_at_once(model, examples) == 1
    assert Budget(2**31).rows_at_once(model, examples) > 10_000
    few, many = (Budget(memory).rows_at_once(model, examples) for memory in (2**22, 2**23))
    assert many == pytest.approx(2 * few, abs=1)
    assert Budget(2**22).rows_at_once(model, examples, gradients=True) < few


def test_rows_run_in_quick_chunks_unless_they_may_depend_on_each_other(
    model, examples, forwards, monkeypatch
):
    """What fits the budget is not split where that could change a number."""

    @plugin
    class Mixed(Changed):
        by_example = False

        def edits(self, session, model, examples) -> list[Edit]:
            centred = lambda own, _: own - own.mean(0)  # noqa: E731
            return [Edit(At(self.hook), centred, rowwise=self.how == "unstated")]

    monkeypatch.setattr(budget, "QUICK", 100_000)
    n_quick = Budget(2**31).rows_at_once(model, examples, apart=True)
    assert n_quick == 5
    session = Session({"after": model}, {"noisy": examples})
    session.logits(model, examples, [Changed()])
    assert max(n for n, _ in forwards) == n_quick
    centred = (RESID, lambda activation, hook: activation - activation.mean(0))
    for how in ("unstated", "stated"):
        forwards.clear()
        found = session.logits(model, examples, [Mixed(how=how)])
        assert forwards == [(12, 0)]
        close(found, logits_of(model, examples, centred))


PARTS: dict[str, list[Intervention]] = {
    "nothing": [],
    "patch": [Patch(site="z", layer=0, source=Source(checkpoint="before"))],
    "patch at positions": [
        Patch(site="resid_pre", layer=1, position=("=", "a0"), source=Source(examples="clean"))
    ],
    "neurons": [Patch(site="neurons", layer=0, neurons=(3, 5), source=Source(checkpoint="before"))],
    "mean": [Ablate(site="attn_out", layer=1, reference_set="clean")],
    "resample": [Ablate(site="attn_out", layer=0, method="resample", seed=2)],
    "gaussian": [Ablate(site="mlp_out", layer=0, method="gaussian", seed=2)],
    "steer": [Steer(site="resid_pre", layer=1, variable="carry_1", towards=1, away=0, on="clean")],
    "erase": [Erase(site="resid_pre", layer=1, position="=", variable="carry_1", fit_on="clean")],
    "swap": [SwapWeights(component="mlp", layer=1, source=Source(checkpoint="before"))],
    "two": [
        Ablate(site="z", layer=0, head=1, method="zero"),
        Patch(site="mlp_out", layer=1, source=Source(checkpoint="before")),
    ],
}
MEMORIES = {"one row at once": 1, "three rows at once": 3}


@pytest.fixture(params=MEMORIES)
def narrow(request, any_model, examples) -> Any:
    """Of a session, one with the same models and sets that runs so many rows at once."""

    def made(session: Session) -> Session:
        n, memory = MEMORIES[request.param], 1
        while (found := Session(memory=memory)).budget.rows_at_once(any_model, examples) < n:
            memory = memory * 5 // 4 + 1
        assert found.budget.rows_at_once(any_model, examples) == n
        return Session(session.models, session.example_sets, memory=memory)

    return made


@pytest.fixture
def wide(any_model, examples, others) -> Session:
    is_ours = any_model.cfg.positional_embedding_type == "standard"
    other = transformer(1, **KINDS["fast" if is_ours else "hooked"])
    models = {"after": any_model, "before": other}
    return Session(models, {"noisy": examples, "clean": others})


@pytest.mark.parametrize("name", PARTS)
def test_logits_and_answers_in_chunks_are_those_of_all_rows(
    name, wide, narrow, any_model, examples, forwards
):
    session, parts = narrow(wide), PARTS[name]
    n_most = session.budget.rows_at_once(any_model, examples)
    found = session.logits(any_model, examples, parts), session.greedy(any_model, examples, parts)
    assert max(n for n, _ in forwards) == n_most
    close(found[0], wide.logits(any_model, examples, parts))
    assert torch.equal(found[1], wide.greedy(any_model, examples, parts))
    if parts:
        assert not torch.allclose(found[0], wide.baseline(any_model, examples), atol=1e-3)


def test_activations_in_chunks_are_those_of_all_rows(wide, narrow, any_model, examples, forwards):
    session = narrow(wide)
    n_most = session.budget.rows_at_once(any_model, examples)
    hooks = [NEURONS, RESID, "blocks.1.attn.hook_pattern", "hook_embed"]
    expected = activations_of(any_model, examples)
    pos = (torch.arange(12) % 4 - 1)[:, None]
    places = [At(NEURONS, torch.tensor([[3, 9]]), (5, 2)), At(RESID, pos)]
    found = session.activations(any_model, examples, hooks)
    parts = [session.activation(any_model, examples, at) for at in places]
    edit = Edit(At("blocks.0.hook_mlp_out"), lambda own, _: own.roll(1, dims=-1))
    edited = session.edited_activations(any_model, examples, [edit], hooks)
    assert max(n for n, _ in forwards) == max(n_most, 2)  # two, to see whether rows are mixed
    for hook in hooks:
        close(found[hook], expected[hook])
    for part, at in zip(parts, places, strict=True):
        torch.testing.assert_close(
            part, wide.activation(any_model, examples, at), atol=1e-5, rtol=1e-5, equal_nan=True
        )
    whole = wide.edited_activations(any_model, examples, [edit], hooks)
    for hook in hooks:
        close(edited[hook], whole[hook])


def test_gradients_in_chunks_are_those_of_all_rows(wide, narrow, any_model, examples):
    wrt = [NEURONS, "blocks.1.attn.hook_z"]

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        at_rows = examples.true[rows, :, None]
        return logits.log_softmax(-1).gather(-1, at_rows).sum()

    def joined(session: Session) -> list[Tensor]:
        parts = [*session.gradients(any_model, examples, loss, wrt)]
        rows = torch.cat([part.rows for part in parts])
        assert sorted(rows.tolist()) == list(range(12))
        found = [torch.cat([part.logits for part in parts])]
        for hook in wrt:
            found += [torch.cat([part.activations[hook] for part in parts])]
            found += [torch.cat([part.gradients[hook] for part in parts])]
        n_parts.append(len(parts))
        return [tensor[rows.argsort()] for tensor in found]

    n_parts: list[int] = []
    for found, expected in zip(joined(narrow(wide)), joined(wide), strict=True):
        close(found, expected)
    assert n_parts[0] > 3
    assert n_parts[1] == 1


def test_the_numbers_of_each_cell_in_chunks_are_those_of_all_rows(
    wide, narrow, any_model, examples
):
    cells = [*PARTS.values(), PARTS["neurons"], PARTS["neurons"]]
    pairs = zip(
        narrow(wide).logits_of_each(any_model, examples, cells),
        wide.logits_of_each(any_model, examples, cells),
        strict=True,
    )
    for found, expected in pairs:
        close(found, expected)


def test_a_set_of_one_example_runs_in_any_budget(any_model, examples):
    one = examples.select([4]).as_set()
    session = Session(memory=1)
    close(session.logits(any_model, one), logits_of(any_model, one))
    assert session.greedy(any_model, one).shape == (1, 5)


# What it refuses


def test_too_many_positions_for_the_model_are_one_line(session, examples):
    short = transformer(n_ctx=13)
    message = "^the examples have 14 input positions, the model reads 13$"
    for call in (
        lambda: session.logits(short, examples),
        lambda: session.logits(short, examples, [Changed()]),
        lambda: session.activation(short, examples, RESID),
        lambda: session.greedy(short, examples),
        lambda: [*session.gradients(short, examples, lambda logits, _: logits.sum(), [RESID])],
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("fields", [{"d_vocab": 9}, {"d_vocab": 12, "d_vocab_out": 9}], ids=str)
def test_tokens_beyond_the_vocabulary_are_one_line(fields, session, examples):
    small = transformer(**fields)
    largest = max(examples.tokens.max(), examples.true.max(), examples.given.max())
    known = f"the model knows {fields['d_vocab']} tokens and answers with 9"
    message = f"^the examples have the token {largest}, {known}$"
    for call in (session.logits, session.greedy):
        with pytest.raises(InputError, match=message):
            call(small, examples)


def test_a_hook_that_the_model_lacks_is_one_line(session, any_model, examples):
    with pytest.raises(InputError, match=r"no hook 'blocks.2.hook_resid_pre'"):
        session.activation(any_model, examples, "blocks.2.hook_resid_pre")


# Mixed lengths


@pytest.fixture(scope="module")
def mixed() -> Examples:
    """Ten examples of three lengths, each with a position of its own."""
    generator = torch.Generator().manual_seed(3)
    length = torch.tensor([5, 9, 3, 5, 9, 9, 3, 5, 3, 9])
    tokens = torch.randint(10, (10, 9), generator=generator)
    given, true = torch.randint(10, (2, 10, 4), generator=generator)
    return Examples(
        prompt=torch.where(torch.arange(9) < length[:, None], tokens, -1),
        given=given,
        true=true,
        is_noisy=torch.ones(10, dtype=torch.bool),
        variables={"v": torch.arange(10) % 2},
        positions={"first": 0, "middle": length // 2, "last": length - 1},
        places=("s3", "s2", "s1", "s0"),
        vocabulary=tuple("0123456789+="),
    )


MIXED: dict[str, list[Intervention]] = {
    "nothing": [],
    "zero": [Ablate(site="z", layer=0, head=1, method="zero")],
    "patch": [
        Patch(
            site="resid_post", layer=0, position=("middle", "readout"),
            source=Source(checkpoint="before"),
        )
    ],
    "mean": [Ablate(site="mlp_out", layer=1, position="last", reference_set="mixed")],
    "neurons": [
        Patch(site="neurons", layer=1, neurons=(1, 2), position="last",
              source=Source(checkpoint="before"))
    ],
    "swap": [SwapWeights(component="mlp", layer=1, source=Source(checkpoint="before"))],
}  # fmt: skip


@pytest.fixture
def of_mixed(wide, mixed) -> Session:
    return Session(wide.models, {"mixed": mixed})


@pytest.mark.parametrize("memory", [1, 2 * 2**30])
@pytest.mark.parametrize("name", MIXED)
def test_mixed_lengths_give_what_each_length_gives_alone(
    name, memory, of_mixed, any_model, mixed, forwards
):
    parts = MIXED[name]
    session = Session(of_mixed.models, of_mixed.example_sets, memory=memory)
    logits, answers = (
        session.logits(any_model, mixed, parts),
        session.greedy(any_model, mixed, parts),
    )
    (each,) = session.logits_of_each(any_model, mixed, [parts])
    assert len(mixed.buckets()) == 3
    for rows, part in mixed.buckets():
        alone = of_mixed.logits(any_model, part, parts)
        close(logits[rows], alone)
        close(each[rows], alone)
        assert torch.equal(answers[rows], of_mixed.greedy(any_model, part, parts))
        if not parts:
            close(alone, logits_of(any_model, part))


@pytest.mark.parametrize("memory", [1, 2 * 2**30])
def test_activations_of_mixed_lengths_are_those_of_each_length(memory, of_mixed, any_model, mixed):
    session = Session(of_mixed.models, of_mixed.example_sets, memory=memory)
    for hook, units in ((NEURONS, (4, 1)), (RESID, None), ("blocks.1.attn.hook_z", (1,))):
        at = At(hook, mixed.indices(["middle", "readout"]), units)
        found = session.activation(any_model, mixed, at)
        assert found.shape[:2] == (10, 5)
        for rows, part in mixed.buckets():
            whole = activations_of(any_model, part)[hook]
            close(found[rows], at.take(whole, rows))


def test_whole_activations_of_mixed_lengths_are_refused_in_one_line(of_mixed, any_model, mixed):
    message = "^these examples have prompts of several lengths, .*; name the positions .*$"
    edit = Edit(At(RESID), lambda own, _: own)
    for call in (
        lambda: of_mixed.activation(any_model, mixed, RESID),
        lambda: of_mixed.activation(any_model, mixed, At(RESID, None, None)),
        lambda: of_mixed.activations(any_model, mixed, [RESID]),
        lambda: of_mixed.edited_activations(any_model, mixed, [edit], [RESID]),
        lambda: next(of_mixed.gradients(any_model, mixed, lambda x, _: x.sum(), [RESID])),
        lambda: of_mixed.logits(
            any_model, mixed, [Patch(site="z", layer=0, source=Source(checkpoint="before"))]
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()


# Backends and devices


def test_the_choice_of_the_backend_is_recorded_and_a_reason_for_hooked_is_given(examples):
    said: list[str] = []
    models = {"ours": transformer(), "llama": transformer(**KINDS["hooked"])}
    session = Session(models, say=said.append)
    assert session.backends == {}
    for _ in range(2):
        for model in models.values():
            session.logits(model, examples, [Changed()])
    assert session.backends["ours"] == ("fast", "it implements the model")
    name, reason = session.backends["llama"]
    assert name == "hooked"
    assert reason.startswith("`fast` refuses: its config has ")
    assert said == [f"llama runs on the backend `hooked`: {reason}"]
    session.logits(transformer(1), examples)
    assert session.backends["another model"] == ("fast", "it implements the model")


def test_a_choice_of_the_users_is_recorded_and_not_commented_on(examples):
    said: list[str] = []
    session = Session({"ours": transformer()}, backend="hooked", say=said.append)
    session.logits(session.model("ours"), examples)
    assert session.backends == {"ours": ("hooked", "it was asked for")}
    assert said == []


def test_fast_that_refuses_is_an_error_if_it_was_asked_for(examples):
    session = Session({"llama": transformer(**KINDS["hooked"])}, backend="fast")
    with pytest.raises(InputError, match="`fast` cannot run this model: its config has"):
        session.logits(session.model("llama"), examples)


def test_both_backends_give_the_same_numbers(session, examples):
    hooked = Session(session.models, session.example_sets, backend="hooked")
    model = session.model("after")
    for parts in PARTS.values():
        close(hooked.logits(model, examples, parts), session.logits(model, examples, parts))
        assert torch.equal(
            hooked.greedy(model, examples, parts), session.greedy(model, examples, parts)
        )


def test_a_device_that_is_given_moves_the_models(random_models):
    """`meta` is a device that every machine has."""
    models = {"after": random_models(0), "before": random_models(1)}
    session = Session(models, device="meta")
    for name, model in session.models.items():
        assert {p.device.type for p in model.parameters()} == {"meta"}, name
    where = random_models(2)
    assert Session({"after": where}, device="cpu").model("after") is where
    assert Session({"after": where}).model("after") is where


def test_what_is_forwarded_is_counted(session, model, examples):
    session.logits(model, examples)
    session.logits(model, examples)  # kept
    assert session.n_forwarded == 12
    session.logits(model, examples.select(slice(5)), [Changed()])
    assert session.n_forwarded == 17
    list(session.gradients(model, examples, lambda logits, _: logits.sum(), [RESID]))
    assert session.n_forwarded == 29
