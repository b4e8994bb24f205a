"""Architecture: the only constructor of models, which are all `HookedTransformer`s."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator

from mechmem.spec.errors import InputError
from mechmem.spec.limits import Heads, Layers, Width
from mechmem.spec.registry import Component
from mechmem.spec.sweep import Each, Swept

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer as Model
else:
    Model = torch.nn.Module


class Architecture(Component):
    """The shape of a decoder-only transformer with learnt absolute positions."""

    n_layers: Swept[Layers] = 2
    """Number of layers."""
    d_model: Swept[Width] = 128
    """Width of the residual stream."""
    n_heads: Swept[Heads] = 4
    """Number of attention heads per layer."""
    d_head: Swept[Width | None] = None
    """Size of a head; by default, d_model / n_heads."""
    d_mlp: Swept[Width | None] = None
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

    def n_parameters(self, d_vocab: int, n_context: int) -> int:
        """Number of parameters of a model, without biases and norms.

        Args:
            d_vocab: number of tokens.
            n_context: largest number of input positions.
        """
        d_head = self.d_head or self.d_model // self.n_heads
        attention = 4 * self.d_model * self.n_heads * d_head
        mlp = 0 if self.attn_only else 2 * self.d_model * (self.d_mlp or 4 * self.d_model)
        embeddings = self.d_model * (2 * d_vocab + n_context)
        return self.n_layers * (attention + mlp) + embeddings

    def check_memory(self, d_vocab: int, n_context: int, copies: int = 1) -> None:
        """Raises InputError for a model that does not fit into the memory of this machine.

        Args:
            d_vocab: number of tokens.
            n_context: largest number of input positions.
            copies: how many numbers are kept of each parameter: four while it is trained.
        """
        needed, there = 4 * copies * self.n_parameters(d_vocab, n_context), physical_memory()
        if needed > there:
            what = "a model of this architecture" if copies == 1 else "training this architecture"
            raise InputError(
                f"{what} needs {needed / 1e9:,.0f} GB, this machine has {there / 1e9:,.0f} GB; "
                "choose a smaller d_model, d_mlp or n_layers"
            )

    def build(self, d_vocab: int, n_context: int, seed: int = 0) -> Model:
        """A freshly initialised `HookedTransformer` on the CPU. The global random state is not
        changed.

        Args:
            d_vocab: number of tokens.
            n_context: largest number of input positions.
            seed: seed of the initial weights.

        Raises:
            InputError: the weights need more memory than this machine has.
        """
        self.check_memory(d_vocab, n_context)
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


def physical_memory() -> int:
    """The memory of this machine in bytes; where that is unknown, 1 TB."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 10**12


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
