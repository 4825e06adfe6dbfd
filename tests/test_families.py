"""Every family that is taken: forward, backward, what padding does to it, and how transformers itself computes it."""

import copy

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, batch_of, model, no_dropout
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCTC

from asr_train.data.batch import input_values
from asr_train.loss import ctc_losses
from asr_train.model import PADDING_SENSITIVE_OVER, TAKEN, padding_difference
from asr_train.optim import is_head

torch.set_num_threads(1)

CHANCE = {"model": {"layerdrop": 0.5}, "spec_augment": {"time_prob": 0.4, "time_length": 4, "feature_prob": 0.2}}
VARIANTS = {
    "wav2vec2 pre-norm": ("wav2vec2", {"do_stable_layer_norm": True}),
    "wav2vec2 with attention adapters": ("wav2vec2", {"do_stable_layer_norm": True, "adapter_attn_dim": 4}),
    "hubert pre-norm": ("hubert", {"do_stable_layer_norm": True}),
    "hubert batch norm": ("hubert", {"conv_pos_batch_norm": True}),
    "wavlm pre-norm": ("wavlm", {"do_stable_layer_norm": True}),
    "unispeech-sat pre-norm": ("unispeech-sat", {"do_stable_layer_norm": True}),
    "conformer rotary": ("wav2vec2-conformer", {"position_embeddings_type": "rotary"}),
}
CASES = {name: (name, {}) for name in TAKEN} | VARIANTS


def backward(speech, batch, *, chance: bool):
    choices = (batch.time_mask, batch.feature_mask, batch.keep_layers) if chance else ()
    logits = speech(input_values(batch), batch.num_samples, *choices)
    losses, infinite = ctc_losses(logits, batch.num_frames, batch.labels, batch.num_labels, VOCABULARY.blank_id)
    assert not infinite.any()
    losses.mean().backward()
    return logits


@pytest.mark.parametrize("case", CASES)
def test_every_trained_parameter_gets_a_gradient(case):
    architecture, config = CASES[case]
    speech = model(architecture, config, **CHANCE)
    batch = batch_of([16000, 9000], speech.batch_settings, 1)
    assert batch.keep_layers is not None
    trained = {name: parameter for name, parameter in speech.named_parameters() if parameter.requires_grad}
    for chance in (True, False):
        for frozen in (True, False):
            speech.zero_grad()
            speech.transformer_frozen = frozen
            logits = backward(speech, batch, chance=chance)
            assert logits.shape[0] == 2
            assert logits.shape[1] >= int(batch.num_frames.max())
            assert [name for name, parameter in trained.items() if parameter.grad is None] == []
            assert all(torch.isfinite(parameter.grad).all() for parameter in trained.values())
            moved = {name for name, parameter in trained.items() if (parameter.grad != 0).any()}
            if frozen:
                assert moved == {name for name in trained if is_head(name)}
            elif not chance:  # but for the mask vector, and the tails of attention that softmax does not feel
                still = {name for name in set(trained) - moved if "k_proj.bias" not in name and "key_proj" not in name}
                assert still <= {f"hf.{speech.hf.base_model_prefix}.masked_spec_embed"}


def ddp_steps(architecture: str, config: dict) -> int:
    torch.distributed.init_process_group("gloo")
    speech = model(architecture, config, **CHANCE)
    wrapped = DistributedDataParallel(speech)
    batch = batch_of([16000, 9000], speech.batch_settings, 1)
    for frozen in (True, False, False):  # DDP raises in a forward when a parameter had no gradient before
        speech.transformer_frozen = frozen
        wrapped(input_values(batch), batch.num_samples, batch.time_mask, batch.feature_mask, batch.keep_layers)[
            :, :, 0
        ].sum().backward()
    return 3


@pytest.mark.parametrize("case", TAKEN)
def test_ddp_takes_every_family(case):
    assert run_ranks(2, ddp_steps, *CASES[case]) == [3, 3]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    architecture, config = CASES[case]
    speech = model(architecture, config).eval()
    peer = AutoModelForCTC.from_config(copy.deepcopy(speech.hf.config), attn_implementation="eager").eval()
    peer.load_state_dict(speech.hf.state_dict())
    batch = batch_of([16000, 9000, 12345], speech.batch_settings)
    waveforms = input_values(batch)
    valid = (torch.arange(16000) < batch.num_samples[:, None]).long()
    with torch.no_grad():
        found = speech(waveforms, batch.num_samples)
        expected = peer(waveforms, attention_mask=valid).logits
    frames = torch.arange(found.shape[1]) < batch.num_frames[:, None]
    assert torch.allclose(found[frames], expected[frames], atol=1e-6)


