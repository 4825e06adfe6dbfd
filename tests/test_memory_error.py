"""Out of memory in training: a message that names the unit and what to set, an exit code, and a verdict."""

import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from asr_train.errors import EXIT_OUT_OF_MEMORY, UnitMemoryError
from asr_train.memory_error import names_what_was_too_large
from asr_train.run_dir import RunDir
from asr_train.speech_model import SpeechModel
from asr_train.strategy import Parallel
from asr_train.train import train
from launch.ending.signs import read_error

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1 GiB is free"


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    return tiny_recipe(run_dir=str(tmp_path / "run"), num_workers=0, **{"log.trained_ids": True})


def fails(recipe, owner, name, at_call):
    """Train on one rank, where a method runs out of memory at its nth call in training; the message."""

    def program():
        real, calls = getattr(owner, name), []

        def short_of_memory(owner, *args, **kwargs):
            calls.extend([1] if getattr(owner, "training", True) else [])
            if len(calls) == at_call:
                raise torch.OutOfMemoryError(SAID)
            return real(owner, *args, **kwargs)

        setattr(owner, name, short_of_memory)
        with pytest.raises(UnitMemoryError) as caught:
            train(recipe)
        return str(caught.value)

    return run_ranks(1, program)[0]


def test_the_unit_is_named_and_what_to_set(recipe):
    message = fails(recipe, SpeechModel, "forward", 4)  # two units a step
    found = re.match(
        r"out of memory in unit 1 of step 2 \(epoch (\d), its step (\d)\) on rank 0: (\d+) utterances padded to "
        r"([\d.]+) s, ([\d.]+) s in all, (train-\d+.*): CUDA out of memory\. Tried to allocate 2\.00 GiB",
        message,
    )
    assert found, message
    count, each, total = int(found[3]), float(found[4]), float(found[5])
    assert total == pytest.approx(count * each, abs=0.1 * count)
    assert len(found[6].removesuffix(", ...").split(", ")) == min(5, count)
    assert "model.gradient_checkpointing=true or precision=bf16" in message
    assert "lower unit_audio_s (now 12)" in message

    outcome = RunDir(Path(recipe.run_dir)).outcomes()[0]
    assert (outcome["status"], outcome["exit_code"]) == ("failed", EXIT_OUT_OF_MEMORY)
    assert not outcome["lost_peer"]
    sign = read_error(outcome["message"], outcome["exit_code"])
    assert (sign.kind, sign.is_certain) == ("out_of_memory", True)
    assert "unit 1 of step 2" in sign.text


def test_the_update_is_named_where_it_was_too_large(recipe):
    assert fails(recipe, Parallel, "update", 2).startswith("out of memory in the update of step 2: CUDA out of memory")


def test_what_is_set_already_is_not_advised(tiny_recipe):
    settings = {"model.gradient_checkpointing": True, "precision": "bf16", "model.freeze_feature_encoder": True}
    with pytest.raises(UnitMemoryError) as caught, names_what_was_too_large(tiny_recipe(**settings), lambda: "here"):
        raise torch.OutOfMemoryError(SAID)
    assert "allow-change" not in str(caught.value)
    assert "fsdp2" in str(caught.value)


def test_the_hosts_memory_counts_and_other_errors_pass(tiny_recipe):
    text = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 PB"
    with pytest.raises(UnitMemoryError, match="you tried"), names_what_was_too_large(tiny_recipe(), lambda: "here"):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shapes"), names_what_was_too_large(tiny_recipe(), lambda: "here"):
        raise RuntimeError("shapes cannot be multiplied")
