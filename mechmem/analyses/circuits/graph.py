"""Graph: the nodes of a transformer and the edges through its residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechmem.models.architecture import Model


class Node(NamedTuple):
    """One end of an edge. Sources are of kind embed, head or mlp; targets are of kind q, k, v, mlp
    or logits (the last residual)."""

    name: str
    kind: str
    layer: int
    """Layer of the node; -1 for embed, the number of layers for logits."""


@dataclass(frozen=True)
class Graph:
    """Which sources write to the residual stream, which targets read it, and in which order.

    With L layers of H heads there are 1 + L(H + 1) sources: the embedding, each head's result and
    each MLP's output. There are L(3H + 1) + 1 targets: each head's query, key and value input, each
    MLP's input and the last residual. Without MLPs, there is one source and one target fewer per
    layer. An edge runs from each source to every later target.
    Source: arXiv:2310.10348.
    """

    n_layers: int
    n_heads: int
    n_key_heads: int
    """Number of key and value heads; fewer than `n_heads` where grouped queries share them."""
    has_mlp: bool

    @classmethod
    def of(cls, model: Model) -> Graph:
        config = model.cfg
        return cls(
            int(config.n_layers),
            int(config.n_heads),
            int(config.n_key_value_heads or config.n_heads),
            not config.attn_only,
        )

    @property
    def is_grouped(self) -> bool:
        return self.n_key_heads < self.n_heads

    @cached_property
    def sources(self) -> tuple[Node, ...]:
        """`embed`, `a0.h0` ..., `m0`, `a1.h0` ...: the order of the rows of every edge matrix."""
        nodes = [Node("embed", "embed", -1)]
        for layer in range(self.n_layers):
            nodes += [Node(f"a{layer}.h{head}", "head", layer) for head in range(self.n_heads)]
            nodes += [Node(f"m{layer}", "mlp", layer)] if self.has_mlp else []
        return tuple(nodes)

    @cached_property
    def targets(self) -> tuple[Node, ...]:
        """`a0.h0.q` ..., `a0.h0.k` ..., `a0.h0.v` ..., `m0`, ..., `logits`: the order of the
        columns."""
        nodes = []
        sizes = {"q": self.n_heads, "k": self.n_key_heads, "v": self.n_key_heads}
        for layer in range(self.n_layers):
            for kind, size in sizes.items():
                nodes += [Node(f"a{layer}.h{head}.{kind}", kind, layer) for head in range(size)]
            nodes += [Node(f"m{layer}", "mlp", layer)] if self.has_mlp else []
        return (*nodes, Node("logits", "logits", self.n_layers))

    @property
    def per_layer(self) -> int:
        """Number of sources per layer."""
        return self.n_heads + self.has_mlp

    def qkv(self, layer: int) -> slice:
        """Columns of a layer's query, key and value inputs."""
        size = self.n_heads + 2 * self.n_key_heads
        start = layer * (size + self.has_mlp)
        return slice(start, start + size)

    def mlp(self, layer: int) -> slice:
        """Column of a layer's MLP input."""
        stop = self.qkv(layer).stop
        return slice(stop, stop + 1)

    @property
    def last(self) -> slice:
        """Column of the last residual."""
        return slice(len(self.targets) - 1, len(self.targets))

    def groups(self) -> Iterator[tuple[int, slice, int]]:
        """(layer, columns, number of sources read) for each group of targets that read the residual
        stream at the same point, in order."""
        for layer in range(self.n_layers):
            known = 1 + layer * self.per_layer
            yield layer, self.qkv(layer), known
            if self.has_mlp:
                yield layer, self.mlp(layer), known + self.n_heads
        yield self.n_layers, self.last, len(self.sources)

    @cached_property
    def exists(self) -> Bool[Tensor, "source target"]:
        """True where there is an edge."""
        exists = torch.zeros(len(self.sources), len(self.targets), dtype=torch.bool)
        for _, columns, known in self.groups():
            exists[:known, columns] = True
        return exists

    @property
    def n_edges(self) -> int:
        return int(self.exists.sum())

    @cached_property
    def owner(self) -> Int[Tensor, " target"]:
        """Row of the source node that each target belongs to; one past the last row for
        `logits`."""
        rows = {node.name: i for i, node in enumerate(self.sources)} | {"logits": len(self.sources)}
        return torch.tensor([rows[self._owner_name(node)] for node in self.targets])

    @cached_property
    def feeds(self) -> Bool[Tensor, "target node"]:
        """Which nodes use each target as an input: shared keys and values serve several heads."""
        feeds = torch.zeros(len(self.targets), len(self.sources) + 1, dtype=torch.bool)
        for t, node in enumerate(self.targets):
            first = int(self.owner[t])
            n_nodes = self.n_heads // self.n_key_heads if node.kind in ("k", "v") else 1
            feeds[t, first : first + n_nodes] = True
        return feeds

    def _owner_name(self, node: Node) -> str:
        if node.kind not in ("k", "v") or self.n_key_heads == self.n_heads:
            return node.name.rpartition(".")[0] if node.kind in "qkv" else node.name
        # Shared keys and values belong to the first head that reads them.
        key_head = int(node.name.split(".")[1][1:])
        return f"a{node.layer}.h{key_head * (self.n_heads // self.n_key_heads)}"

    def top(self, scores: Float[Tensor, "source target"], n: int) -> Bool[Tensor, "source target"]:
        """The n edges with the largest absolute score."""
        chosen = torch.zeros(self.n_edges, dtype=torch.bool)
        chosen[scores[self.exists].abs().argsort(descending=True, stable=True)[:n]] = True
        return self._laid_out(chosen)

    def drawn(self, n: int, generator: torch.Generator) -> Bool[Tensor, "source target"]:
        """n random edges."""
        chosen = torch.zeros(self.n_edges, dtype=torch.bool)
        chosen[torch.randperm(self.n_edges, generator=generator)[:n]] = True
        return self._laid_out(chosen)

    def head_permuted(
        self, edges: Bool[Tensor, "*circuit source target"], generator: torch.Generator
    ) -> Bool[Tensor, "*circuit source target"]:
        """The same edges with the heads of each layer permuted at random, together with their
        inputs and results. Heads that share keys and values stay together."""
        rows, columns = torch.arange(len(self.sources)), torch.arange(len(self.targets))
        n_shared = self.n_heads // self.n_key_heads
        for layer in range(self.n_layers):
            keys = torch.randperm(self.n_key_heads, generator=generator)
            heads, first = keys, 1 + layer * self.per_layer
            if n_shared > 1:
                within = torch.randperm(n_shared, generator=generator)
                heads = (keys[:, None] * n_shared + within).flatten()
            rows[first : first + self.n_heads] = first + heads
            inputs = self.qkv(layer)
            sizes = [self.n_heads, self.n_key_heads, self.n_key_heads]
            q, k, v = columns[inputs].split(sizes)
            columns[inputs] = torch.cat([q[heads], k[keys], v[keys]])
        return edges[..., rows, :][..., columns]

    def _laid_out(self, chosen: Bool[Tensor, " edges"]) -> Bool[Tensor, "source target"]:
        return torch.zeros_like(self.exists).masked_scatter(self.exists, chosen)

    def connected(
        self, edges: Bool[Tensor, "*circuit source target"]
    ) -> Bool[Tensor, "*circuit source target"]:
        """The edges on a path from the embedding to the last residual; the others change no
        output."""
        edges, n = edges & self.exists, len(self.sources)
        reached = torch.zeros(*edges.shape[:-2], n + 1, dtype=torch.bool)
        useful = torch.zeros_like(reached)
        reached[..., 0] = useful[..., n] = True
        for node in range(1, n):
            into = edges[..., self.feeds[:, node]]
            reached[..., node] = (into & reached[..., :n, None]).any(dim=(-2, -1))
        for node in reversed(range(n)):
            useful[..., node] = (edges[..., node, :] & self._read_by(useful)).any(dim=-1)
        return edges & reached[..., :n, None] & self._read_by(useful)[..., None, :]

    def _read_by(self, nodes: Bool[Tensor, "*circuit node"]) -> Bool[Tensor, "*circuit target"]:
        """The targets that are an input of one of these nodes."""
        return (self.feeds & nodes[..., None, :]).any(dim=-1)

    def nodes(
        self, edges: Bool[Tensor, "*circuit source target"]
    ) -> Bool[Tensor, "*circuit source"]:
        """The heads and MLPs at either end of an edge, without the embedding and the last residual,
        which all circuits share."""
        n = len(self.sources)
        is_owner = self.owner[:, None] == torch.arange(n)  # target source
        reads = (edges.any(dim=-2)[..., None] & is_owner).any(dim=-2)
        return (edges.any(dim=-1) | reads) & (torch.arange(n) > 0)
