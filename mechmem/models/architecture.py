"""Architecture: the only constructor of models, which are all `HookedTransformer`s."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator

from mechmem.spec.registry import Component
from mechmem.spec.sweep import Each, Swept

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer as Model
else:
    Model = torch.nn.Module


class Architecture(Component):
    """The shape of a decoder-only transformer with learnt absolute positions."""

    n_layers: Swept[PositiveInt] = 2
    """Number of layers."""
    d_model: Swept[PositiveInt] = 128
    """Width of the residual stream."""
    n_heads: Swept[PositiveInt] = 4
    """Number of attention heads per layer."""
    d_head: Swept[PositiveInt | None] = None
    """Size of a head; by default, d_model / n_heads."""
    d_mlp: Swept[PositiveInt | None] = None
    """Number of neurons per layer; by default, 4 d_model."""
    attn_only: Swept[bool] = False
    """Whether to leave out the MLPs."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Activation function of the MLPs."""
    norm: Literal["layer_norm", "rms_norm"] | None = "layer_norm"
    """Normalisation before attention, before the MLP and at the end; null for none."""
    init_std: float | None = Field(None, gt=0)
    """Standard deviation of the initial weights; by default, 0.8 / sqrt(d_model)."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        swept = isinstance(self.d_model, Each) or isinstance(self.n_heads, Each)
        if not swept and self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; change one "
                "of them, or give d_head"
            )
        return self

    def build(self, d_vocab: int, n_context: int, seed: int = 0) -> Model:
        """A freshly initialised `HookedTransformer` on the CPU. The global random state is not
        changed.

        Args:
            d_vocab: number of tokens.
            n_context: largest number of input positions.
            seed: seed of the initial weights.
        """
        from transformer_lens import HookedTransformer
        from transformer_lens.config import HookedTransformerConfig

        with silenced_deprecation():
            model = HookedTransformer(
                HookedTransformerConfig(
                    n_layers=self.n_layers,
                    d_model=self.d_model,
                    n_heads=self.n_heads,
                    d_head=self.d_head or self.d_model // self.n_heads,
                    d_mlp=None if self.attn_only else self.d_mlp or 4 * self.d_model,
                    attn_only=self.attn_only,
                    act_fn="relu" if self.attn_only else self.activation,
                    normalization_type={"layer_norm": "LN", "rms_norm": "RMS", None: None}[
                        self.norm
                    ],
                    d_vocab=d_vocab,
                    n_ctx=n_context,
                    init_weights=False,
                    device="cpu",
                ),
                move_to_device=False,
            )
        generator, std = (
            torch.Generator().manual_seed(seed),
            self.init_std or 0.8 / self.d_model**0.5,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".W_" in name:
                    parameter.normal_(std=std, generator=generator)
                else:
                    parameter.fill_(1.0 if name.endswith(".w") else 0.0)
        return model.eval()


@contextmanager
def silenced_deprecation() -> Generator[None, None, None]:
    """Silences the warning that HookedTransformer will be removed in version 4.0: this package
    requires an earlier version, and uses only sites that exist in both."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="HookedTransformer is deprecated", category=DeprecationWarning
        )
        yield


def moved(model: Model, device: torch.device) -> Model:
    """The model on a device, without the message that TransformerLens prints."""
    return model if device.type == "cpu" else model.to(device, print_details=False)
