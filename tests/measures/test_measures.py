"""Laws over every measure of the registry, after values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from plugin import plugin
from pydantic import TypeAdapter, ValidationError

from mechmem.data.examples import Examples
from mechmem.measures.accuracy import Accuracy
from mechmem.measures.kl import KL
from mechmem.measures.logit import Logit
from mechmem.measures.logit_difference import LogitDifference
from mechmem.measures.measure import Measure
from mechmem.measures.off_label_rate import OffLabelRate
from mechmem.measures.probability import Probability
from mechmem.measures.rank import Rank, mean_rank
from mechmem.spec.errors import InputError

LABELS = ("given", "true", "pair")
LABELLED = [kind for kind, member in Measure.kinds().items() if "label" in member.model_fields]
PLAIN = [
    measure
    for kind, member in Measure.kinds().items()
    for measure in ([member(label=label) for label in LABELS] if kind in LABELLED else [member()])
]
MEASURES = [pytest.param(m, id=m.name) for m in [*PLAIN, Logit(label="given", against="pair")]]
RELATIVE = [
    param for param in MEASURES if param.values[0] not in [Logit(label=label) for label in LABELS]
]
"""What does not read a logit as such."""
SHARES = [param for param in MEASURES if param.values[0].unit in ("fraction", "probability")]
D_VOCAB = 4


def made(given: list[list[int]], true: list[list[int]]) -> Examples:
    n = len(given)
    return Examples(
        prompt=torch.zeros(n, 2, dtype=torch.long),
        given=torch.tensor(given),
        true=torch.tensor(true),
        is_noisy=torch.tensor([g != t for g, t in zip(given, true, strict=True)]),
        variables={},
        positions={"a": 0, "b": 1},
        places=tuple(f"s{i}" for i in range(len(given[0]))),
        vocabulary=tuple("0123"),
    )


def drawn(n: int, seed: int) -> tuple[torch.Tensor, Examples, torch.Tensor]:
    """Random logits, labels and baseline logits of n examples with answers of three tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits, baseline = torch.randn(2, n, 3, D_VOCAB, generator=generator, dtype=torch.float64)
    given, true, pair = torch.randint(D_VOCAB, (3, n, 3), generator=generator).tolist()
    return 3 * logits, replace(made(given, true), counterfactual=made(pair, pair)), 3 * baseline


# One noisy example: given 1 2, true 1 3, its pair 2 3. The model says 1 (p .5) and then 3 (p .625).
P = torch.tensor([[[0.25, 0.5, 0.125, 0.125], [0.0625, 0.0625, 0.25, 0.625]]], dtype=torch.float64)
EXAMPLE = replace(made([[1, 2]], [[1, 3]]), counterfactual=made([[2, 2]], [[2, 3]]))
EVEN = torch.zeros(1, 2, D_VOCAB, dtype=torch.float64)


@pytest.mark.parametrize(
    ("measure", "by_place", "whole"),
    [
        (Accuracy(label="true"), [1, 1], 1),
        (Accuracy(label="given"), [1, 0], 0),
        (Probability(label="true"), [0.5, 0.625], 0.3125),
        (Probability(label="given"), [0.5, 0.25], 0.125),
        (Rank(label="true"), [0, 0], 0),
        (Rank(label="given"), [0, 1], 0.5),
        (Accuracy(label="pair"), [0, 1], 0),
        (Probability(label="pair"), [0.125, 0.625], 0.078125),
        (Rank(label="pair"), [2.5, 0], 1.25),  # tied with another token
        (Logit(label="given"), [-math.log(2), -math.log(4)], -math.log(8) / 2),
        (Logit(label="pair", against="true"), [-math.log(4), 0], -math.log(2)),
        (LogitDifference(), [0, math.log(2.5)], math.log(2.5) / 2),
        (OffLabelRate(), [0, 0], 0),
        # sum of q log(q / p), with q = 1/4 for every token without intervention
        (
            KL(),
            [math.log(2) / 4, math.log(4) / 2 - math.log(2.5) / 4],
            (math.log(32) - math.log(2.5)) / 8,
        ),
    ],
)
def test_values_by_hand(measure, by_place, whole):
    values = measure(P.log(), EXAMPLE, EVEN)
    assert values.tolist() == [pytest.approx(by_place)]
    assert measure.whole(values).tolist() == [pytest.approx(whole)]


def test_off_label_rate_by_hand():
    # the first token 2 is the pair's, the second 0 is nobody's
    logits = torch.tensor([[[0, 0, 9.0, 0], [9.0, 0, 0, 0]]])
    assert OffLabelRate()(logits, EXAMPLE, logits).tolist() == [[0, 1]]
    assert OffLabelRate()(logits, replace(EXAMPLE, counterfactual=None), logits).tolist() == [
        [1, 1]
    ]


