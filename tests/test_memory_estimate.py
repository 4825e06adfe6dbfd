"""Predicted memory, beside tensors that torch keeps: of real sizes, on fake tensors, which take no memory or time."""

from dataclasses import replace

import pytest
import torch
from test_benchmarks import load
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from asr_train.config import OptimSettings
from asr_train.estimate import num_parameters
from asr_train.memory_estimate import MemorySettings, UnitShape, memory, saved_bytes
from asr_train.optim import build_optimizer, create_optimizer_state

benchmark = load("memory")
MODELS = [(name, frozen, "sdpa") for name in benchmark.MODELS for frozen in (True, False)]
MODELS.append(("wav2vec2 base", True, "eager"))
UNITS = [(False, "fp32", 8, 3.0), (True, "bf16", 8, 3.0), (False, "bf16", 1, 24.0), (True, "fp32", 40, 1.0)]
SHORT, LONG = UnitShape(8, 48_000), UnitShape(1, 384_000)


def config(name="wav2vec2 base", **more):
    family, fields = benchmark.MODELS[name]
    return AutoConfig.for_model(family, vocab_size=32, **{**fields, **more}).to_dict()


def loss_without_alignment(logits, *_):
    """CTC without its forward variables, which fake tensors cannot have: their number depends on values."""
    return -torch.log_softmax(logits.float(), dim=-1).sum(dim=(1, 2)), None


@pytest.mark.parametrize("name, frozen, attention", MODELS)
def test_saved_tensors_are_predicted_within_10_percent(name, frozen, attention, monkeypatch):
    monkeypatch.setattr("asr_train.loss.ctc_losses", loss_without_alignment)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = benchmark.make_model(name, frozen=frozen, attention=attention)
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        held = sum(each.numel() for each in model.parameters() if not each.requires_grad)
        values = model.hf.config.to_dict()
        assert num_parameters(values, feature_encoder_frozen=frozen) == (trained, held)
        for checkpointing, precision, utterances, seconds in UNITS:
            benchmark.set_checkpointing(model, checkpointing)
            case = benchmark.Case(name, checkpointing, frozen, precision, attention, utterances, seconds)
            measured = sum(benchmark.measure(model, case))
            found = memory(values, case.shape, benchmark.settings_of(case, "cpu"))
            assert found.saved + found.recomputed == pytest.approx(measured, rel=0.1), case


def test_checkpointing_and_a_frozen_encoder_save_memory_and_eager_attention_costs_it_on_long_utterances():
    plain = MemorySettings()
    total = {
        name: memory(config(), LONG, settings).total
        for name, settings in {
            "plain": plain,
            "checkpointing": replace(plain, gradient_checkpointing=True),
            "frozen": replace(plain, feature_encoder_frozen=True),
            "eager": replace(plain, attention="eager"),
            "bf16": replace(plain, precision="bf16"),
        }.items()
    }
    assert max(total["checkpointing"], total["frozen"], total["bf16"]) < total["plain"] < total["eager"]


def test_saved_memory_grows_with_the_utterances_and_faster_with_their_length_where_scores_are_kept():
    eager = MemorySettings(attention="eager")
    one, two = (saved_bytes(config(), UnitShape(n, 48_000), eager) for n in (8, 16))
    assert one < two < 2 * one  # the positional kernel is there once
    same_audio = [saved_bytes(config(), shape, eager) for shape in (SHORT, LONG)]
    assert same_audio[1] > same_audio[0]


def test_what_a_strategy_shards():
    settings = MemorySettings(world_size=8)
    found = {
        name: memory(config(), SHORT, replace(settings, strategy=name))
        for name in ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
    }
    trained, _ = num_parameters(config(), feature_encoder_frozen=False)
    assert found["ddp"] == found["single"]
    assert found["single"].parameters == found["single"].gradients == 4 * trained
    assert found["single"].optimizer == 8 * trained
    assert found["fsdp2"].optimizer == found["zero1"].optimizer == pytest.approx(trained, rel=1e-6)
    assert found["fsdp2"].parameters < found["single"].parameters < found["zero1"].parameters
    assert {each.saved for each in found.values()} == {found["single"].saved}  # activations belong to a rank's unit
    assert {each.checkpoint for each in found.values()} == {12 * trained}


def test_frozen_weights_have_neither_gradients_nor_optimizer_state_but_stand_in_the_checkpoint():
    frozen = memory(config(), SHORT, MemorySettings(feature_encoder_frozen=True))
    trained, held = num_parameters(config(), feature_encoder_frozen=True)
    assert (frozen.gradients, frozen.optimizer) == (4 * trained, 8 * trained)
    assert frozen.parameters == 4 * (trained + held)
    assert frozen.checkpoint == 12 * trained + 4 * held


def test_a_checkpoint_on_disk_is_as_large_as_predicted(tmp_path):
    model = benchmark.make_model("wav2vec2 base", frozen=True, attention="sdpa", tiny=True)
    optimizer = build_optimizer(model, OptimSettings())
    create_optimizer_state(optimizer, [each for group in optimizer.param_groups for each in group["params"]])
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state")
    predicted = memory(model.hf.config.to_dict(), SHORT, MemorySettings(feature_encoder_frozen=True)).checkpoint
    num_names = len(model.state_dict())
    assert predicted <= (tmp_path / "state").stat().st_size <= predicted + 2000 * num_names  # names, padding
