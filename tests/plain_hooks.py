"""Runs by TransformerLens's own hooks alone: the oracle of everything that edits activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mechmem.data.examples import Examples

Hook = tuple[str, Callable[..., Any]]

SMALL: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "d_head": 4,
    "d_mlp": 24,
    "act_fn": "relu",
    "normalization_type": "LN",
    "d_vocab": 12,
    "n_ctx": 14,
    "device": "cpu",
    "init_weights": False,
}
LLAMA: dict[str, Any] = {
    "positional_embedding_type": "rotary",
    "rotary_dim": 4,
    "gated_mlp": True,
    "act_fn": "silu",
    "normalization_type": "RMS",
}
"""Rotary positions and a gated MLP, which give a model sites that ours do not have."""


def transformer(seed: int = 0, **fields: Any) -> Any:
    """A model of any config that reads sums, in which no parameter has a neutral value."""
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = HookedTransformerConfig(**{**SMALL, **fields})
        model = HookedTransformer(config, move_to_device=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith(".w")
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.3 * noise)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def logits_of(model: Any, examples: Examples, *hooks: Hook) -> Tensor:
    """Logits of the answer tokens."""
    logits = model.run_with_hooks(examples.tokens, fwd_hooks=[*hooks])
    return logits[:, logits.shape[1] - examples.n_answer :]


@torch.no_grad()
def activations_of(model: Any, examples: Examples, *hooks: Hook) -> dict[str, Tensor]:
    """All activations, after these hooks."""
    with model.hooks(fwd_hooks=[*hooks]):
        _, cache = model.run_with_cache(examples.tokens)
    return dict(cache)


def setting(hook: str, where: Any, value: Tensor | float) -> Hook:
    """A plain hook that sets a part of an activation.

    Args:
        hook: its name.
        where: what `activation[where]` is set.
        value: what it becomes; of the whole activation's shape, the same part of it.
    """

    def set_(activation: Tensor, hook: Any) -> Tensor:
        changed = activation.clone()
        changed[where] = value[where] if isinstance(value, Tensor) else value
        return changed

    return hook, set_


def close(found: Tensor, right: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to 1e-5, or to 1e-5 of the largest value where that is more than 1."""
    finite = right[right.isfinite()]
    largest = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    torch.testing.assert_close(found, right, atol=tolerance * largest, rtol=tolerance)
