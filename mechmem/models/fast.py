"""The backend `fast`: the forward of the architectures that it knows, without hook points.

Reads the weights of the `HookedTransformer`. What makes it fast: queries, keys and values in one
product, attention through SDPA unless a pattern is looked at, the last layer at the positions that
are read out only, and a start at any layer from a known residual. It refuses every model whose
config, modules or hooks it does not implement; the backend `hooked` is its oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import isfunction
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from mechmem.models.architecture import Model
from mechmem.models.edits import Edit, layer_of
from mechmem.models.gradients import Gradients
from mechmem.models.hooked import Hooked
from mechmem.spec.errors import InputError

HANDLED: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("n_layers", "d_model", "d_head", "n_heads", "d_mlp", "d_vocab", "d_vocab_out", "n_ctx"),
        lambda value: True,
    ),
    **dict.fromkeys(
        ("attn_only", "gated_mlp", "eps", "n_key_value_heads", "final_rms"), lambda value: True
    ),
    **dict.fromkeys(
        ("use_attn_scale", "attn_scale", "scale_attn_by_inverse_layer_idx"), lambda value: True
    ),
    "normalization_type": lambda value: value in ("LN", "LNPre", "RMS", "RMSPre", None),
    "act_fn": lambda value: value in ("relu", "gelu", "silu", "gelu_new", "gelu_fast", "relu2"),
    "dtype": lambda value: value in (torch.float32, torch.float64),
    "positional_embedding_type": lambda value: value == "standard",
    "attention_dir": lambda value: value == "causal",
    # Other names switch special cases on: TransformerLens asks for them in its blocks.
    "original_architecture": lambda value: value in (None, "GPT2LMHeadModel"),
}
"""Fields of TransformerLens's config that this forward reads, and the values that it implements."""
DEFAULT = (
    *("use_qk_norm", "clip_qkv", "use_logn_attn", "use_dynamic_ntk_rope", "use_local_attn"),
    *("ungroup_grouped_query_attention", "n_devices", "parallel_attn_mlp", "post_embedding_ln"),
    *(
        "load_in_4bit",
        "quantization_method",
        "num_experts",
        "experts_per_token",
        "tie_word_embeddings",
    ),
    *("relative_attention_max_distance", "relative_attention_num_buckets"),
    *("use_normalization_before_and_after", "attn_scores_soft_cap", "output_logits_soft_cap"),
    *("use_NTK_by_parts_rope", "use_yarn_rope", "yarn_global_attn_only", "use_attention_sinks"),
    "norm_topk_prob",
)
"""Fields that must have their default values: this forward does not read them."""
IRRELEVANT = (
    *("model_name", "device", "init_mode", "init_weights", "initializer_range", "seed", "n_params"),
    *("from_checkpoint", "checkpoint_index", "checkpoint_label_type", "checkpoint_value"),
    *("tokenizer_name", "tokenizer_prepends_bos", "default_prepend_bos", "trust_remote_code"),
    *("decoder_start_token_id", "uses_rms_norm", "layer_norm_folding"),
    # They add hook points and change no number; the hook points themselves are refused.
    *(
        "use_attn_result",
        "use_split_qkv_input",
        "use_attn_in",
        "use_hook_mlp_in",
        "use_hook_tokens",
    ),
    # Read only with rotary or local attention, which are refused.
    *("window_size", "attn_types", "rotary_dim", "rotary_base", "rotary_base_local"),
    *("rotary_scaling_factor", "rotary_adjacent_pairs", "train_seq_length"),
    *("NTK_by_parts_low_freq_factor", "NTK_by_parts_high_freq_factor", "NTK_by_parts_factor"),
    *("NTK_original_ctx_len", "yarn_factor", "yarn_attention_factor", "yarn_beta_fast"),
    *("yarn_beta_slow", "yarn_original_max_position_embeddings", "yarn_truncate"),
)
"""Fields that no forward of the implemented architectures reads."""

MODULES = (
    *("HookedTransformer", "TypedModuleList", "TransformerBlock", "HookPoint", "Identity"),
    *("Embed", "PosEmbed", "Unembed", "Attention", "GroupedQueryAttention", "MLP", "GatedMLP"),
    *("LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"),
)
"""The classes of the modules that this forward stands for."""

SHORT = 32
"""Positions up to which attention is written out: for short sequences SDPA on a CPU takes longer
than two products."""


