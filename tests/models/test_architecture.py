from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mechmem.models.architecture import Architecture, moved, silenced_deprecation

ARCHITECTURE = Architecture(n_layers=1, d_model=8, n_heads=2)


def _draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002


def _seeded() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)


def test_building_leaves_the_global_random_states_as_they_were():
    _seeded()
    expected = _draws()
    _seeded()
    ARCHITECTURE.build(12, 14, seed=3)
    assert _draws() == expected


def test_the_same_seed_gives_the_same_weights_whatever_the_global_state():
    first = ARCHITECTURE.build(12, 14, seed=3).state_dict()
    torch.manual_seed(99)
    second, other = (
        ARCHITECTURE.build(12, 14, seed=3).state_dict(),
        ARCHITECTURE.build(12, 14, seed=4).state_dict(),
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed.W_E"], other["embed.W_E"])
    assert not torch.equal(first["blocks.0.attn.W_Q"], other["blocks.0.attn.W_Q"])


def test_building_prints_and_warns_nothing(capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ARCHITECTURE.build(12, 14)
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_only_the_one_deprecation_is_silenced():
    with silenced_deprecation():
        warnings.warn("HookedTransformer is deprecated", DeprecationWarning, stacklevel=1)
        with pytest.raises(DeprecationWarning, match="another"):
            warnings.warn("another", DeprecationWarning, stacklevel=1)
    with pytest.raises(DeprecationWarning):
        warnings.warn("HookedTransformer is deprecated", DeprecationWarning, stacklevel=1)


@pytest.mark.parametrize(("init_std", "expected"), [(None, 0.8 / 8), (0.5, 0.5)])
def test_initial_weights_are_normal_biases_zero_and_norm_weights_one(init_std, expected):
    model = Architecture(n_layers=1, d_model=64, n_heads=2, init_std=init_std).build(12, 14)
    for name, parameter in model.named_parameters():
        if ".W_" in name:
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(parameter.mean().item()) < 5 * expected / parameter.numel() ** 0.5, name
        else:
            assert parameter.unique().tolist() == [1.0 if name.endswith(".w") else 0.0], name


def test_sizes_that_are_not_given_follow_from_d_model():
    config = Architecture(n_layers=1, d_model=12, n_heads=3).build(12, 14).cfg
    assert (config.d_head, config.d_mlp, config.d_vocab, config.n_ctx) == (4, 48, 12, 14)


def test_given_sizes_are_taken():
    config = (
        Architecture(n_layers=3, d_model=12, n_heads=5, d_head=7, d_mlp=9, activation="gelu")
        .build(6, 4)
        .cfg
    )
    assert (config.n_layers, config.n_heads, config.d_head, config.d_mlp, config.act_fn) == (
        3,
        5,
        7,
        9,
        "gelu",
    )


def test_an_attention_only_model_has_no_mlp():
    model = Architecture(n_layers=1, d_model=8, n_heads=2, attn_only=True).build(12, 14)
    assert not any("mlp" in name for name, _ in model.named_parameters())


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(
        ValidationError,
        match="d_model 10 is not a multiple of n_heads 4; change one of them, or give d_head",
    ):
        Architecture(d_model=10, n_heads=4)
    assert Architecture(d_model=10, n_heads=4, d_head=3).d_head == 3


def test_moving_to_where_it_is_gives_the_same_model(model):
    assert moved(model, torch.device("cpu")) is model
