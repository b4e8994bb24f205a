"""SwapWeights: replace a component's weights by those of another checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, field_validator, model_validator

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import Intervention, Stage
from mechmem.interventions.patch import Source
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit, replacing
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.selection import Indices, distinct
from mechmem.spec.sweep import Each, Swept

Part = Literal["embed", "attn", "mlp", "unembed"]
Parts = Annotated[tuple[Part, ...], AfterValidator(distinct)]
PREFIXES = {"embed": ("embed.", "pos_embed."), "unembed": ("unembed.", "ln_final.")}
"""Prefixes of the names of the parameters outside the layers, by component."""
IN_LAYERS = {"attn": ("attn.", "ln1.", "ln1_post."), "mlp": ("mlp.", "ln2.", "ln2_post.")}
"""Prefixes of the names of a layer's parameters, by component."""
OUTPUTS = {"attn": "hook_attn_out", "mlp": "hook_mlp_out"}
"""Hook of the output of each component of a layer."""
NO_NUMBERS = (
    *("model_name", "device", "seed", "init_mode", "init_weights", "initializer_range", "n_params"),
    *("from_checkpoint", "checkpoint_index", "checkpoint_label_type", "checkpoint_value"),
    *("tokenizer_name", "tokenizer_prepends_bos", "default_prepend_bos", "trust_remote_code"),
    *("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"),
)
"""Fields of a config in which two models of the same architecture may differ."""


class SwapWeights(Intervention):
    """Runs a component with another checkpoint's weights, on its own inputs in the edited run.

    If the weights from before memorisation restore the true answers, the memory was in these
    weights. A patch of the same output would also restore information lost in the component's
    *inputs*. `attn` and `mlp` include the norms before them, `embed` is token and position
    embeddings, and `unembed` includes the final norm. Swapping all components gives the other
    model. The derived model shares all other parameters with the original.
    Touches: no activation directly.
    Raises: InputError for models of different architectures, a source that is not a checkpoint, or
    a layer that does not exist.
    Source: ours.
    """

    by_example: ClassVar[bool] = True

    component: Swept[Part | Parts]
    """The component, or several: `embed`, `attn`, `mlp`, `unembed`."""
    layer: Swept[Indices | None] = None
    """Layers of `attn` and `mlp`; by default, every layer."""
    source: Source
    """The other checkpoint, by name; from Python, the other model may be passed directly."""

    @field_validator("source", mode="before")
    @classmethod
    def _live(cls, value: Any) -> Any:
        return Source(live=value) if isinstance(value, torch.nn.Module) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        source = self.source
        live = isinstance(source.live, Examples)
        if source.pair or source.examples or source.mean_over or live:
            raise InputError(
                "weights must come from a checkpoint: write only `source: {checkpoint: ...}`"
            )
        if isinstance(self.component, Each) or self.layer is None:
            return self
        if not IN_LAYERS.keys() & set(self._parts):
            raise InputError(f"{' and '.join(self._parts)} have no layers; leave `layer` out")
        return self

    @property
    def _parts(self) -> tuple[str, ...]:
        return self.component if isinstance(self.component, tuple) else (self.component,)

    def edits(self, session: Session, model: Model, examples: Examples) -> list[Edit]:
        return []

    def derive(self, session: Session, model: Model) -> Model:
        other = self.source.model_of(session, model)
        prefixes = self._prefixes(model)

        def make() -> Model:
            return _swapped(model, other, prefixes)

        _check_alike(model, other)
        return session.cached(("swapped", model, other, prefixes), make)

    def stages(self, session: Session, model: Model, examples: Examples) -> list[Stage]:
        """One stage per swapped component, which replaces its output, given the edits of the
        components before it.

        Args:
            session: as in `edits`.
            model: the unedited model.
            examples: as in `edits`.
        """

        def stage(alone: SwapWeights, hook: str, earlier: Sequence[Edit]) -> list[Edit]:
            changed = alone.derive(session, model)
            found = session.edited_activations(changed, examples, earlier, [hook])
            return [replacing(At(hook), found[hook])]

        return [partial(stage, alone, hook) for alone, hook in self.outputs(model)]

    def outputs(self, model: Model) -> Iterator[tuple[SwapWeights, str]]:
        """Each swapped component by itself, with the hook of its output, in the order of the
        forward pass."""
        copies = {part: self.model_copy(update={"component": part}) for part in self._parts}
        if "embed" in copies:
            copies["embed"] = copies["embed"].model_copy(update={"layer": None})
            yield copies["embed"], "hook_embed"
            if "hook_pos_embed" in model.hook_dict:
                yield copies["embed"], "hook_pos_embed"
        for layer in self._layers(model):
            for part, hook in OUTPUTS.items():
                if part in copies:
                    alone = copies[part].model_copy(update={"layer": layer})
                    yield alone, f"blocks.{layer}.{hook}"
        if "unembed" in copies:
            yield copies["unembed"].model_copy(update={"layer": None}), "unembed.hook_out"

    def _layers(self, model: Model) -> tuple[int, ...]:
        n = model.cfg.n_layers
        if "mlp" in self._parts and model.cfg.attn_only:
            raise InputError("this model has no MLP whose weights could be swapped; choose `attn`")
        if self.layer is None:
            return tuple(range(n))
        chosen = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        if wrong := [layer for layer in chosen if not 0 <= layer < n]:
            raise InputError(f"layer {wrong[0]} is out of range: the model has layers 0 to {n - 1}")
        return tuple(sorted(chosen))

    def _prefixes(self, model: Model) -> tuple[str, ...]:
        """The prefixes of the names of the swapped parameters."""
        found = [name for part in self._parts for name in PREFIXES.get(part, ())]
        for layer in self._layers(model):
            for part in self._parts:
                found += [f"blocks.{layer}.{name}" for name in IN_LAYERS.get(part, ())]
        return tuple(found)


def _swapped(model: Model, other: Model, prefixes: tuple[str, ...]) -> Model:
    """A copy of the model that shares its parameters, except for those of the other model."""
    theirs = dict(other.named_parameters())
    shared = {
        id(parameter): theirs[name] if name.startswith(prefixes) else parameter
        for name, parameter in model.named_parameters()
    }
    # For an object in this dictionary, deepcopy uses the value instead of a copy.
    return copy.deepcopy(model, shared)


def _check_alike(model: Model, other: Model) -> None:
    def outline(of: Model) -> tuple[Any, ...]:
        shapes = {name: parameter.shape for name, parameter in of.named_parameters()}
        config = {name: value for name, value in vars(of.cfg).items() if name not in NO_NUMBERS}
        return config, shapes

    if outline(model) != outline(other):
        raise InputError("weights can only be swapped between models of the same architecture")