@pytest.mark.parametrize("architecture", TAKEN)
def test_dropped_layers_are_skipped_as_transformers_skips_them(architecture):
    """Drop all that transformers may drop: its own training mode with layerdrop 1 does the same."""
    known = model(architecture).hf.config
    config = {name: 0.0 for name in (*no_dropout(), "conformer_conv_dropout") if hasattr(known, name)}
    if hasattr(known, "layerdrop"):
        config["layerdrop"] = 1.0
    speech = model(architecture, config)
    peer = AutoModelForCTC.from_config(copy.deepcopy(speech.hf.config), attn_implementation="eager").train()
    peer.load_state_dict(speech.hf.state_dict())
    for module in peer.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    batch = batch_of([16000], speech.batch_settings)
    waveforms = input_values(batch)
    # transformers drops no layer of sew-d; with all kept they agree
    keep = torch.full((speech.num_layers,), architecture == "sew-d")
    with torch.no_grad():
        found = speech(waveforms, batch.num_samples, keep_layers=keep)
        expected = peer(waveforms, attention_mask=torch.ones(1, 16000, dtype=torch.long)).logits
    assert torch.allclose(found, expected, atol=1e-6)
    if architecture != "sew-d":
        everything = speech(waveforms, batch.num_samples)
        assert not torch.allclose(found, everything, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_what_padding_does_is_measured(case):
    architecture, config = CASES[case]
    speech = model(architecture, config)
    first, again = padding_difference(speech), padding_difference(speech)
    assert first == again
    assert speech.training
    sensitive = architecture in ("data2vec-audio", "wav2vec2-conformer")
    assert (first > PADDING_SENSITIVE_OVER) == sensitive


@pytest.mark.parametrize("architecture", ["wav2vec2", "hubert", "sew"])
def test_group_norm_models_take_no_mask_and_are_padding_sensitive(architecture):
    speech = model(architecture, {"feat_extract_norm": "group"})
    assert not speech.takes_attention_mask
    assert padding_difference(speech) > PADDING_SENSITIVE_OVER
    batch = batch_of([16000, 9000], speech.batch_settings)
    waveforms = input_values(batch)
    speech.eval()
    with torch.no_grad():
        expected = speech.hf(waveforms).logits
        assert torch.equal(speech(waveforms, batch.num_samples), expected)


def test_batch_norm_keeps_its_stored_statistics_in_training():
    speech = model("wav2vec2-conformer", no_dropout(conformer_conv_dropout=0.0))
    norms = [module for module in speech.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    assert norms
    before = [norm.running_mean.clone() for norm in norms]
    batch = batch_of([16000, 9000], speech.batch_settings)
    speech.train()
    trained = backward(speech, batch, chance=False).detach()
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert torch.allclose(trained, speech.eval()(input_values(batch), batch.num_samples), atol=1e-6)
    assert norms[0].weight.grad.abs().sum() > 0


def test_wavlm_keeps_its_first_layer():
    speech = model("wavlm", no_dropout())
    batch = batch_of([16000], speech.batch_settings)
    waveforms = input_values(batch)
    found = [
        speech(waveforms, batch.num_samples, keep_layers=torch.tensor([first, True])).detach().numpy()
        for first in (True, False)
    ]
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("architecture", TAKEN)
@pytest.mark.parametrize("lengths", [[100], [719], [100, 1500]])
def test_waveforms_too_short_for_a_frame_give_numbers(architecture, lengths):
    speech = model(architecture, **CHANCE)
    batch = batch_of(lengths, speech.batch_settings, 1)
    logits = speech(input_values(batch), batch.num_samples, batch.time_mask, batch.feature_mask, batch.keep_layers)
    assert torch.isfinite(logits).all()
    assert logits.shape[1] >= int(batch.num_frames.max())


@pytest.mark.parametrize("architecture", [name for name in TAKEN if name != "sew-d"])  # mixes devices by itself
def test_forward_and_backward_never_wait_for_the_device(architecture):
    """On the meta device there are no values: whatever asks for one, a stall on a GPU, raises."""
    speech = model(architecture, **CHANCE)
    batch = batch_of([16000, 9000], speech.batch_settings, 1).to("meta")
    speech = speech.to("meta")
    logits = speech(input_values(batch), batch.num_samples, batch.time_mask, batch.feature_mask, batch.keep_layers)
    logits.sum().backward()
    assert logits.shape == (2, 49, VOCABULARY.size)
