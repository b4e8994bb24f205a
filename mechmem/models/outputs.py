"""Outputs: what heads and neurons write into the residual stream."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.edits import At
from mechmem.spec.errors import InputError

OUTPUTS = {
    "neurons": ("mlp.hook_post", "hook_mlp_out"),
    "z": ("attn.hook_z", "hook_attn_out"),
}
"""For sites of units that write into the residual stream: their hook, and that of their sum."""


def output_of(hook: str) -> str:
    """The hook at which what these units write is summed.

    >>> output_of("blocks.1.attn.hook_z")
    'blocks.1.hook_attn_out'
    """
    units, output = OUTPUTS[sites.site(hook).name]
    return hook.replace(units, output)


def weights_out(
    model: Model, hook: str, units: tuple[int, ...] | None = None
) -> Float[Tensor, "width d_model"]:
    """The weights from units into the residual stream. Those of heads are flattened: one row per
    dimension of each head.

    Args:
        model: the model that has them.
        hook: of the neurons, or of z.
        units: which neurons or heads; by default, all.
    """
    block = model.blocks[At(hook).layer]
    is_head = sites.site(hook).name == "z"
    weights = (block.attn.W_O if is_head else block.mlp.W_out).detach()
    if units is not None:
        weights = weights[torch.tensor(units, device=weights.device, dtype=torch.long)]
    return weights.flatten(0, 1) if is_head else weights


def check_adds_up(model: Model) -> None:
    """Raises InputError for a model in which what units write does not add up."""
    if sites.normalises_outputs(model.cfg):
        raise InputError(
            "this model normalises the outputs of attention and MLP, so what its heads and neurons "
            "write does not add up"
        )
