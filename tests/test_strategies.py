"""FSDP2 and DeepSpeed make the same run as one process: real gloo ranks, CPU.

accelerate turns FSDP on CPU into DDP, and with `Accelerator(cpu=True)` DeepSpeed too; so the tests put the strategy
into accelerate's state. From there on the code is the one that GPUs run.
"""

import os
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import deepspeed.ops
import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from ranks import run_ranks
from small_run import assert_close, losses, recipe, run_on, trained, weights  # noqa: F401  recipe is a fixture

from asr_train import strategy
from asr_train.run_dir import RunDir
from asr_train.train import train


def train_fsdp2(recipe):  # noqa: F811
    make = strategy.make_accelerator

    def make_fsdp2(*args):
        accelerator = make(*args)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        for state in (AcceleratorState._shared_state, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        return accelerator

    strategy.make_accelerator = make_fsdp2
    return train(recipe)


def train_deepspeed(stage, recipe):  # noqa: F811
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ for minutes
    del os.environ["ACCELERATE_USE_CPU"]
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    make = strategy.make_accelerator

    def make_deepspeed(*args):
        plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": stage}})
        with mock.patch.object(strategy, "Accelerator", partial(Accelerator, deepspeed_plugin=plugin)):
            return make(*args)

    strategy.make_accelerator = make_deepspeed
    return train(recipe)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_on_2_ranks_makes_the_run_of_1_process(recipe, stage):  # noqa: F811
    changes = {"max_steps": 15, "checkpoint__every": "4", "checkpoint__keep_last": 9}
    one = run_on(1, recipe("one", **changes))
    two = recipe("two", **changes)
    assert run_ranks(2, train_deepspeed, stage, two) == [0, 0]
    run = RunDir(Path(two.run_dir))
    assert_close(losses(run), losses(one))
    assert trained(run) == trained(one)
    expected = weights(one)
    for key, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("freeze_steps", [0, 5])
def test_fsdp2_on_2_ranks_makes_the_run_of_1_process(recipe, freeze_steps):  # noqa: F811
    changes = {"max_steps": 15, "model__freeze_transformer_steps": freeze_steps}
    one = run_on(1, recipe("one", **changes))
    two = recipe("two", **changes)
    assert run_ranks(2, train_fsdp2, two) == [0, 0]
    run = RunDir(Path(two.run_dir))
    assert_close(losses(run), losses(one))
    assert trained(run) == trained(one)
