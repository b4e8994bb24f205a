"""Sites: the named activations of a model, their TransformerLens hook names, axes and meaning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechmem.spec.errors import InputError, suggest

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.config import HookedTransformerConfig

    from mechmem.models.architecture import Model

RESIDUAL = ("batch", "pos", "d_model")
HEADS = ("batch", "pos", "head", "d_head")
KEY_HEADS = ("batch", "pos", "key_head", "d_head")
SCORES = ("batch", "head", "pos", "key_pos")
NEURONS = ("batch", "pos", "d_mlp")
UNITS = ("head", "key_head", "d_mlp")
"""Axes whose members can be chosen individually: heads, key and value heads, neurons."""


@dataclass(frozen=True)
class Site:
    """One kind of activation.

    `axes` names the axes of the tensor as TransformerLens does. The axis `key_head` has fewer
    members than `head` where grouped queries share keys and values.
    """

    name: str
    template: str
    axes: tuple[str, ...]
    meaning: str

    @property
    def has_layer(self) -> bool:
        return "{layer}" in self.template

    @property
    def units(self) -> str | None:
        """The axis of heads or neurons; None if the site has no such axis."""
        return next((axis for axis in self.axes if axis in UNITS), None)

    def hook(self, layer: int | None) -> str:
        """The TransformerLens hook name at this layer."""
        return self.template.format(layer=layer)

    def n_units(self, config: HookedTransformerConfig) -> int:
        """Number of heads or neurons; 0 where the site has none."""
        return 0 if self.units is None else int(self._sizes(config)[self.units] or 0)

    def shape(self, config: HookedTransformerConfig) -> tuple[str | int, ...]:
        """The activation's shape in a model; batch and positions by name."""
        sizes = self._sizes(config)
        return tuple(sizes.get(axis) or getattr(config, axis, axis) for axis in self.axes)

    @staticmethod
    def _sizes(config: HookedTransformerConfig) -> dict[str, Any]:
        grouped = config.n_key_value_heads is not None
        shared = grouped and not config.ungroup_grouped_query_attention
        return {
            "head": config.n_heads,
            "key_head": config.n_key_value_heads if shared else config.n_heads,
            "d_vocab": config.d_vocab_out,
            "d_mlp": config.d_mlp,
        }


SITES = {
    site.name: site
    for site in (
        Site("embed", "hook_embed", RESIDUAL, "token embedding"),
        Site("pos_embed", "hook_pos_embed", RESIDUAL, "positional embedding"),
        Site(
            "resid_pre", "blocks.{layer}.hook_resid_pre", RESIDUAL, "residual stream before a layer"
        ),
        Site(
            "norm_attn",
            "blocks.{layer}.ln1.hook_normalized",
            RESIDUAL,
            "normalised input of attention, unscaled",
        ),
        Site("q", "blocks.{layer}.attn.hook_q", HEADS, "queries"),
        Site("k", "blocks.{layer}.attn.hook_k", KEY_HEADS, "keys"),
        Site("v", "blocks.{layer}.attn.hook_v", KEY_HEADS, "values"),
        Site("rot_q", "blocks.{layer}.attn.hook_rot_q", HEADS, "queries, rotated by position"),
        Site("rot_k", "blocks.{layer}.attn.hook_rot_k", KEY_HEADS, "keys, rotated by position"),
        Site(
            "attn_scores",
            "blocks.{layer}.attn.hook_attn_scores",
            SCORES,
            "attention before the softmax, masked",
        ),
        Site("pattern", "blocks.{layer}.attn.hook_pattern", SCORES, "attention weights"),
        Site("z", "blocks.{layer}.attn.hook_z", HEADS, "each head's output before W_O"),
        Site(
            "attn_out",
            "blocks.{layer}.hook_attn_out",
            RESIDUAL,
            "output of attention, added to the residual stream",
        ),
        Site(
            "resid_mid",
            "blocks.{layer}.hook_resid_mid",
            RESIDUAL,
            "residual stream between attention and MLP",
        ),
        Site(
            "norm_mlp",
            "blocks.{layer}.ln2.hook_normalized",
            RESIDUAL,
            "normalised input of the MLP, unscaled",
        ),
        Site("mlp_pre", "blocks.{layer}.mlp.hook_pre", NEURONS, "neurons before the activation"),
        Site(
            "mlp_pre_linear",
            "blocks.{layer}.mlp.hook_pre_linear",
            NEURONS,
            "the linear factor of a gated MLP's neurons",
        ),
        Site("neurons", "blocks.{layer}.mlp.hook_post", NEURONS, "neurons after the activation"),
        Site(
            "mlp_out",
            "blocks.{layer}.hook_mlp_out",
            RESIDUAL,
            "output of the MLP, added to the residual stream",
        ),
        Site(
            "resid_post",
            "blocks.{layer}.hook_resid_post",
            RESIDUAL,
            "residual stream after a layer",
        ),
        Site(
            "norm_final", "ln_final.hook_normalized", RESIDUAL, "normalised last residual, unscaled"
        ),
        Site("logits", "unembed.hook_out", ("batch", "pos", "d_vocab"), "logits"),
    )
}
READ_ONLY = {
    "norm_attn": "its hook fires three times per layer; edit `q`, `k` and `v`, or `resid_pre`"
}


