"""FDA, four-digit addition: `a3 a2 a1 a0 + b3 b2 b1 b0 = s4 s3 s2 s1 s0`, one token per digit."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Literal

import torch
from einops import rearrange
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.data.label_noise import LabelNoise, UniformWrong
from mechmem.data.minimal_pair import MinimalPair
from mechmem.data.tasks.task import Task, differs_as_asked
from mechmem.spec.limits import Seed
from mechmem.spec.sweep import Swept

N_DIGITS = 4
DIGITS = tuple(range(10))
PLUS, EQUALS = 10, 11
POWERS = 10 ** torch.arange(N_DIGITS - 1, -1, -1)
"""Value of each digit of an operand, in written order."""
Size = Annotated[int, Field(ge=1, le=1_000_000)]
Order = Literal["most_significant_first", "least_significant_first"]
N_SUMS = 19_998 - 2_000 + 1


class FourDigitAddition(Task):
    """Sums of two four-digit numbers, zero-padded to five digits.

    The operands a and b are uniform in 1000..9999. The intermediate results (digit sums and
    carries) are known, so that a model that has memorised a wrong sum can be tested for whether it
    still computes the right one.
    Variables: `digit_sum_i` (0..18), `carry_i` (the carry *into* place i, 0/1; i = 1..4), `out_i`
    (the true digit), `a_i` and `b_i` (the digits of the operands).
    Source: arXiv:2507.04782.
    """

    n_train: Swept[Size] = 10_000
    """Number of training instances, including noisy ones."""
    n_held_out: Swept[Size] = 2_000
    """Number of held-out instances; no pair (a, b) is in both sets."""
    answer_order: Swept[Order] = "most_significant_first"
    """Order in which the digits of the sum are written."""
    noise: Swept[LabelNoise] = UniformWrong()
    """The wrong labels of the training set."""
    seed: Seed = 0
    """Seed of the operands and of the split."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*map(str, DIGITS), "+", "=")

    @property
    def n_context(self) -> int:
        return 2 * N_DIGITS + 2 + N_DIGITS

    @property
    def chance(self) -> float:
        return 1 / N_SUMS

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the answer digits, in written order."""
        names = tuple(f"s{i}" for i in range(N_DIGITS, -1, -1))
        return names if self.answer_order == "most_significant_first" else names[::-1]

    def sample(self, split: str) -> Examples:
        return _sample(self, split)

    def examples(self, a: Int[Tensor, " n"], b: Int[Tensor, " n"]) -> Examples:
        """Correctly labelled examples of these operands.

        >>> FourDigitAddition().examples(torch.tensor([3471]), torch.tensor([2908])).text(0)
        '3 4 7 1 + 2 9 0 8 = 0 6 3 7 9'
        """
        variables = _variables(a, b)
        answer = torch.stack([variables[f"out_{name[1]}"] for name in self.places], dim=1)
        signs = [torch.full((len(a), 1), sign) for sign in (PLUS, EQUALS)]
        operands = [f"{x}{i}" for x in "ab" for i in range(N_DIGITS - 1, -1, -1)]
        names = [*operands[:N_DIGITS], "+", *operands[N_DIGITS:], "=", *self.places[:-1]]
        return Examples(
            prompt=torch.cat([_digits(a), signs[0], _digits(b), signs[1]], dim=1),
            given=answer,
            true=answer.clone(),  # so that editing one label does not change the other
            is_noisy=torch.zeros(len(a), dtype=torch.bool),
            variables=variables,
            positions={name: i for i, name in enumerate(names)},
            places=self.places,
            vocabulary=self.vocabulary,
            token_variables=tuple(f"out_{i}" for i in range(N_DIGITS + 1)),
        )

    def answers(self, prompt: Int[Tensor, "n n_prompt"]) -> Int[Tensor, "n n_answer"]:
        return self.examples(*_operands(prompt.cpu())).true.to(prompt.device)

    def counterfactuals(
        self, examples: Examples, pair: MinimalPair, generator: torch.Generator
    ) -> tuple[Tensor, Examples]:
        """Examples with one operand digit changed so that `flip` changes and `hold` does not.

        Args:
            examples: any examples of the task.
            pair: the variable that must differ and those that must stay the same.
            generator: source of all random choices.
        """
        a, b = _operands(examples.prompt)
        candidates = []  # every change of one digit; the first digit of an operand is never 0
        for place in range(N_DIGITS):
            for digit in DIGITS[1 if place == N_DIGITS - 1 else 0 :]:
                candidates += [(_replaced(a, place, digit), b), (a, _replaced(b, place, digit))]
        before = {name: examples.variables[name] for name in (pair.flip, *pair.hold)}
        fits = torch.stack(
            [differs_as_asked(before, _variables(*c), pair) for c in candidates], dim=1
        )
        rows = fits.any(dim=1).nonzero()[:, 0]
        if not len(rows):
            return rows, examples.select(rows)
        choice = torch.multinomial(fits[rows].double(), 1, generator=generator)[:, 0]
        a = torch.stack([c[0] for c in candidates], dim=1)[rows, choice]
        b = torch.stack([c[1] for c in candidates], dim=1)[rows, choice]
        return rows, self.examples(a, b)


@lru_cache(maxsize=8)
def _sample(task: FourDigitAddition, split: str) -> Examples:
    generator = torch.Generator().manual_seed(task.seed)
    n = task.n_train + task.n_held_out
    pairs = torch.empty(0, dtype=torch.long)  # a and b as one number: 9000 (a - 1000) + b - 1000
    while len(pairs) < n:
        drawn = torch.cat([pairs, torch.randint(9000 * 9000, (2 * n,), generator=generator)])
        # Of repeated pairs only the first is kept, in the order of drawing.
        values, inverse = drawn.unique(return_inverse=True)
        first = torch.full_like(values, len(drawn)).scatter_reduce(
            0, inverse, torch.arange(len(drawn)), "amin"
        )
        pairs = drawn[first.sort().values]
    pairs = pairs[: task.n_train] if split == "train" else pairs[task.n_train : n]
    examples = task.examples(1000 + pairs // 9000, 1000 + pairs % 9000)
    if split != "train":
        return examples
    alphabets = tuple((0, 1) if place == f"s{N_DIGITS}" else DIGITS for place in task.places)
    given, is_noisy = task.noise.corrupt(examples.true, alphabets)
    return replace(examples, given=given, is_noisy=is_noisy)


def _digits(numbers: Int[Tensor, " n"]) -> Int[Tensor, "n digits"]:
    """The decimal digits, the most significant first."""
    return rearrange(numbers, "n -> n 1") // POWERS % 10


def _operands(prompt: Int[Tensor, "n n_prompt"]) -> tuple[Tensor, Tensor]:
    """The operands a and b of the prompts."""
    a, b = prompt[:, :N_DIGITS], prompt[:, N_DIGITS + 1 : 2 * N_DIGITS + 1]
    return (a * POWERS).sum(dim=1), (b * POWERS).sum(dim=1)


def _replaced(numbers: Tensor, place: int, digit: int) -> Tensor:
    """The numbers with the digit at one place replaced.

    Args:
        numbers: numbers of any shape.
        place: power of ten of the digit.
        digit: its new value.
    """
    return numbers + (digit - numbers // 10**place % 10) * 10**place


def _variables(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The digits of a and b, and the digit sums, carries and true digits of a + b."""
    variables, carry = {}, torch.zeros_like(a)
    for i in range(N_DIGITS):
        variables[f"a_{i}"], variables[f"b_{i}"] = (x // 10**i % 10 for x in (a, b))
        digit_sum = variables[f"a_{i}"] + variables[f"b_{i}"]
        variables[f"digit_sum_{i}"] = digit_sum
        variables[f"out_{i}"] = (digit_sum + carry) % 10
        carry = (digit_sum + carry) // 10
        variables[f"carry_{i + 1}"] = carry
    return variables | {f"out_{N_DIGITS}": carry}
