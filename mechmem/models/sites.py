"""Sites: the named activations of a model, their TransformerLens hook names, axes and meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mechmem.spec.errors import InputError, suggest

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.config import HookedTransformerConfig


@dataclass(frozen=True)
class Site:
    """One kind of activation.

    `axes` are TransformerLens's words for the tensor's axes; `units` is the axis whose members can
    be picked one by one beside the position (heads, neurons), if there is one.
    """

    name: str
    template: str
    axes: tuple[str, ...]
    meaning: str
    in_mlp: bool = False

    @property
    def has_layer(self) -> bool:
        return "{layer}" in self.template

    def hook(self, layer: int | None) -> str:
        """The TransformerLens hook name at this layer."""
        return self.template.format(layer=layer)

    def axis(self, name: str) -> int:
        """Index of an axis; -1 where the site does not have it."""
        return self.axes.index(name) if name in self.axes else -1

    def shape(self, config: HookedTransformerConfig) -> tuple[str | int, ...]:
        """The activation's shape in a model; batch and positions by name."""
        sizes = {"head": config.n_heads, "d_vocab": config.d_vocab_out}
        return tuple(sizes.get(axis) or getattr(config, axis, axis) for axis in self.axes)


RESIDUAL = ("batch", "pos", "d_model")
HEADS = ("batch", "pos", "head", "d_head")

SITES = {
    site.name: site
    for site in (
        Site("embed", "hook_embed", RESIDUAL, "token embedding"),
        Site("pos_embed", "hook_pos_embed", RESIDUAL, "positional embedding"),
        Site(
            "resid_pre",
            "blocks.{layer}.hook_resid_pre",
            RESIDUAL,
            "residual stream before the layer",
        ),
        Site(
            "norm_attn",
            "blocks.{layer}.ln1.hook_normalized",
            RESIDUAL,
            "normalised input of attention, unscaled",
        ),
        Site("q", "blocks.{layer}.attn.hook_q", HEADS, "queries"),
        Site("k", "blocks.{layer}.attn.hook_k", HEADS, "keys"),
        Site("v", "blocks.{layer}.attn.hook_v", HEADS, "values"),
        Site(
            "pattern",
            "blocks.{layer}.attn.hook_pattern",
            ("batch", "head", "pos", "key_pos"),
            "attention weights",
        ),
        Site("z", "blocks.{layer}.attn.hook_z", HEADS, "each head's output before W_O"),
        Site(
            "attn_out",
            "blocks.{layer}.hook_attn_out",
            RESIDUAL,
            "what attention adds to the residual stream",
        ),
        Site(
            "norm_mlp",
            "blocks.{layer}.ln2.hook_normalized",
            RESIDUAL,
            "normalised input of the MLP, unscaled",
            True,
        ),
        Site(
            "mlp_pre",
            "blocks.{layer}.mlp.hook_pre",
            ("batch", "pos", "d_mlp"),
            "neurons before the activation",
            True,
        ),
        Site(
            "neurons",
            "blocks.{layer}.mlp.hook_post",
            ("batch", "pos", "d_mlp"),
            "neurons after the activation",
            True,
        ),
        Site(
            "mlp_out",
            "blocks.{layer}.hook_mlp_out",
            RESIDUAL,
            "what the MLP adds to the residual stream",
            True,
        ),
        Site(
            "resid_post",
            "blocks.{layer}.hook_resid_post",
            RESIDUAL,
            "residual stream after the layer",
        ),
        Site(
            "norm_final", "ln_final.hook_normalized", RESIDUAL, "normalised last residual, unscaled"
        ),
        Site("logits", "unembed.hook_out", ("batch", "pos", "d_vocab"), "logits"),
    )
}
READ_ONLY = {
    "norm_attn": "its hook fires three times a layer; patch `q`, `k` and `v`, or `resid_pre`"
}


def site(name: str) -> Site:
    """The site of this name. Raises InputError for an unknown one."""
    if name not in SITES:
        raise InputError(f"there is no site {name!r}; {suggest(name, SITES)}")
    return SITES[name]


def checked_hook(config: HookedTransformerConfig, name: str, layer: int | None) -> str:
    """The hook name of a site at a layer, if this model has it; else InputError with what is
    wrong."""
    found = site(name)
    if found.has_layer and layer is None:
        raise InputError(f"site {name!r} needs a layer, 0 to {config.n_layers - 1}")
    if not found.has_layer and layer is not None:
        raise InputError(f"site {name!r} has no layers; leave `layer` out")
    if layer is not None and not 0 <= layer < config.n_layers:
        raise InputError(
            f"layer {layer} is out of range: the model has layers 0 to {config.n_layers - 1}"
        )
    if found.in_mlp and config.attn_only:
        raise InputError(f"this model has no site {name!r}: it has no MLP")
    if name.startswith("norm_") and config.normalization_type is None:
        raise InputError(f"this model has no site {name!r}: it has no normalisation")
    return found.hook(layer)


def table(config: HookedTransformerConfig) -> pd.DataFrame:
    """Every site of a model, one row each: site, hook, layers, axes, shape, editable, meaning."""
    import pandas as pd

    rows = []
    for found in SITES.values():
        try:
            checked_hook(config, found.name, 0 if found.has_layer else None)
        except ValueError:
            continue
        rows.append(
            {
                "site": found.name,
                "hook": found.template,
                "layers": f"0..{config.n_layers - 1}" if found.has_layer else "",
                "axes": " ".join(found.axes),
                "shape": " x ".join(map(str, found.shape(config))),
                "editable": found.name not in READ_ONLY,
                "meaning": found.meaning,
            }
        )
    return pd.DataFrame(rows)


def on_axis(values: Tensor, axis: int, n_axes: int) -> Tensor:
    """A vector laid along one axis of a tensor with `n_axes` axes, for broadcasting."""
    shape = [1] * n_axes
    shape[axis] = len(values)
    return values.reshape(shape)