def site(name: str) -> Site:
    """The site of this name, or of a TransformerLens hook name. Raises InputError if unknown.

    >>> site("blocks.1.attn.hook_z").name
    'z'
    """
    if name in SITES:
        return SITES[name]
    template = re.sub(r"^blocks\.\d+\.", "blocks.{layer}.", name)
    for found in SITES.values():
        if found.template == template:
            return found
    raise InputError(f"there is no site {name!r}; {suggest(name, SITES)}")


def hook_of(model: Model, name: str, layer: int | None = None) -> str:
    """The hook name of a site at a layer of a model.

    Args:
        model: a HookedTransformer.
        name: a name of `SITES`, or a hook name such as `blocks.1.attn.hook_z`.
        layer: the layer; None for a site without layers, and for a hook name.

    Raises:
        InputError: if the model does not have the site.
    """
    hook = checked_hook(model.cfg, name, layer)
    if hook not in model.hook_dict:
        raise InputError(f"this model has no site {name!r}: the hook {hook} does not exist")
    return hook


def checked_hook(config: HookedTransformerConfig, name: str, layer: int | None) -> str:
    """The hook name of a site at a layer of any model with this config.

    Args:
        config: the config of the model.
        name: a name of `SITES`, or a hook name such as `blocks.1.attn.hook_z`.
        layer: the layer; None for a site without layers, and for a hook name.

    Raises:
        InputError: if such a model does not have the site, with the reason.
    """
    found, last = site(name), config.n_layers - 1
    if name not in SITES and found.has_layer:
        if layer is not None:
            raise InputError(f"{name!r} already names its layer; leave `layer` out")
        layer = int(name.split(".")[1])
    if found.has_layer and layer is None:
        raise InputError(f"site {name!r} needs a layer, 0 to {last}")
    if not found.has_layer and layer is not None:
        raise InputError(f"site {name!r} has no layers; leave `layer` out")
    if layer is not None and not 0 <= layer <= last:
        raise InputError(f"layer {layer} is out of range: the model has layers 0 to {last}")
    if reason := _absence(config, found.name):
        raise InputError(f"this model has no site {name!r}: {reason}")
    return found.hook(layer)


def _absence(config: HookedTransformerConfig, name: str) -> str | None:
    """The reason why a model with this config does not have the site; None if it does."""
    in_mlp = ("norm_mlp", "mlp_pre", "mlp_pre_linear", "neurons", "mlp_out", "resid_mid")
    if name in in_mlp and config.attn_only:
        return "it has no MLP"
    if name == "resid_mid" and config.parallel_attn_mlp:
        return "attention and MLP run in parallel"
    if name == "mlp_pre_linear" and not config.gated_mlp:
        return "its MLP is not gated"
    if name.startswith("norm_") and config.normalization_type is None:
        return "it has no normalisation"
    positions = config.positional_embedding_type
    if name.startswith("rot_") and positions != "rotary":
        return "its positions are not rotary"
    if name == "pos_embed" and positions in ("rotary", "alibi"):
        return f"its positions are {positions}, not embedded"
    return None


def normalises_outputs(config: HookedTransformerConfig) -> bool:
    """Whether the outputs of attention and MLP are normalised before they are added to the residual
    stream."""
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    post_norm = config.original_architecture in POST_NORM_ARCHITECTURES
    return config.use_normalization_before_and_after or post_norm


def table(model: Model | HookedTransformerConfig) -> pd.DataFrame:
    """Every site of a model, one row each: site, hook, layers, axes, shape, editable, meaning."""
    import pandas as pd

    config: Any = getattr(model, "cfg", model)
    rows = []
    for found in SITES.values():
        if _absence(config, found.name):
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
