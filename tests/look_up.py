"""Models that are look-ups by construction."""

from __future__ import annotations

import torch

from mechmem.models.architecture import Architecture, Model


def copying(sources: list[int]) -> Model:
    """A model whose i-th answer token is the token at the i-th of these positions, and hangs on
    nothing else."""
    model = Architecture(
        n_layers=1, d_model=26, n_heads=1, d_head=26, attn_only=True, norm=None
    ).build(12, 14, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, :12] = torch.eye(12)
        model.pos_embed.W_pos[:, 12:] = torch.eye(14)
        attention = model.blocks[0].attn
        for i, source in enumerate(sources):
            attention.W_Q[0, 12 + 9 + i, 12 + source] = 500
        attention.W_K[0] = torch.eye(26)
        attention.W_V[0, :12, :12] = torch.eye(12)
        attention.W_O[0] = 10 * torch.eye(26)
        model.unembed.W_U[:12] = torch.eye(12)
    return model