class Fast(Gradients):
    """Runs a model by `forward` below, or refuses."""

    name = "fast"

    def refusal(
        self, model: Model, hooks: Collection[str] = (), gradients: bool = False
    ) -> str | None:
        """Why this cannot be run here: what the config, the model or a hook asks for.

        Args:
            model: a HookedTransformer.
            hooks: names of the hooks that are edited or captured.
            gradients: whether gradients at these hooks are wanted.
        """
        return (
            refused_config(model.cfg)
            or _refused_modules(model)
            or next((f"it has no hook {hook}" for hook in hooks if not _is_tapped(hook)), None)
            or Hooked().refusal(model, hooks, gradients)
        )

    def resumes(self, model: Model) -> bool:
        """Whether a forward can start at a layer: always."""
        return True

    def run(
        self,
        model: Model,
        tokens: Int[Tensor, "batch pos"],
        rows: Int[Tensor, " batch"],
        readout: int,
        *,
        edits: Iterable[Edit] = (),
        capture: Collection[str] = (),
        resume: tuple[int, Float[Tensor, "batch pos d_model"]] | None = None,
    ) -> tuple[Float[Tensor, "batch readout d_vocab"], dict[str, Tensor]]:
        device = model.embed.W_E.device
        taps = Taps.of(edits, capture, rows)
        given = tokens.to(device) if resume is None else tokens
        return _forward(model, given, readout, taps, resume)


def refused_config(config: Any) -> str | None:
    """The first field of a config whose value is not implemented; None if all are."""
    for name, is_handled in HANDLED.items():
        if not is_handled(getattr(config, name)):
            return f"its config has {name} {getattr(config, name)!r}"
    for name, default in _defaults().items():
        if getattr(config, name) != default:
            return f"its config has {name} {getattr(config, name)!r}"
    known = {*HANDLED, *DEFAULT, *IRRELEVANT}
    unknown = [name for name in vars(config) if name not in known]
    return f"its config has the unknown field {unknown[0]!r}" if unknown else None


@cache
def _defaults() -> dict[str, Any]:
    from dataclasses import fields

    from transformer_lens.config import HookedTransformerConfig

    known = {field.name: field.default for field in fields(HookedTransformerConfig)}
    return {name: known[name] for name in DEFAULT}


@cache
def _activations() -> Mapping[str, Callable[[Tensor], Tensor]]:
    from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

    return SUPPORTED_ACTIVATIONS


def _refused_modules(model: Model) -> str | None:
    """A module that was replaced or changed, a hook of the user's, or an unusual dtype."""
    for name, module in model.named_modules():
        at = name or "the model"
        kind = type(module)
        if kind.__name__ not in MODULES or not kind.__module__.startswith(
            ("transformer_lens.", "torch.nn.modules.linear")
        ):
            return f"{at} is a {kind.__name__}, which was put in by the user"
        if kind.__name__ == "Identity" and not name.endswith(("ln1", "ln2", "ln_final")):
            return f"{at} is an Identity, which was put in by the user"
        config = getattr(module, "cfg", model.cfg)
        if config is not model.cfg and (reason := refused_config(config)):
            return f"{at} is of another model: {reason}"
        if replaced := replaced_methods(module):
            return f"{replaced[0]} of {at} was replaced"
        if has_hooks(module):
            return f"there are hooks at {at}"
        if (
            kind.__name__ in ("MLP", "GatedMLP")
            and module.act_fn is not (_activations()[model.cfg.act_fn])
        ):
            return f"the activation function of {at} was replaced"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        return f"its parameters are of {', '.join(sorted(map(str, dtypes)))}"
    if model.tokenizer is not None and model.tokenizer.padding_side == "left":
        return "its tokenizer pads on the left, so that it masks tokens"
    return None


def replaced_methods(module: torch.nn.Module) -> list[str]:
    """The methods of this very module that someone has replaced, such as its `forward`."""
    return sorted(vars(module).keys() & _methods(type(module)))


