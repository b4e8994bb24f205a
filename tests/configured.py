"""Models of configurations that `Architecture` does not make."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens.config import HookedTransformerConfig

from mechmem.models.architecture import Model, silenced_deprecation

GROUPED = {"n_heads": 4, "d_head": 4, "n_key_value_heads": 2}
GATED_RMS = {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"}
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8}
BIDIRECTIONAL = {"attention_dir": "bidirectional"}
CAPPED = {"output_logits_soft_cap": 3.0}


def configured(d_vocab: int, n_ctx: int, seed: int = 0, **fields: Any) -> Model:
    """A small model in which no parameter has a neutral value.

    Args:
        d_vocab: number of tokens.
        n_ctx: number of positions.
        seed: of the weights.
        fields: of TransformerLens's config, in place of those below.
    """
    small = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 24}
    small |= {"act_fn": "relu", "normalization_type": "LN", "device": "cpu"}
    config = HookedTransformerConfig(**(small | {"d_vocab": d_vocab, "n_ctx": n_ctx} | fields))
    with silenced_deprecation():
        model = HookedTransformer(config, move_to_device=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if name.endswith(".w") else 0.3 * noise)
    return model.eval()
