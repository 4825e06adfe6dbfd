"""Gradients behind layer norms between convolutions: the same values, in an order that kernels are fast in."""

import pytest
import torch
from tiny import batch_of, model, no_dropout
from torch import nn

from asr_train.conv_layout import ActivationBehindNorm
from asr_train.data.batch import input_values


class Recording(nn.GELU):
    """GELU that keeps the gradient that it is given."""

    gradient = None

    def forward(self, hidden):
        def keep(gradient):
            self.gradient = gradient

        activated = super().forward(hidden)
        activated.register_hook(keep)
        return activated


def test_the_gradient_has_the_order_of_the_norm_and_the_values_that_it_had():
    recording = Recording()
    normed = torch.randn(2, 50, 8, dtype=torch.float64, requires_grad=True)  # [B, T, C]
    gradient = torch.randn(2, 8, 50, dtype=torch.float64)
    ActivationBehindNorm(recording)(normed.transpose(1, 2)).backward(gradient)
    assert torch.equal(recording.gradient, gradient)
    assert recording.gradient.transpose(1, 2).is_contiguous()
    (expected,) = torch.autograd.grad(nn.functional.gelu(normed.transpose(1, 2)), normed, gradient)
    torch.testing.assert_close(normed.grad, expected)


@pytest.mark.parametrize("architecture", ["wav2vec2", "hubert", "wavlm", "unispeech-sat", "data2vec-audio"])
def test_a_model_computes_what_transformers_computes(architecture):
    ours = model(architecture, no_dropout())
    theirs = model(architecture, no_dropout())
    for layer in theirs.hf.base_model.feature_extractor.conv_layers:
        assert isinstance(layer.activation, ActivationBehindNorm)
        layer.activation = layer.activation.activation
    batch = batch_of([4000, 3200], ours.batch_settings)
    for each in (ours, theirs):
        each(input_values(batch), batch.num_samples).square().sum().backward()
    logits = [each(input_values(batch), batch.num_samples) for each in (ours, theirs)]
    assert torch.equal(*logits)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5 * float(other.grad.abs().max()))


def test_a_group_norm_is_left_as_it_is():
    layers = model("wav2vec2", {"feat_extract_norm": "group"}).hf.base_model.feature_extractor.conv_layers
    assert not any(isinstance(layer.activation, ActivationBehindNorm) for layer in layers)