@cache
def _methods(kind: type) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if isfunction(getattr(kind, name)))


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether someone has added hooks to this very module, of torch or of TransformerLens."""
    kept = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(kept) or bool(module._backward_pre_hooks)


TAPPED = (
    *("hook_resid_pre", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v"),
    *("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "hook_attn_out"),
    *("hook_resid_mid", "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_pre_linear"),
    *("mlp.hook_post", "hook_mlp_out", "hook_resid_post"),
)
"""Hooks of a layer that the forward comes by."""
OUTSIDE = ("hook_embed", "hook_pos_embed", "ln_final.hook_normalized", "unembed.hook_out")
"""Hooks outside of the layers that it comes by."""


def _is_tapped(hook: str) -> bool:
    return hook in OUTSIDE or hook.split(".", 2)[-1] in TAPPED


@dataclass
class Taps:
    """Where the forward is edited or read."""

    edits: dict[str, list[Edit]]
    capture: frozenset[str]
    rows: Tensor
    cache: dict[str, Tensor] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, edits: Iterable[Edit], capture: Collection[str], rows: Tensor) -> Taps:
        """Taps for these edits, in their order, and captures.

        Args:
            edits: the edits.
            capture: names of hooks.
            rows: numbers of the rows that the forward reads.
        """
        at: dict[str, list[Edit]] = {}
        for edit in edits:
            at.setdefault(edit.hook, []).append(edit)
        return cls(at, frozenset(capture), rows)

    def __call__(self, hook: str, activation: Tensor) -> Tensor:
        self.met.add(hook)
        for edit in self.edits.get(hook, ()):
            activation = edit(activation, self.rows)
        if hook in self.capture:
            self.cache[hook] = activation
        return activation

    def touches(self, *prefixes: str) -> bool:
        """Whether a hook that begins like this is edited or captured."""
        return any(hook.startswith(prefixes) for hook in (*self.edits, *self.capture))

    def look_past_the_input_of(self, layer: int) -> bool:
        """Whether a hook is wanted whole that comes after what this layer reads."""
        at = f"blocks.{layer}."
        names = ("hook_resid_pre", "ln1.", "attn.hook_k", "attn.hook_v")
        read = tuple(at + name for name in names)
        wanted = {*self.edits, *self.capture}
        late = (at, "ln_final.", "unembed.")
        return any(hook.startswith(late) and not hook.startswith(read) for hook in wanted)

    def check(self) -> None:
        """Raises InputError for a hook that was never met: an edit there would do nothing."""
        if never := {*self.edits, *self.capture} - self.met:
            raise InputError(f"{sorted(never)[0]} never fires in this model")


def _forward(
    model: Model,
    tokens: Tensor,
    readout: int,
    taps: Taps,
    resume: tuple[int, Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    config, first = model.cfg, 0 if resume is None else resume[0]
    if resume is None:
        x = taps("hook_embed", F.embedding(tokens, model.embed.W_E))
        positions = model.pos_embed.W_pos[: tokens.shape[1]].expand(len(tokens), -1, -1)
        x = x + taps("hook_pos_embed", positions)
    else:
        x = resume[1]
        early = ("hook_", *(f"blocks.{layer}." for layer in range(first)))
        if taps.touches(*early):
            raise ValueError(f"an edit or capture lies before layer {first}, where it resumes")
    looked_at_late = taps.look_past_the_input_of(config.n_layers - 1)
    last_captured = max(map(layer_of, taps.capture), default=-1)
    end = config.n_layers if readout else min(config.n_layers, last_captured + 1)
    for layer in range(first, end):
        # The last layer is computed where it is read out only, unless something else looks at it.
        is_last = layer == config.n_layers - 1
        keep = readout if is_last and readout and not looked_at_late else x.shape[1]
        x = _block(model.blocks[layer], x, keep, taps, f"blocks.{layer}.")
    if not readout and last_captured < config.n_layers:
        taps.check()
        return x[:, :0], taps.cache
    x = _norm(getattr(model, "ln_final", torch.nn.Identity()), x, taps, "ln_final.")
    logits = taps("unembed.hook_out", F.linear(x, model.unembed.W_U.T, model.unembed.b_U))
    taps.check()
    return logits[:, logits.shape[1] - readout :], taps.cache


def _block(block: Any, x: Tensor, keep: int, taps: Taps, at: str) -> Tensor:
    """One layer; only the last `keep` positions of it are computed and returned."""
    x = taps(at + "hook_resid_pre", x)
    attn_out = _attention(block.attn, _norm(block.ln1, x, taps, at + "ln1."), keep, taps, at)
    x = x[:, -keep:] + taps(at + "hook_attn_out", attn_out)
    if not block.cfg.attn_only:
        x = taps(at + "hook_resid_mid", x)
        mlp_out = _mlp(block.mlp, _norm(block.ln2, x, taps, at + "ln2."), taps, at + "mlp.")
        x = x + taps(at + "hook_mlp_out", mlp_out)
    return taps(at + "hook_resid_post", x)


def _mlp(mlp: Any, x: Tensor, taps: Taps, at: str) -> Tensor:
    if mlp.cfg.gated_mlp:
        pre = taps(at + "hook_pre", F.linear(x, mlp.W_gate.T))
        linear = taps(at + "hook_pre_linear", F.linear(x, mlp.W_in.T))
        post = mlp.act_fn(pre) * linear + mlp.b_in
    else:
        post = mlp.act_fn(taps(at + "hook_pre", F.linear(x, mlp.W_in.T, mlp.b_in)))
    return F.linear(taps(at + "hook_post", post), mlp.W_out.T, mlp.b_out)


def _attention(attention: Any, x: Tensor, keep: int, taps: Taps, at: str) -> Tensor:
    q, k, v = _queries_keys_values(attention, x)
    q = taps(at + "attn.hook_q", q[:, -keep:])
    k, v = (taps(at + f"attn.hook_{name}", t) for name, t in (("k", k), ("v", v)))
    n_queries = q.shape[2] // k.shape[2]
    if n_queries > 1:  # each key and value head serves several query heads, one after the other
        shared = "batch pos head d_head -> batch pos (head query) d_head"
        k, v = (repeat(t, shared, query=n_queries) for t in (k, v))
    q, k, v = (rearrange(t, "batch pos head d_head -> batch head pos d_head") for t in (q, k, v))
    n, scale = x.shape[1], 1 / attention.attn_scale
    scores, pattern = at + "attn.hook_attn_scores", at + "attn.hook_pattern"
    if n <= SHORT or taps.touches(scores, pattern):
        hidden = ~torch.ones(keep, n, dtype=torch.bool, device=x.device).tril(n - keep)
        found = ((q * scale) @ k.transpose(-1, -2)).masked_fill(hidden, -math.inf)
        found = taps(scores, found).softmax(-1)
        if taps.touches(scores):  # a row of which nothing may be seen: TransformerLens sees nothing
            found = found.nan_to_num(0.0)
        z = taps(pattern, found) @ v
    elif keep == n:
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        visible = torch.ones(keep, n, dtype=torch.bool, device=x.device).tril(n - keep)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    z = taps(at + "attn.hook_z", rearrange(z, "batch head pos d_head -> batch pos head d_head"))
    return F.linear(z.flatten(-2), attention.W_O.flatten(0, 1).T, attention.b_O)


def _queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each `batch pos head d_head`, from one product."""
    if attention.cfg.n_key_value_heads is None:
        of = {"K": attention.W_K, "V": attention.W_V}, {"K": attention.b_K, "V": attention.b_V}
    else:  # the properties W_K, b_K ... repeat the weights for every query head
        of = {"K": attention._W_K, "V": attention._W_V}, {"K": attention._b_K, "V": attention._b_V}
    weights = [attention.W_Q, of[0]["K"], of[0]["V"]]
    weight = rearrange(torch.cat(weights), "head d_model d_head -> (head d_head) d_model")
    bias = torch.cat([attention.b_Q, of[1]["K"], of[1]["V"]]).flatten()
    joint = F.linear(x, weight, bias).unflatten(-1, (-1, attention.cfg.d_head))
    q, k, v = joint.split([len(w) for w in weights], dim=-2)
    return q, k, v


