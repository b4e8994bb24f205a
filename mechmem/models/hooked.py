"""The backend `hooked`: TransformerLens's own forward and hooks, right for every
HookedTransformer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mechmem.models.architecture import Model
from mechmem.models.edits import Edit, layer_of
from mechmem.models.gradients import Gradients
from mechmem.spec.errors import InputError, suggest

SWITCHES = {
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}
"""Hooks that exist in every model and fire only where this field of the config is on."""
MANY = ("ln1.hook_normalized", "ln1.hook_scale")
"""Hooks that fire three times in a layer: for queries, keys and values."""


class Hooked(Gradients):
    """Runs a model as TransformerLens does, with the user's own hooks in force."""

    name = "hooked"

    def refusal(
        self, model: Model, hooks: Collection[str] = (), gradients: bool = False
    ) -> str | None:
        """Why this cannot be run here: a hook that the model lacks, or that never fires in it.

        Args:
            model: a HookedTransformer.
            hooks: names of the hooks that are edited or captured.
            gradients: whether gradients at these hooks are wanted.
        """
        for hook in hooks:
            if hook not in model.hook_dict:
                return f"this model has no hook {hook!r}; {suggest(hook, model.hook_dict)}"
            for name, switch in SWITCHES.items():
                if hook.endswith(name) and not getattr(model.cfg, switch):
                    return f"{hook} never fires in this model: set `model.cfg.{switch} = True`"
            if hook == "hook_pos_embed" and model.cfg.positional_embedding_type == "alibi":
                return "hook_pos_embed never fires in this model: alibi has no embedded positions"
            if gradients and hook.endswith(MANY):
                return f"{hook} fires three times a layer, so it has no gradient of its own"
        return None

    def resumes(self, model: Model) -> bool:
        """Whether a forward can start at a layer: the residual must be all that a layer reads."""
        shortformer = model.cfg.positional_embedding_type == "shortformer"
        padded = model.tokenizer is not None and model.tokenizer.padding_side == "left"
        return not shortformer and not padded

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
        edits = list(edits)
        wanted = [*(edit.hook for edit in edits), *capture]
        if reason := self.refusal(model, wanted):
            raise InputError(reason)
        fired: Counter[str] = Counter()
        cache: dict[str, Tensor] = {}
        hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = []
        hooks += [(edit.hook, edit_hook(edit, rows, fired)) for edit in edits]
        hooks += [(name, _capture_hook(cache, name)) for name in dict.fromkeys(capture)]
        start: dict[str, Any] = {} if resume is None else {"start_at_layer": resume[0]}
        # Without logits the layers after the last captured one are left out.
        if not readout and (last := max(map(layer_of, capture), default=-1)) < model.cfg.n_layers:
            start["stop_at_layer"] = max(last + 1, start.get("start_at_layer", 0))
        device = next(model.parameters()).device
        given = tokens.to(device) if resume is None else resume[1]
        with model.hooks(fwd_hooks=hooks):
            logits = model(given, **start)
        for name in dict.fromkeys(wanted):
            if not fired[name] and name not in cache:
                raise InputError(f"{name} never fires in this model, so it can't be edited or read")
        if not readout:
            return logits[:, :0], cache
        return logits[:, logits.shape[1] - readout :], cache


def edit_hook(edit: Edit, rows: Tensor, fired: Counter[Any], key: Any = None) -> Callable[..., Any]:
    """The edit as a hook function, counting how often it fires.

    Args:
        edit: the edit.
        rows: numbers of the rows that the forward reads.
        fired: counts, by `key` or else by the edit's hook.
        key: what it is counted under.
    """

    def hook_function(activation: Tensor, hook: Any) -> Tensor:
        fired[edit.hook if key is None else key] += 1
        return edit(activation, rows)

    return hook_function


def _capture_hook(cache: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook_function(activation: Tensor, hook: Any) -> None:
        cache[name] = activation

    return hook_function
