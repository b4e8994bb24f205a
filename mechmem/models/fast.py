"""The same function as the model's forward, without its hook points: fast training, resumed and
edited forwards.

Reads the weights of the `HookedTransformer`. What makes it fast: queries, keys and values in one
product, attention through SDPA unless a pattern is looked at, the last layer at the positions that
are read out only, and a start at any layer from a known residual. The hook path is its oracle: same
logits, same edits, to 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechmem.models.architecture import Model
from mechmem.spec.errors import InputError

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}

SHORT = 32
"""Positions up to which attention is written out: for short sequences SDPA on a CPU takes longer
than two products."""


@dataclass(frozen=True)
class Edit:
    """A change of one activation: a pure tensor -> tensor function at one hook. Touches: that
    hook's whole tensor."""

    hook: str
    function: Callable[[Tensor], Tensor]

    @property
    def layer(self) -> int:
        """Layer of the hook; -1 for what comes before the first, a million for what comes after the
        last."""
        if self.hook.startswith("blocks."):
            return int(self.hook.split(".")[1])
        return -1 if self.hook in ("hook_embed", "hook_pos_embed") else 10**6


@dataclass
class _Taps:
    """Where the forward is edited or read."""

    edits: dict[str, list[Callable[[Tensor], Tensor]]]
    capture: frozenset[str]
    cache: dict[str, Tensor] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)

    def __call__(self, hook: str, activation: Tensor) -> Tensor:
        self.met.add(hook)
        for function in self.edits.get(hook, ()):
            activation = function(activation)
        if hook in self.capture:
            self.cache[hook] = activation
        return activation

    def touches(self, *prefixes: str) -> bool:
        return any(hook.startswith(prefixes) for hook in (*self.edits, *self.capture))

    def look_past_the_input_of(self, layer: int) -> bool:
        """Whether a hook is wanted whole that comes after the residual, keys and values which this
        layer reads."""
        at = f"blocks.{layer}."
        read = tuple(at + name for name in ("hook_resid_pre", "ln1.", "attn.hook_k", "attn.hook_v"))
        wanted = {*self.edits, *self.capture}
        return any(
            hook.startswith((at, "ln_final.", "unembed.")) and not hook.startswith(read)
            for hook in wanted
        )

    def check(self) -> None:
        """Raises InputError for a hook that was never met, at which an edit would silently do
        nothing."""
        if never := {*self.edits, *self.capture} - self.met:
            raise InputError(
                f"this model has no activation {sorted(never)[0]!r} that can be edited or read"
            )


def forward(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    n_readout: int,
    edits: Iterable[Edit] = (),
    capture: Collection[str] = (),
    start: tuple[int, Float[Tensor, "batch pos d_model"]] | None = None,
) -> tuple[Float[Tensor, "batch n_readout d_vocab"], dict[str, Tensor]]:
    """Logits at the last `n_readout` positions, and the activations at the `capture` hooks (after
    their edits).

    `start = (layer, resid_pre)` resumes at that layer. Edits and captures before it are refused.
    With `n_readout` 0 no logits are wanted, and the forward ends at the last layer that is
    captured. Raises InputError for an edit or capture at a hook that it does not come by.
    """
    functions: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    for edit in edits:
        functions.setdefault(edit.hook, []).append(edit.function)
    taps = _Taps(functions, frozenset(capture))
    config, first = model.cfg, 0 if start is None else start[0]
    if start is None:
        x = taps("hook_embed", F.embedding(tokens, model.embed.W_E))
        positions = model.pos_embed.W_pos[: tokens.shape[1]].expand(len(tokens), -1, -1)
        x = x + taps("hook_pos_embed", positions)
    else:
        x = start[1]
        early = ("hook_", *(f"blocks.{layer}." for layer in range(first)))
        if taps.touches(*early):
            raise ValueError(
                f"an edit or capture lies before layer {first}, at which the forward starts"
            )
    looked_at_late = taps.look_past_the_input_of(config.n_layers - 1)
    captured = [Edit(hook, lambda x: x).layer for hook in capture]
    end = config.n_layers if n_readout else min(config.n_layers, max(captured, default=-1) + 1)
    for layer in range(first, end):
        last = layer == config.n_layers - 1
        keep = n_readout if last and n_readout and not looked_at_late else x.shape[1]
        x = _block(model.blocks[layer], x, keep, taps, f"blocks.{layer}.")
    if not n_readout and max(captured, default=-1) < config.n_layers:
        taps.check()
        return x[:, :0], taps.cache
    x = _norm(getattr(model, "ln_final", torch.nn.Identity()), x, taps, "ln_final.")
    logits = taps("unembed.hook_out", F.linear(x, model.unembed.W_U.T, model.unembed.b_U))
    taps.check()
    return logits[:, logits.shape[1] - n_readout :], taps.cache


