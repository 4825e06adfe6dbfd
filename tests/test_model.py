"""The model as it is trained: what belongs to the unit, what is frozen, where weights come from, who is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, Utterances, batch_of, model, no_dropout, recipe, unit
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoModelForCTC

from asr_train.data.batch import input_values, make_batch
from asr_train.data.text import Vocabulary
from asr_train.errors import ModelError
from asr_train.loss import ctc_losses
from asr_train.model import build_model, load_exported
from asr_train.model_config import build_processor, feature_extractor
from asr_train.optim import is_head
from asr_train.recipe import decode_recipe

torch.set_num_threads(1)

LENGTHS = [16000, 9000, 12000, 7000, 14000, 8000]


def run(speech, batch, num_utterances=None, dtype=torch.float32):
    """Forward, and backward of the unit's share of the step's loss."""
    logits = speech(
        input_values(batch).to(dtype), batch.num_samples, batch.time_mask, batch.feature_mask, batch.keep_layers
    )
    losses, _ = ctc_losses(logits, batch.num_frames, batch.labels, batch.num_labels, VOCABULARY.blank_id)
    loss = losses.sum() / (num_utterances or len(losses))
    loss.backward()
    return loss.detach()


def gradients(speech):
    """All gradients as one vector; every trained parameter must have one."""
    trained = [parameter for parameter in speech.parameters() if parameter.requires_grad]
    return torch.cat([parameter.grad.flatten() for parameter in trained])


# --- a step is the sum of its units ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [1], [4, 2]], [[0, 1, 2], [3, 4, 5]]])
def test_any_split_into_units_gives_the_gradients_of_one_batch(dtype, tolerance, split):
    config = no_dropout(do_stable_layer_norm=True)
    utterances = Utterances(LENGTHS)
    speech = model(config=config).to(dtype)
    settings = speech.batch_settings
    whole_loss = run(speech, make_batch(utterances, unit(list(range(6)), 16000), settings, None), dtype=dtype)
    whole = gradients(speech)
    speech.zero_grad()
    loss = torch.zeros((), dtype=dtype)
    for ids in split:
        padded = max(LENGTHS[i] for i in ids) + 320 * len(ids)  # every unit is padded in its own way
        loss += run(speech, make_batch(utterances, unit(ids, padded), settings, None), len(LENGTHS), dtype)
    assert loss.item() == pytest.approx(whole_loss.item(), rel=tolerance)
    assert ((gradients(speech) - whole).norm() / whole.norm()).item() < tolerance


# --- masks and dropped layers ---


def test_masked_frames_and_channels_are_what_the_encoder_sees():
    speech = model(spec_augment={"time_prob": 0.3, "feature_prob": 0.3}, config=no_dropout())
    seen = {}
    base = speech.hf.base_model
    base.encoder.register_forward_pre_hook(lambda module, args: seen.update(input=args[0].detach().clone()))
    batch = batch_of([16000, 12000], speech.batch_settings, 4)
    speech(input_values(batch), batch.num_samples)
    clean = seen["input"]
    time, feature = batch.time_mask, batch.feature_mask
    speech(input_values(batch), batch.num_samples, time, feature)
    expected = torch.where(time[:, :, None], base.masked_spec_embed.detach(), clean)
    expected = torch.where(feature[:, None, :], 0.0, expected)
    valid = torch.arange(49) < batch.num_frames[:, None]
    assert time.any()
    assert feature.any()
    assert torch.equal(seen["input"][valid], expected[valid])


def test_a_dropped_layer_is_skipped_as_transformers_skips_it():
    speech = model(config=no_dropout(num_hidden_layers=4))
    batch = batch_of([16000, 12000], speech.batch_settings)
    waveforms = input_values(batch)
    keep = torch.tensor([True, False, True, False])
    found = speech(waveforms, batch.num_samples, keep_layers=keep)
    layers = speech.hf.base_model.encoder.layers
    speech.hf.base_model.encoder.layers = nn.ModuleList([layers[0], layers[2]])
    expected = speech(waveforms, batch.num_samples)
    assert torch.equal(found, expected)


def test_dropped_layers_get_a_gradient_of_zeros():
    speech = model(config=no_dropout())
    batch = batch_of([16000], speech.batch_settings)
    run(speech, replace(batch, keep_layers=torch.tensor([False, True])))
    first, second = speech.hf.base_model.encoder.layers
    assert all((parameter.grad == 0).all() for parameter in first.parameters())
    assert all((parameter.grad != 0).any() for parameter in second.feed_forward.parameters())


def test_transformers_draws_nothing_itself():
    speech = model(config=no_dropout(layerdrop=0.9, mask_time_prob=0.9))
    batch = batch_of([16000], speech.batch_settings)
    waveforms = input_values(batch)
    state = np.random.get_state()[1].tolist()
    outputs = [speech(waveforms, batch.num_samples) for _ in range(5)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert np.random.get_state()[1].tolist() == state
    assert speech.batch_settings.layerdrop == 0.9
    assert speech.batch_settings.masks.time_prob == 0.9
    assert speech.hf.config.layerdrop == 0.9  # an export keeps what the model was trained with


def test_the_recipe_goes_before_the_model_in_masks_and_layerdrop():
    settings = model(
        model={"layerdrop": 0.2}, spec_augment={"time_prob": 0.65, "time_length": 7}, config={"mask_time_prob": 0.0}
    ).batch_settings
    assert settings.layerdrop == 0.2
    assert (settings.masks.time_prob, settings.masks.time_length) == (0.65, 7)
    assert settings.masks.time_min_masks == 2  # the model's own
    off = model(config={"apply_spec_augment": False, "mask_time_prob": 0.5}).batch_settings
    assert off.masks.time_prob == 0


# --- units without padding ---


FAMILIES = ["wav2vec2", "hubert", "wavlm", "unispeech-sat", "sew", "data2vec-audio", "wav2vec2-conformer"]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_padding_the_mask_is_left_out_and_changes_nothing(architecture, attention):
    speech = model(architecture, no_dropout(), model={"attention": attention}).eval()
    batch = batch_of([16000, 15990, 16000], speech.batch_settings)
    assert not batch.is_padded
    waveforms = input_values(batch)
    masked = speech(waveforms, batch.num_samples)
    free = speech(waveforms, batch.num_samples, is_padded=batch.is_padded)
    assert (free - masked).abs().max() <= 1e-6 * masked.abs().max()


def test_without_padding_gradients_are_those_with_the_mask():
    speech = model(config=no_dropout(do_stable_layer_norm=True)).double()
    batch = batch_of([16000, 15990, 16000], speech.batch_settings, 3)
    run(speech, batch, dtype=torch.float64)
    masked = gradients(speech)
    speech.zero_grad()
    logits = speech(
        input_values(batch).double(), batch.num_samples, batch.time_mask, batch.feature_mask, is_padded=False
    )
    losses, _ = ctc_losses(logits, batch.num_frames, batch.labels, batch.num_labels, VOCABULARY.blank_id)
    losses.mean().backward()
    assert ((gradients(speech) - masked).norm() / masked.norm()).item() < 1e-12


def test_padded_frames_do_change_an_utterance_without_the_mask():
    """Why the mask is left out only where no frame at all is padded, and not where few are."""
    speech = model(config=no_dropout(do_stable_layer_norm=True)).eval()
    batch = batch_of([32000, 31600], speech.batch_settings)  # 1 % of the frames of the second
    waveforms = input_values(batch)
    valid = int(batch.num_frames[1])
    masked, free = (speech(waveforms, batch.num_samples, is_padded=is_padded)[1, :valid] for is_padded in (True, False))
    alone = speech(waveforms[1:, :31600], batch.num_samples[1:])[0, :valid]
    rounding = (masked - alone).abs().max()
    assert (free - alone).abs().max() > 20 * rounding


def test_an_input_that_is_lengthened_for_the_layers_is_masked_all_the_same():
    speech = model(config=no_dropout()).eval()
    batch = batch_of([300], speech.batch_settings)
    waveforms = input_values(batch)
    found = speech(waveforms, batch.num_samples, is_padded=False)
    assert torch.equal(found, speech(waveforms, batch.num_samples))


# --- frozen parts ---


def test_a_frozen_feature_encoder_has_no_graph_and_no_gradient():
    speech = model(model={"freeze_feature_encoder": True})
    features = []
    encoder = speech.hf.base_model.feature_extractor
    encoder.register_forward_hook(lambda module, args, output: features.append((args[0], output)))
    batch = batch_of([16000], speech.batch_settings, 1)
    run(speech, batch)
    waveforms, found = features[0]
    assert not waveforms.requires_grad
    assert found.grad_fn is None
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert (speech.hf.base_model.feature_projection.projection.weight.grad != 0).any()


def test_a_trained_feature_encoder_asks_for_no_gradient_of_the_audio():
    speech = model()
    batch = batch_of([16000], speech.batch_settings, 1)
    waveforms = input_values(batch)
    speech(waveforms, batch.num_samples).sum().backward()
    assert not waveforms.requires_grad
    assert (speech.hf.base_model.feature_extractor.conv_layers[0].conv.weight.grad != 0).any()


def test_a_frozen_transformer_gets_zeros_and_the_head_what_it_would_get_anyway():
    speech = model(config=no_dropout())
    batch = batch_of([16000, 12000], speech.batch_settings)
    run(speech, batch)
    head = speech.hf.lm_head.weight.grad.clone()
    speech.zero_grad()
    speech.transformer_frozen = True
    run(speech, batch)
    assert torch.equal(speech.hf.lm_head.weight.grad, head)
    rest = [parameter for name, parameter in speech.named_parameters() if not is_head(name) and parameter.requires_grad]
    assert len(rest) > 30
    assert all((parameter.grad == 0).all() for parameter in rest)
    speech.transformer_frozen = False
    speech.zero_grad()
    run(speech, batch)
    assert (speech.hf.base_model.encoder.layers[0].feed_forward.output_dense.weight.grad != 0).any()


def test_without_a_mask_in_a_step_the_mask_vector_gets_zeros():
    speech = model(spec_augment={"time_prob": 0.5})
    batch = batch_of([16000], speech.batch_settings)
    run(speech, batch)
    assert (speech.hf.base_model.masked_spec_embed.grad == 0).all()
    never = model(spec_augment={"time_prob": 0.0, "feature_prob": 0.5})
    assert not never.hf.base_model.masked_spec_embed.requires_grad


def steps_under_ddp(speech, batch):
    """One step of each kind; DDP raises in the next forward when a parameter had no gradient."""
    torch.distributed.init_process_group("gloo")
    wrapped = DistributedDataParallel(speech)
    for frozen in (True, False, True):
        for time_mask, keep in ((batch.time_mask, torch.tensor([True, False])), (None, None)):
            speech.transformer_frozen = frozen
            logits = wrapped(input_values(batch), batch.num_samples, time_mask, None, keep)
            losses, _ = ctc_losses(logits, batch.num_frames, batch.labels, batch.num_labels, 0)
            losses.mean().backward()
    return [parameter.grad is not None for parameter in speech.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ddp_needs_no_search_for_unused_parameters(checkpointing):
    settings = {"layerdrop": 0.5, "gradient_checkpointing": checkpointing}
    speech = model(spec_augment={"time_prob": 0.5}, model=settings)
    for found in run_ranks(2, steps_under_ddp, speech, batch_of([16000, 9000], speech.batch_settings, 3)):
        assert all(found)


@pytest.mark.parametrize("frozen_features", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(frozen_features):
    found, calls = [], []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "freeze_feature_encoder": frozen_features}
        speech = model(model=settings, config={"mask_time_prob": 0.5})
        batch = replace(batch_of([16000, 12000], speech.batch_settings, 2), keep_layers=torch.tensor([False, True]))
        for layer in speech.hf.base_model.encoder.layers:
            layer.feed_forward.register_forward_hook(lambda *_: calls.append(checkpointing))  # noqa: B023
        torch.manual_seed(batch.seed)
        run(speech, batch)
        found.append(gradients(speech))
    assert (calls.count(False), calls.count(True)) == (2, 4)  # computed again in the backward pass
    assert torch.equal(found[0], found[1])


# --- where weights come from ---


def test_random_weights_belong_to_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = model(seed=1), model(seed=1), model(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.hf.lm_head.weight, other.hf.lm_head.weight)
    assert first.training


@pytest.fixture
def pretrained(tmp_path):
    """A saved model of the tiny vocabulary in float16, its processor beside it."""
    speech = model(seed=9, config={"num_hidden_layers": 3})
    speech.hf.half().save_pretrained(tmp_path)
    settings = recipe().model
    build_processor(VOCABULARY, feature_extractor(settings, speech.hf.config)).save_pretrained(tmp_path)
    return tmp_path, speech.hf.float().state_dict()


def from_pretrained(path, **more):
    """A recipe that starts from saved weights."""
    values = {"name": "tuned", "max_steps": 1, "data": {"train": {"kind": "demo", "split": "train"}}}
    return decode_recipe(values | {"model": {"pretrained": str(path), **more.pop("model", {})}, **more})


def test_pretrained_weights_are_taken_in_float32(pretrained):
    path, weights = pretrained
    said = []
    speech = build_model(from_pretrained(path), VOCABULARY, say=said.append)
    assert said == []
    assert speech.num_layers == 3
    assert {parameter.dtype for parameter in speech.parameters()} == {torch.float32}
    assert all(torch.equal(value, weights[name]) for name, value in speech.hf.state_dict().items())


def test_the_head_of_another_vocabulary_is_made_anew_from_the_seed_and_said(pretrained):
    path, weights = pretrained
    larger = Vocabulary.build(["abc defg"])
    said = []
    built = [build_model(from_pretrained(path, seed=seed), larger, say=said.append) for seed in (1, 1, 2)]
    assert len(said) == 3
    assert "10 classes" in said[0]
    heads = [speech.hf.lm_head.weight for speech in built]
    assert heads[0].shape == (10, 16)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std() > 0
    kept = built[0].hf.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in weights.items() if not is_head(name))


def test_a_head_for_other_characters_is_made_anew_even_at_the_same_size(pretrained):
    path, weights = pretrained
    other = Vocabulary.build(["abc xyz"])
    assert other.size == VOCABULARY.size
    said = []
    speech = build_model(from_pretrained(path), other, say=said.append)
    assert len(said) == 1
    assert "other characters" in said[0]
    assert not torch.equal(speech.hf.lm_head.weight, weights["lm_head.weight"])
    assert 0 < speech.hf.lm_head.weight.std() < 0.1


def test_weights_that_do_not_fit_are_refused(pretrained):
    path, _ = pretrained
    with pytest.raises(ModelError, match=r"lack or do not fit.*intermediate_dense"):
        build_model(from_pretrained(path, model={"config": {"intermediate_size": 24}}), VOCABULARY)


def test_an_exported_folder_gives_the_model_and_its_vocabulary(pretrained):
    path, _ = pretrained
    speech, vocabulary = load_exported(path)
    assert vocabulary.tokens == VOCABULARY.tokens
    assert not speech.training
    assert speech.normalize
    assert speech.takes_attention_mask
    waveforms = torch.randn(1, 16000)
    peer = AutoModelForCTC.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(speech(waveforms, torch.tensor([16000])), peer(waveforms).logits, atol=1e-6)


def test_a_model_of_another_sampling_rate_is_refused(pretrained):
    path, _ = pretrained
    for file in (path / "processor_config.json", path / "preprocessor_config.json"):
        if file.exists():
            file.write_text(file.read_text().replace("16000", "8000"))
    with pytest.raises(ModelError, match="8000 Hz"):
        build_model(from_pretrained(path), VOCABULARY)


def test_a_folder_without_a_trained_head_is_no_model_to_transcribe_with(pretrained):
    path, _ = pretrained
    AutoModel.from_pretrained(path).save_pretrained(path)  # the encoder alone
    with pytest.raises(ModelError, match="not been trained"):
        load_exported(path)


# --- who is refused ---


@pytest.mark.parametrize("architecture", ["wav2vec2-bert", "mctct", "whisper", "no-such-model"])
def test_models_of_other_inputs_are_refused_by_name(architecture):
    values = {"name": "x", "max_steps": 1, "data": {"train": {"kind": "demo", "split": "train"}}}
    with pytest.raises(ModelError) as error:
        build_model(decode_recipe(values | {"model": {"architecture": architecture}}), VOCABULARY)
    assert repr(architecture) in str(error.value)
    assert "wav2vec2-conformer" in str(error.value)


@pytest.mark.parametrize("model_type", ["wav2vec2-bert", "mctct"])
def test_a_pretrained_model_of_other_inputs_is_refused_by_name(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError) as error:
        build_model(from_pretrained(tmp_path), VOCABULARY)
    assert model_type in str(error.value)
    assert "unispeech-sat" in str(error.value)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCTC": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    with pytest.raises(ModelError):
        build_model(from_pretrained(tmp_path), VOCABULARY)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hiden_dropout": 0.1}, "did you mean hidden_dropout"),
        ({"hidden_dropout": "much"}, "hidden_dropout"),
        ({"add_adapter": True}, "add_adapter"),
        ({"num_attention_heads": 3}, "num_heads"),
    ],
)
def test_config_fields_that_cannot_be(config, expected):
    with pytest.raises(ModelError, match=expected):
        model(config=config)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="nothing-here"):
        build_model(from_pretrained(tmp_path / "nothing-here"), VOCABULARY)
