"""Layer norm between convolutions, with gradients in the order in memory that each operation is fast in.

transformers computes convolution [B, C, T] -> transposed -> layer norm -> transposed back -> activation. So the
activation sees a transposed view; its gradient comes from the next convolution untransposed, and an elementwise kernel
that is given two orders at once walks through memory number by number: GELU's backward took 25 ms where it takes 1 ms
on equal ones (43 s of audio, 64 channels, one CPU core). Forward is untouched; backward is vectorised now, which
rounds otherwise in the last bit.
"""

from typing import Any

import torch
from torch import nn


class _OrderedGradient(torch.autograd.Function):
    """Passes [B, C, T] through, and gives its gradient the order of a transposed [B, T, C]."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.transpose(1, 2).contiguous().transpose(1, 2)  # layer norm's backward would copy it anyway


class ActivationBehindNorm(nn.Module):
    """An elementwise activation of [B, C, T] that is a transposed view of a layer norm's output."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The activated tensor."""
        activated: torch.Tensor = _OrderedGradient.apply(self.activation(hidden))  # type: ignore[no-untyped-call]
        return activated


def order_gradients(feature_encoder: nn.Module) -> None:
    """Give every convolution with a layer norm behind it such an activation; others are left as they are."""
    for layer in getattr(feature_encoder, "conv_layers", ()):
        if isinstance(getattr(layer, "layer_norm", None), nn.LayerNorm):
            layer.activation = ActivationBehindNorm(layer.activation)