def _block(block: Any, x: Tensor, keep: int, taps: _Taps, at: str) -> Tensor:
    """One layer; only the last `keep` positions of it are computed and returned."""
    x = taps(at + "hook_resid_pre", x)
    attn_out = _attention(block.attn, _norm(block.ln1, x, taps, at + "ln1."), keep, taps, at)
    x = x[:, -keep:] + taps(at + "hook_attn_out", attn_out)
    if not block.cfg.attn_only:
        mlp, normed = block.mlp, _norm(block.ln2, x, taps, at + "ln2.")
        pre = taps(at + "mlp.hook_pre", F.linear(normed, mlp.W_in.T, mlp.b_in))
        post = taps(at + "mlp.hook_post", ACTIVATIONS[block.cfg.act_fn](pre))
        x = x + taps(at + "hook_mlp_out", F.linear(post, mlp.W_out.T, mlp.b_out))
    return taps(at + "hook_resid_post", x)


def _attention(attention: Any, x: Tensor, keep: int, taps: _Taps, at: str) -> Tensor:
    q, k, v = _queries_keys_values(attention, x)
    q = taps(at + "attn.hook_q", q[:, -keep:]).transpose(1, 2)
    k, v = (taps(at + f"attn.hook_{n}", t).transpose(1, 2) for n, t in (("k", k), ("v", v)))
    n, scale = x.shape[1], 1 / attention.attn_scale
    if n <= SHORT or taps.touches(at + "attn.hook_pattern"):
        hidden = ~torch.ones(keep, n, dtype=torch.bool, device=x.device).tril(n - keep)
        scores = ((q * scale) @ k.transpose(-1, -2)).masked_fill(hidden, -math.inf)
        z = taps(at + "attn.hook_pattern", scores.softmax(-1)) @ v
    elif keep == n:
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        visible = torch.ones(keep, n, dtype=torch.bool, device=x.device).tril(n - keep)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    z = taps(at + "attn.hook_z", z.transpose(1, 2))
    return F.linear(z.flatten(-2), attention.W_O.flatten(0, 1).T, attention.b_O)


def _queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each `batch pos head d_head`, from one product."""
    weight = torch.cat([attention.W_Q, attention.W_K, attention.W_V])  # (3 head) d_model d_head
    bias = torch.cat([attention.b_Q, attention.b_K, attention.b_V]).flatten()
    n_heads, d_head = attention.b_Q.shape
    joint = F.linear(x, weight.transpose(1, 2).flatten(0, 1), bias)
    q, k, v = joint.unflatten(-1, (3, n_heads, d_head)).unbind(-3)
    return q, k, v


def normed(norm: Any, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """What a norm of the model (layer norm, RMS norm or none) makes of a residual."""
    return _norm(norm, x, _Taps({}, frozenset()), "")


def _norm(norm: Any, x: Tensor, taps: _Taps, at: str) -> Tensor:
    if isinstance(norm, torch.nn.Identity):
        return x
    centred = hasattr(norm, "b")
    if not taps.touches(at) and centred:
        return F.layer_norm(x, x.shape[-1:], norm.w, norm.b, norm.eps)
    x = x - x.mean(-1, keepdim=True) if centred else x
    normed = taps(at + "hook_normalized", x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt())
    return normed * norm.w + norm.b if centred else normed * norm.w
