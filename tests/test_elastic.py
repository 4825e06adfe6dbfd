"""One run, chained over strategies and numbers of processes in mid-epoch: real gloo ranks, CPU."""

import os
import shutil
from functools import partial
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import pytest
import torch
from ranks import run_ranks
from small_run import assert_close, losses, recipe, run_on, trained, weights  # noqa: F401  recipe is a fixture
from test_strategies import train_deepspeed, train_fsdp2

from asr_train import checkpoints
from asr_train.run_dir import RunDir, read_metrics
from asr_train.train import train

WAYS = {
    "ddp": train,
    "fsdp2": train_fsdp2,
    "zero1": partial(train_deepspeed, 1),
    "zero2": partial(train_deepspeed, 2),
    "zero3": partial(train_deepspeed, 3),
}
EVERY = 3  # steps a link of a chain; the tiny corpus has more an epoch


@pytest.mark.parametrize(
    "chain",
    [
        "ddp:2 fsdp2:3 ddp:1 fsdp2:2 ddp:3",
        "zero2:2 zero2:3 ddp:1 zero1:1 zero2:2",
        "zero3:2 zero3:3 fsdp2:2 zero3:1 zero1:2",
    ],
)
def test_a_run_goes_on_under_another_strategy_and_number_of_processes(recipe, chain):  # noqa: F811
    links = [link.split(":") for link in chain.split()]
    changes = {
        "max_steps": EVERY * len(links),
        "checkpoint__every": str(EVERY),
        "checkpoint__keep_last": 9,
        "units_per_step": 3,
    }
    one = run_on(1, recipe("one", **changes))
    mixed = recipe("mixed", **changes)
    run = RunDir(Path(mixed.run_dir))
    for number, (way, world_size) in enumerate(links, 1):
        assert run_ranks(int(world_size), WAYS[way], mixed) == [0] * int(world_size)
        assert_close(losses(run), losses(one))
        if number < len(links):  # as if it had been killed after so many steps
            for checkpoint in checkpoints.whole(run.checkpoints):
                if checkpoint.step > EVERY * number:
                    shutil.rmtree(checkpoint.path)
            run.done.unlink()
    attempts = {line["step"]: line["attempt"] for line in read_metrics(run) if "set" not in line}
    assert attempts == {step: (step - 1) // EVERY + 1 for step in range(1, EVERY * len(links) + 1)}
    assert trained(run) == trained(one)
    expected = weights(one)
    for key, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_the_same_strategy_goes_on_with_the_same_bits(recipe, way):  # noqa: F811
    changes = {"max_steps": 6, "checkpoint__every": "3", "checkpoint__keep_last": 9}
    whole = recipe("whole", **changes)
    run = RunDir(Path(whole.run_dir))
    assert run_ranks(2, WAYS[way], whole) == [0, 0]
    before, expected = losses(run), weights(run)
    shutil.rmtree(run.checkpoints / "step-0000000006")
    run.done.unlink()
    assert run_ranks(2, WAYS[way], whole) == [0, 0]
    assert losses(run) == before
    for key, tensor in weights(run).items():
        assert torch.equal(tensor, expected[key]), key
