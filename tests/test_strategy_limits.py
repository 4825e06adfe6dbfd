"""What strategies share and what they refuse: bf16, a frozen transformer, configs that would train another way."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import test_strategies
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from ranks import run_ranks
from test_runs import (  # noqa: F401  recipe is a fixture
    NOTHING_EVALUATED,
    assert_close,
    losses,
    recipe,
    run_on,
    saved_steps,
    signal_in_step,
    trained_ids,
    weights,
)
from test_strategies import train_deepspeed, train_fsdp2

from asr_train import strategy
from asr_train.errors import RecipeError, TrainingError, WavefleetError
from asr_train.run_dir import RunDir
from asr_train.train import train


def train_fsdp2_in_bf16(recipe):  # noqa: F811
    """With the policy that accelerate adds under bf16, and which the strategy is to take away again."""
    plugin = partial(FullyShardedDataParallelPlugin, mixed_precision_policy="bf16")
    test_strategies.FullyShardedDataParallelPlugin = plugin
    return train_fsdp2(recipe)


def test_bf16_on_2_ranks_makes_the_run_of_1_process_in_bf16(recipe):  # noqa: F811
    """DDP to rounding; FSDP2 too, until a last bit of a float32 weight, its sums being others, moves a bf16 rounding.

    Measured: FSDP2's first 8 losses are equal to the bit, later ones differ by up to 4e-5; bf16 and fp32 by 4e-5 in the
    first step, by 4e-4 after 20.
    """
    changes = {**NOTHING_EVALUATED, "precision": "bf16"}
    one = losses(run_on(1, recipe("one", changes)))
    fp32 = losses(run_on(1, recipe("fp32", {**changes, "precision": "fp32", "max_steps": 1})))
    assert abs(fp32[1] - one[1]) > 1e-5 * one[1]  # else the rest would hold in fp32 too
    assert_close(losses(run_on(2, recipe("ddp", changes))), one)
    sharded = losses(run_on(2, recipe("fsdp2", changes), train_fsdp2_in_bf16))
    assert_close({step: sharded[step] for step in range(1, 5)}, {step: one[step] for step in range(1, 5)})
    assert_close(sharded, one, relative=2e-4)


def test_a_frozen_transformer_under_zero_2_makes_the_run_of_1_process(recipe):  # noqa: F811
    """Also where the run was stopped before the thaw, and goes on."""
    changes = {**NOTHING_EVALUATED, "max_steps": 10, "model.freeze_transformer_steps": 5}
    one = run_on(1, recipe("one", changes))
    two = recipe("two", changes)

    def stopped(again):
        signal_in_step(signal.SIGTERM, 4, rank=1)
        return train_deepspeed(2, again)

    assert saved_steps(run_on(2, two, stopped)) == [4]
    run = run_on(2, two, partial(train_deepspeed, 2))
    assert_close(losses(run), losses(one))
    assert trained_ids(run) == trained_ids(one)
    expected = weights(one)
    for key, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------


def refusal(function, *args):
    """What a rank was refused with: the error's class and its text."""
    try:
        function(*args)
    except WavefleetError as error:
        return type(error), str(error)
    raise AssertionError("it was not refused")


def train_fp16_as_if_there_were_a_gpu(recipe):  # noqa: F811
    strategy.check_environment = lambda _: None
    return train_deepspeed(2, recipe)


def train_fsdp_1(recipe):  # noqa: F811
    def make(**options):
        accelerator = Accelerator(**options)
        for state in (AcceleratorState._shared_state, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=1)
        return accelerator

    strategy.Accelerator = make
    return train(recipe)


def train_fsdp_on_cpu(recipe):  # noqa: F811
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    return train(recipe)


@pytest.mark.parametrize(
    ("program", "changes", "kind", "words"),
    [
        (partial(train_deepspeed, 3), {"model.freeze_transformer_steps": 2}, RecipeError,
         "model.freeze_transformer_steps: not with ZeRO-3; use the config zero2, ddp or fsdp2"),
        (partial(train_deepspeed, 0), {}, RecipeError, "asks for ZeRO stage 0: use 1, 2 or 3, or the config ddp"),
        (train_fp16_as_if_there_were_a_gpu, {"precision": "fp16"}, RecipeError,
         "precision: 'fp16': DeepSpeed clips scaled gradients; use bf16, or the config ddp or fsdp2"),
        (partial(train_deepspeed, 2), {"model.compile": True}, RecipeError,
         "model.compile: not with DeepSpeed; use the config ddp or fsdp2"),
        (partial(train_deepspeed, 2), {"bf16_gradients": True}, RecipeError,
         "bf16_gradients: not with DeepSpeed; use the config ddp or fsdp2"),
        (train_fsdp_1, {}, RecipeError, "asks for FSDP 1, which averages gradients: add fsdp_version: 2 to it"),
        (train_fsdp_on_cpu, {}, TrainingError, "asked for FSDP, but accelerate made MULTI_CPU of it on cpu"),
    ],
    ids=["freezing-zero3", "zero0", "fp16-deepspeed", "compile-deepspeed", "bf16-deepspeed", "fsdp1", "fsdp-on-cpu"],
)  # fmt: skip
def test_what_would_train_another_way_is_refused(recipe, program, changes, kind, words):  # noqa: F811
    asked = recipe("asked", {**NOTHING_EVALUATED, **changes})
    (found, message), *_ = run_ranks(1, refusal, program, asked)
    assert found is kind
    assert words in message
    run = RunDir(Path(asked.run_dir))
    assert run.outcomes()[0]["exit_code"] == kind.exit_code
    assert not run.checkpoints.exists()
