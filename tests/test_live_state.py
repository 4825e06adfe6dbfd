"""Copies for saving in the background: what is written is the state when the save began, each time."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_run import losses, recipe, weights  # noqa: F401  recipe is a fixture
from test_elastic import WAYS

from asr_train.run_dir import RunDir


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_every_asynchronous_checkpoint_is_that_of_its_step(recipe, way):  # noqa: F811
    """The first copy makes buffers, later ones use them again; a run goes on from either with the same bits."""
    changes = {"max_steps": 6, "checkpoint__every": "2", "checkpoint__keep_last": 9}
    whole = recipe("whole", **changes)
    run = RunDir(Path(whole.run_dir))
    assert run_ranks(2, WAYS[way], whole) == [0, 0]
    before, expected = losses(run), weights(run)
    for step in (4, 2):
        for late in range(step + 2, 8, 2):
            shutil.rmtree(run.checkpoints / f"step-{late:010d}")
        run.done.unlink()
        assert run_ranks(2, WAYS[way], whole) == [0, 0]
        assert losses(run) == before
        for key, tensor in weights(run).items():
            assert torch.equal(tensor, expected[key]), key