def test_kl_is_taken_from_the_distribution_without_intervention():
    # p = (1/4, 3/4), q = (1/2, 1/2): KL(q || p) is log 2 - log 3 / 2, KL(p || q) is another number
    far = torch.full((1, 1, 2), -1e9, dtype=torch.float64)
    p, q = (
        torch.cat([torch.tensor([[v]]).double().log(), far], dim=-1)
        for v in ([0.25, 0.75], [0.5, 0.5])
    )
    example = made([[0]], [[0]])
    assert KL()(p, example, q).item() == pytest.approx(math.log(2) - math.log(3) / 2)
    assert KL()(q, example, p).item() == pytest.approx(0.75 * math.log(3) - math.log(2))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_value_for_every_place_and_one_for_the_whole_answer(measure):
    logits, examples, baseline = drawn(5, seed=0)
    values = measure(logits, examples, baseline)
    assert values.shape == (5, 3)
    assert measure.whole(values).shape == (5,)
    assert values.dtype == measure.whole(values).dtype == logits.dtype
    assert values.isfinite().all()


@pytest.mark.parametrize("measure", MEASURES)
def test_a_value_depends_on_its_own_example_only(measure):
    logits, examples, baseline = drawn(6, seed=1)
    rows = torch.tensor([4, 1, 1])
    alone = measure(logits[rows], examples.select(rows), baseline[rows])
    assert torch.equal(alone, measure(logits, examples, baseline)[rows])


@pytest.mark.parametrize("measure", RELATIVE)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_a_constant_added_to_the_logits_of_a_place_changes_nothing(measure, seed, shift):
    logits, examples, baseline = drawn(4, seed)
    before, after = (
        measure(logits, examples, baseline),
        measure(logits + shift, examples, baseline - shift),
    )
    torch.testing.assert_close(before, after, atol=1e-9, rtol=0)


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_is_written_to(measure):
    logits, examples, baseline = drawn(4, seed=2)
    copies = logits.clone(), baseline.clone()
    measure.whole(measure(logits, examples, baseline))
    assert torch.equal(logits, copies[0])
    assert torch.equal(baseline, copies[1])


@pytest.mark.parametrize("measure", MEASURES)
def test_the_prefix_that_was_fed_plays_no_part(measure):
    logits, examples, baseline = drawn(5, seed=3)
    fed = [measure(logits, examples.with_prefix(prefix), baseline) for prefix in ("given", "true")]
    assert torch.equal(*fed)


@pytest.mark.parametrize("kind", LABELLED)
def test_the_label_is_the_one_that_is_named(kind):
    logits, examples, baseline = drawn(20, seed=4)
    swapped = replace(examples, given=examples.counterfactual.true, true=examples.given)
    swapped = replace(swapped, counterfactual=made(examples.true.tolist(), examples.true.tolist()))
    measures = {label: Measure.kinds()[kind](label=label) for label in LABELS}
    before = {label: measure(logits, examples, baseline) for label, measure in measures.items()}
    after = {label: measure(logits, swapped, baseline) for label, measure in measures.items()}
    for old, new in (("pair", "given"), ("given", "true"), ("true", "pair")):
        assert torch.equal(before[old], after[new])
        assert not torch.equal(before[old], before[new])


@pytest.mark.parametrize("kind", LABELLED)
def test_the_label_of_a_pair_needs_pairs(kind):
    logits, examples, baseline = drawn(2, seed=0)
    with pytest.raises(InputError, match="an example set that was made with `pair:`"):
        Measure.kinds()[kind](label="pair")(
            logits, replace(examples, counterfactual=None), baseline
        )


@pytest.mark.parametrize("measure", PLAIN, ids=lambda measure: measure.name)
def test_the_name_is_a_shorthand_for_the_measure(measure):
    assert TypeAdapter(Measure).validate_python(measure.name) == measure


def test_names_of_all_measures_differ():
    names = [param.values[0].name for param in MEASURES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("acuracy_true", "did you mean 'accuracy'"),
        ("kl_true", "there is no measure 'kl_true'"),
        ("true", "no measure"),
    ],
)
def test_a_word_that_is_no_measure_is_refused(word, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Measure).validate_python(word)


@pytest.mark.parametrize("measure", SHARES)
@given(seed=st.integers(0, 1000))
def test_shares_lie_between_0_and_1_and_a_whole_answer_is_no_more_than_any_of_its_tokens(
    measure, seed
):
    logits, examples, baseline = drawn(4, seed)
    values = measure(logits, examples, baseline)
    assert ((values >= 0) & (values <= 1)).all()
    if measure.kind != "off_label_rate":  # a mean over the tokens
        assert (measure.whole(values) <= values.amin(dim=1)).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_a_unit_is_stated(measure):
    assert measure.unit in ("fraction", "probability", "nats", "rank, 0 is best")


@given(st.integers(0, 1000))
def test_kl_is_never_negative_and_zero_without_a_change(seed):
    logits, examples, baseline = drawn(4, seed)
    assert (KL()(logits, examples, baseline) > 0).all()
    assert torch.equal(KL()(logits, examples, logits), torch.zeros(4, 3, dtype=torch.float64))


def test_a_tie_has_the_mean_of_its_ranks():
    logits = torch.zeros(3, 2, 12)
    assert mean_rank(logits, logits[..., 4]).unique().tolist() == [5.5]
    logits[..., 0] = 1.0  # better than the other eleven, which share the ranks 1 to 11
    assert mean_rank(logits, logits[..., 4]).unique().tolist() == [6.0]
    assert mean_rank(logits, logits[..., 0]).unique().tolist() == [0.0]


