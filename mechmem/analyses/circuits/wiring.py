"""Wiring: a forward pass in which each edge of the computational graph carries its clean or its
corrupted value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechmem.analyses.circuits.graph import Graph
from mechmem.models.architecture import Model
from mechmem.models.backend import FAST
from mechmem.models.fast import mlp_of, normed
from mechmem.spec.errors import InputError

Sources = Float[Tensor, "source batch pos d_model"]
Values = Float[Tensor, "source circuit batch pos d_model"]


def check_implemented(model: Model) -> None:
    """Raises InputError for a model whose forward pass this file does not reproduce."""
    if reason := FAST.refusal(model):
        raise InputError(
            f"circuits are implemented only for models that the backend `fast` supports: {reason}"
        )


def source_hooks(graph: Graph) -> list[str]:
    """The hooks from whose activations the values of the sources are computed."""
    names = ["attn.hook_z", *(["hook_mlp_out"] if graph.has_mlp else [])]
    return [
        "hook_embed",
        "hook_pos_embed",
        *(f"blocks.{i}.{name}" for i in range(graph.n_layers) for name in names),
    ]


def source_values(model: Model, activations: Mapping[str, Tensor]) -> Sources:
    """The vectors that each source adds to the residual stream; a head's result is z W_O plus an
    equal share of b_O."""
    values = [(activations["hook_embed"] + activations["hook_pos_embed"])[None]]
    for i, block in enumerate(model.blocks):
        z = activations[f"blocks.{i}.attn.hook_z"]
        results = _results(
            block.attn, rearrange(z, "batch pos head d_head -> head (batch pos) d_head")
        )
        values.append(results.unflatten(1, z.shape[:2]))
        if not model.cfg.attn_only:
            values.append(activations[f"blocks.{i}.hook_mlp_out"][None])
    return torch.cat(values)


@dataclass(frozen=True)
class Wiring:
    """A model in which each target reads the sum of its own edges, and any edge may carry its
    corrupted value.

    Only the sources' corrupted values are used: every intermediate node computes its output from
    its own edges. With `patterns` (one tensor per layer, `batch head pos key_pos`) attention is
    fixed, and effects pass through values only. Only for models that pass `check_implemented`.
    """

    model: Model
    corrupted: Sources
    """Values of the sources in the corrupted run, or their mean over a set (batch 1)."""
    n_readout: int
    patterns: Sequence[Tensor] | None = None

    @cached_property
    def graph(self) -> Graph:
        return Graph.of(self.model)

    def logits(
        self,
        known: Float[Tensor, "known batch pos d_model"],
        edges: Float[Tensor, "circuit source target"] | None = None,
        inputs: list[Tensor] | None = None,
    ) -> Float[Tensor, "circuit batch n_readout d_vocab"]:
        """Logits of every circuit at the last `n_readout` positions.

        Args:
            known: clean values of the first sources: the embedding, and all sources of zero or more
                layers; they are not computed again.
            edges: the circuits: 1 for an edge in the circuit, 0 for a corrupted one; by default,
                the full model.
            inputs: a list that receives the inputs of each group of targets, `target circuit batch
                pos d_model`.
        """
        model = self.model
        values = known[:, None].expand(-1, 1 if edges is None else len(edges), -1, -1, -1)
        for layer in range((len(known) - 1) // self.graph.per_layer, self.graph.n_layers):
            values = self._after_layer(values, layer, edges, inputs)
        values = values[..., -self.n_readout :, :]
        x = normed(
            getattr(model, "ln_final", torch.nn.Identity()),
            self._read(values, self.graph.last, edges, inputs),
        )
        return x[0] @ model.unembed.W_U + model.unembed.b_U

    def _after_layer(
        self, values: Values, layer: int, edges: Tensor | None, inputs: list[Tensor] | None
    ) -> Tensor:
        block: Any = self.model.blocks[layer]
        keep = self.n_readout if layer == self.graph.n_layers - 1 else values.shape[-2]
        x = normed(block.ln1, self._read(values, self.graph.qkv(layer), edges, inputs))
        heads = self._heads(
            block.attn, x, keep, None if self.patterns is None else self.patterns[layer]
        )
        values = torch.cat([values[..., -keep:, :], heads])
        if not self.graph.has_mlp:
            return values
        x = normed(block.ln2, self._read(values, self.graph.mlp(layer), edges, inputs))
        return torch.cat([values, mlp_of(block, x)])

    def _read(
        self, values: Values, targets: slice, edges: Tensor | None, inputs: list[Tensor] | None
    ) -> Tensor:
        """The input of each target: the sum of its edges, `target circuit batch pos d_model`."""
        if edges is None:
            x = values.sum(0).expand(targets.stop - targets.start, *values.shape[1:])
        else:
            corrupted = self.corrupted[: len(values), None, :, -values.shape[-2] :]
            chosen = edges[:, : len(values), targets]
            mixed = einsum(
                values - corrupted,
                chosen,
                "source circuit batch pos d_model, circuit source target "
                "-> target circuit batch pos d_model",
            )
            x = mixed + corrupted.sum(0)
        if inputs is not None:
            inputs.append(x)
        return x

    def _heads(self, attention: Any, x: Tensor, keep: int, pattern: Tensor | None) -> Tensor:
        """The result of each head at the last `keep` positions, from its own query, key and value
        inputs."""
        key, value = ("_W_K", "_W_V") if self.graph.is_grouped else ("W_K", "W_V")
        weights = [getattr(attention, name) for name in ("W_Q", key, value)]
        biases = [getattr(attention, name.replace("W", "b")) for name in ("W_Q", key, value)]
        inputs = x.split([len(weight) for weight in weights])
        q, k, v = (_projected(*part) for part in zip(inputs, weights, biases, strict=True))
        n_shared = len(q) // len(k)
        k, v = (t.repeat_interleave(n_shared, dim=0) if n_shared > 1 else t for t in (k, v))
        if pattern is None:
            n_keys = k.shape[-2]
            visible = torch.ones(keep, n_keys, dtype=torch.bool, device=x.device)
            visible = visible.tril(n_keys - keep)
            q, k, v = (t.flatten(1, 2) for t in (q[..., -keep:, :], k, v))
            scale = 1 / attention.attn_scale
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        else:
            z = (pattern.transpose(0, 1)[:, None, :, -keep:] @ v).flatten(1, 2)
        found = _results(attention, z.flatten(1, 2))
        return found.unflatten(1, (*x.shape[1:3], keep))


def _projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`head circuit batch pos d_head`."""
    rows = rearrange(x, "head circuit batch pos d_model -> head (circuit batch pos) d_model")
    return (rows @ weight + bias[:, None]).unflatten(1, x.shape[1:4])


def _results(
    attention: Any, z: Float[Tensor, "head rows d_head"]
) -> Float[Tensor, "head rows d_model"]:
    return z @ attention.W_O + attention.b_O / len(attention.W_O)