def _norm(norm: Any, x: Tensor, taps: Taps, at: str) -> Tensor:
    """Layer norm or RMS norm, with its weights or with weights that were folded away, or none."""
    if isinstance(norm, torch.nn.Identity):
        return x
    centred = type(norm).__name__.startswith("LayerNorm")
    weight, bias = getattr(norm, "w", None), getattr(norm, "b", None)
    if centred and not taps.touches(at):
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    x = x - x.mean(-1, keepdim=True) if centred else x
    x = taps(at + "hook_normalized", x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt())
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def normed(norm: Any, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """What a norm of the model makes of a residual."""
    return _norm(norm, x, Taps({}, frozenset(), torch.empty(0, dtype=torch.long)), "")


def mlp_of(block: Any, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """What the MLP of a layer makes of its normalised input."""
    return _mlp(block.mlp, x, Taps({}, frozenset(), torch.empty(0, dtype=torch.long)), "")


def plain_logits(
    model: Model, tokens: Int[Tensor, "batch pos"], readout: int
) -> Float[Tensor, "batch readout d_vocab"]:
    """Logits at the last `readout` positions, for training: no edits, no captures.

    Args:
        model: a model of `Architecture`, which this forward implements.
        tokens: what it reads.
        readout: number of positions at the end.
    """
    taps = Taps({}, frozenset(), torch.empty(0, dtype=torch.long))
    return _forward(model, tokens, readout, taps, None)[0]