@given(st.integers(0, 1000))
def test_accuracy_is_rank_zero_and_an_odd_answer_is_off_label(seed):
    logits, examples, baseline = drawn(6, seed)
    right = {}
    for label in LABELS:
        right[label] = Accuracy(label=label)(logits, examples, baseline)
        assert torch.equal(right[label] == 1, Rank(label=label)(logits, examples, baseline) == 0)
    assert torch.equal(
        OffLabelRate()(logits, examples, baseline), 1 - torch.stack([*right.values()]).amax(dim=0)
    )


@given(st.integers(0, 1000))
def test_logit_difference_is_the_log_of_the_ratio_of_probabilities(seed):
    logits, examples, baseline = drawn(4, seed)
    true, given = (
        Probability(label=label)(logits, examples, baseline) for label in ("true", "given")
    )
    torch.testing.assert_close(LogitDifference()(logits, examples, baseline), (true / given).log())


JUDGES = [param for param in MEASURES if param.values[0].judges_answers]
OTHERS = [param for param in MEASURES if not param.values[0].judges_answers]


@pytest.mark.parametrize("measure", JUDGES)
@given(seed=st.integers(0, 1000))
def test_a_measure_that_judges_answers_depends_on_the_most_likely_tokens_only(measure, seed):
    """So a decoded answer has the value of any logits that it is the most likely answer of."""
    logits, examples, baseline = drawn(5, seed)
    found = measure.of_answer(logits.argmax(-1), examples, D_VOCAB)
    assert torch.equal(found.double(), measure(logits, examples, baseline))
    assert found.shape == (5, 3)


@pytest.mark.parametrize(
    ("measure", "by_place"),
    [
        (Accuracy(label="true"), [1, 0]),
        (Accuracy(label="given"), [1, 1]),
        (Accuracy(label="pair"), [0, 0]),
        (OffLabelRate(), [0, 0]),
    ],
)
def test_an_answer_is_judged_by_hand(measure, by_place):
    # the answer 1 2 is the given one
    assert measure.of_answer(torch.tensor([[1, 2]]), EXAMPLE, D_VOCAB).tolist() == [by_place]
    assert measure.of_answer(torch.tensor([[0, 0]]), EXAMPLE, D_VOCAB).sum() == (
        2 if measure == OffLabelRate() else 0
    )


@pytest.mark.parametrize("measure", OTHERS)
def test_a_measure_of_the_whole_distribution_does_not_judge_answers(measure):
    logits, examples, baseline = drawn(5, seed=0)
    assert measure.of_answer(logits.argmax(-1), examples, D_VOCAB) is None
    # and rightly: it is not the same for logits with the same most likely tokens
    flatter, values = logits / 3, measure(logits, examples, baseline)
    is_rank = isinstance(measure, Rank)
    other = logits.clone()
    if is_rank:  # which looks at the order of all tokens: the last becomes the second
        least = logits.argmin(-1, keepdim=True)
        other.scatter_(-1, least, logits.amax(-1, keepdim=True) - 1e-9)
    changed = measure(other if is_rank else flatter, examples, baseline)
    assert not torch.equal(changed, values)


@plugin
class Plugged(Accuracy):
    """A user's own accuracy, which needs nothing more to have a value for a decoded answer."""


def test_a_subclass_judges_answers_as_its_base_does():
    answer = torch.tensor([[1, 2]])
    assert Plugged(label="given").of_answer(answer, EXAMPLE, D_VOCAB).tolist() == [[1, 1]]


CONSTANT = [
    (LogitDifference(), "take logit_true, probability_true or accuracy_true"),
    (Logit(label="true", against="given"), "take logit_true or probability_true"),
    (Logit(label="given", against="given"), "take logit_given or probability_given"),
]


@pytest.mark.parametrize(
    ("measure", "advice"), CONSTANT, ids=lambda value: getattr(value, "name", "")
)
def test_a_measure_that_is_constant_by_definition_says_what_to_take_instead(measure, advice):
    logits, examples, baseline = drawn(6, seed=5)
    clean = replace(examples, true=examples.given, is_noisy=examples.is_noisy & False)
    assert advice in measure.constant_on(clean)
    assert measure.name in measure.constant_on(clean)
    assert not measure(logits, clean, baseline).any()  # it is 0 indeed


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_is_constant_only_where_it_says_so(measure):
    for seed in range(3):
        logits, examples, baseline = drawn(6, seed)
        clean = replace(examples, true=examples.given, is_noisy=examples.is_noisy & False)
        for chosen in (examples, clean):
            values = [measure(factor * logits, chosen, baseline) for factor in (1, -2)]
            is_constant = measure.constant_on(chosen) is not None
            assert torch.equal(*values) == is_constant


def test_logits_of_another_shape_are_refused():
    logits, examples, baseline = drawn(4, seed=0)
    with pytest.raises(TypeCheckError):
        Accuracy()(logits[:, 0], examples, baseline)
