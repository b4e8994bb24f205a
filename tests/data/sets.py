"""Sets of examples that several tests of `tests/data` draw from."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from mechmem.data.examples import Examples

VOCABULARY = tuple("abcde")


@st.composite
def example_sets(draw, n: int | None = None, n_answer: int | None = None, paired: bool = True):
    """Valid sets with prompts of one to four tokens, often of several lengths.

    Hypothesis chooses the shapes; the tokens follow from a seed, which is much faster.

    Args:
        n: number of examples; drawn by default, 0 included.
        n_answer: number of answer tokens; drawn by default.
        paired: whether the set may have counterfactuals.
    """
    n = draw(st.integers(0, 6)) if n is None else n
    n_answer = draw(st.integers(1, 3)) if n_answer is None else n_answer
    lengths = torch.tensor(
        draw(st.lists(st.integers(1, 4), min_size=n, max_size=n)), dtype=torch.long
    )
    width = 4 + draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(len(VOCABULARY), shape, generator=generator)

    given, true = tokens(n, n_answer), tokens(n, n_answer)
    places = tuple(f"s{i}" for i in range(n_answer))
    has_pairs = paired and draw(st.booleans())
    return Examples(
        prompt=torch.where(torch.arange(width) < lengths[:, None], tokens(n, width), -1),
        given=given,
        true=true,
        is_noisy=(given != true).any(dim=1),
        variables={"v": tokens(n) - 2, "length": lengths.clone()},
        positions={
            "first": 0,
            "last": lengths - 1,
            "at_times": torch.where(tokens(n) > 2, -1, lengths - 1),
            **{name: lengths + i for i, name in enumerate(places[:-1])},
        },
        places=places,
        vocabulary=VOCABULARY,
        prefix=draw(st.sampled_from(["given", "true"])),
        name=draw(st.sampled_from(["", "noisy"])),
        counterfactual=draw(example_sets(n, n_answer, paired=False)) if has_pairs else None,
    )
