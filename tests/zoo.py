"""Models of many architectures with random weights, and their runs through TransformerLens."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.config import HookedTransformerConfig

BASE: dict[str, Any] = {
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
ZOO: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "parallel": {"parallel_attn_mlp": True},
    "gated": {"gated_mlp": True, "act_fn": "silu"},
    "gated_rms": {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "alibi": {"positional_embedding_type": "alibi"},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 4},
    "rotary_half": {"positional_embedding_type": "rotary", "rotary_dim": 2},
    "scores_cap": {"attn_scores_soft_cap": 2.0},
    "logits_cap": {"output_logits_soft_cap": 3.0},
    "bidirectional": {"attention_dir": "bidirectional"},
    "local": {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"]},
    "qk_norm": {"use_qk_norm": True, "normalization_type": "RMS"},
    "post_norm": {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
    "grouped": {"n_key_value_heads": 2},
    "llama": {
        "n_key_value_heads": 2,
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "final_rms": True,
    },
    "ln_pre": {"normalization_type": "LNPre"},
    "rms": {"normalization_type": "RMS"},
    "rms_pre": {"normalization_type": "RMSPre"},
    "no_norm": {"normalization_type": None},
    "final_rms": {"final_rms": True},
    "gelu_new": {"act_fn": "gelu_new"},
    "solu_ln": {"act_fn": "solu_ln"},
    "attn_only": {"attn_only": True},
    "one_head": {"n_heads": 1, "d_head": 16},
    "wide_heads": {"d_head": 9},
    "unscaled": {"use_attn_scale": False},
    "by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "clipped": {"clip_qkv": 0.5},
    "sinks": {"use_attention_sinks": True},
    "embed_norm": {"post_embedding_ln": True},
    "olmo2": {"original_architecture": "Olmo2ForCausalLM", "normalization_type": "RMS"},
    "one_layer": {"n_layers": 1},
}
FAST = {
    *("plain", "gated", "gated_rms", "grouped", "ln_pre", "rms", "rms_pre", "no_norm"),
    *("final_rms", "gelu_new", "attn_only", "one_head", "wide_heads", "unscaled", "by_layer"),
    "one_layer",
}
"""Those that the backend `fast` must implement."""
CHOICES: Mapping[str, tuple[Any, ...]] = {
    "n_layers": (1, 2, 3),
    "d_head": (4, 6),
    "n_heads": (2, 4),
    "n_key_value_heads": (None, 1, 2),
    "d_mlp": (8, 24),
    "act_fn": ("relu", "gelu", "silu", "gelu_new", "gelu_fast", "solu", "solu_ln", "relu2"),
    "normalization_type": ("LN", "LNPre", "RMS", "RMSPre", None),
    "positional_embedding_type": ("standard", "standard", "rotary", "alibi", "shortformer"),
    "gated_mlp": (False, True),
    "parallel_attn_mlp": (False, False, True),
    "attn_only": (False, False, False, True),
    "attention_dir": ("causal", "causal", "bidirectional"),
    "use_local_attn": (False, False, True),
    "attn_scores_soft_cap": (-1.0, -1.0, 2.0),
    "output_logits_soft_cap": (-1.0, -1.0, 3.0),
    "use_qk_norm": (False, False, True),
    "use_normalization_before_and_after": (False, False, True),
    "final_rms": (False, True),
    "use_attn_scale": (True, False),
    "scale_attn_by_inverse_layer_idx": (False, True),
    "use_attn_result": (False, True),
    "use_split_qkv_input": (False, True),
    "use_hook_mlp_in": (False, True),
    "use_attn_in": (False, False, True),
    "ungroup_grouped_query_attention": (False, True),
    "use_attention_sinks": (False, False, True),
    "clip_qkv": (None, None, 0.5),
    "post_embedding_ln": (False, False, True),
}
"""Values of the fields of the config that the fuzz test combines."""


def build(fields: Mapping[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model of this config in which no parameter has a neutral value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = HookedTransformerConfig(**{**BASE, "dtype": dtype, **fields})
        model = HookedTransformer(config, move_to_device=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_weight = "W_" in name
            value = noise * (0.35 if is_weight else 0.3)
            parameter.copy_(value + (1 if name.endswith(".w") else 0))
    return model.eval().requires_grad_(False)


def drawn(seed: int) -> dict[str, Any]:
    """Fields of a random config."""
    choose = random.Random(seed)
    # Most fields keep their default, so that combinations of few unusual ones are frequent too.
    rate = choose.choice((0.15, 0.4, 1.0))
    fields = {"n_layers": 2, "use_local_attn": False, "attn_only": False}
    for name, values in CHOICES.items():
        if choose.random() < rate:
            fields[name] = choose.choice(values)
    if fields["use_local_attn"]:
        kinds = ["local", "global"]
        fields |= {
            "window_size": choose.choice((2, 5)),
            "attn_types": [choose.choice(kinds) for _ in range(fields["n_layers"])],
        }
    if fields["attn_only"]:
        fields["act_fn"] = None
    return fields


def hooked_logits(
    model: Any, tokens: Tensor, hooks: list[tuple[str, Callable[..., Tensor]]]
) -> Tensor:
    """TransformerLens's own run with hooks."""
    return model.run_with_hooks(tokens, fwd_hooks=hooks)


def close(found: Tensor, right: Tensor) -> None:
    """Equal to 1e-9 in float64 and to 1e-5 of the largest value in float32."""
    exact = right.dtype == torch.float64
    largest = float(right.abs().max()) if right.numel() else 1.0
    tolerance = 1e-9 * max(1.0, largest) if exact else 1e-5 * max(1e-3, largest)
    torch.testing.assert_close(found.to(right), right, atol=tolerance, rtol=0)
