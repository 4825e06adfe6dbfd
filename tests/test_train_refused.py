"""What a training refuses before it costs anything, and what it says of a run that it finds."""

import os
from pathlib import Path

import pytest
from damage import edit_manifest
from ranks import run_ranks
from small_run import losses, recipe, run_on  # noqa: F401  fixtures

from asr_train import checkpoints
from asr_train.errors import RecipeError, RunError
from asr_train.run_dir import RunDir
from asr_train.train import train

# ruff: noqa: F811  their names as arguments


def test_more_processes_than_units_are_refused_with_the_sums(recipe):
    def refused():
        with pytest.raises(RecipeError) as caught:
            train(recipe("on3", units_per_step=2))
        return str(caught.value)

    message = run_ranks(3, refused)[0]
    assert "units_per_step=2 keeps 2 of 3 processes busy" in message
    assert "--processes 2" in message


def test_a_finished_run_says_so_and_trains_nothing(recipe, capfd):
    small = recipe("small", max_steps=3)
    run = run_on(1, small)
    before = run.metrics.read_text()
    assert run_ranks(1, train, small) == [0]
    assert "done already" in capfd.readouterr().err
    assert run.metrics.read_text() == before


def test_a_live_run_is_refused_with_host_and_pid(recipe):
    small = recipe("small", max_steps=3)
    with RunDir(Path(small.run_dir)).lock(), pytest.raises(RunError) as caught:
        train(small)
    assert f"pid {os.getpid()} on {os.uname().nodename}" in str(caught.value)


def test_another_recipe_is_refused_and_lists_what_differs(recipe):
    run_on(1, recipe("small", max_steps=3))
    with pytest.raises(RunError, match="max_steps: 3 -> 4"):
        train(recipe("small", max_steps=4))


def test_fp16_without_a_gpu_is_refused(recipe):
    def refused():
        with pytest.raises(RecipeError, match="fp16"):
            train(recipe("half", precision="fp16"))

    run_ranks(1, refused)


def test_an_accelerate_config_that_says_otherwise_is_refused_with_both_values(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")

    def refused():
        with pytest.raises(RecipeError) as caught:
            train(recipe("x"))
        return str(caught.value)

    message = run_ranks(1, refused)[0]
    assert "mixed_precision: bf16" in message
    assert "precision: fp32" in message
    assert "gradient_accumulation_steps: 4" in message


def test_an_unknown_tracker_is_refused_and_the_installed_ones_are_listed(recipe):
    def refused():
        with pytest.raises(RecipeError, match=r"log\.trackers: tensorbord: not installed.*tensorboard"):
            train(recipe("x", log__trackers=["tensorbord"]))

    run_ranks(1, refused)


def test_another_kind_of_device_on_resume_is_said(recipe, capfd):
    small = recipe("small", max_steps=2)
    run = run_on(1, small)
    edit_manifest(checkpoints.newest(run.checkpoints).path, device="NVIDIA H200")
    run.done.unlink()
    assert run_ranks(1, train, small) == [0]
    assert "was written on NVIDIA H200, this is cpu" in capfd.readouterr().err


def test_best_by_a_metric_that_cannot_be_scored_is_refused_before_anything_starts(recipe):
    with pytest.raises(RecipeError, match=r"eval\.best: 'dev/werr': expected SET/METRIC with a metric of: wer, cer"):
        recipe("x", eval__best="dev/werr")
    with pytest.raises(RecipeError, match=r"eval\.best: 'test/wer': expected SET/METRIC with a set of: dev"):
        recipe("x", eval__best="test/wer")
    extra = {"trust_remote_code": True, "eval__metrics": ["mine"], "eval__best": "dev/my_score"}
    with pytest.raises(RecipeError, match=r"eval\.higher_is_better: missing"):
        recipe("x", **extra)
    assert recipe("x", eval__higher_is_better=True, **extra).eval.best == "dev/my_score"


def test_a_metric_that_cannot_be_loaded_is_refused_before_a_step_is_paid_for(recipe, tmp_path):
    metric = tmp_path / "broken.py"
    metric.write_text("import datasets\nraise ValueError('broken')\n")
    broken = recipe("x", trust_remote_code=True, eval__metrics=[str(metric)])

    def refused():
        with pytest.raises(RecipeError, match=r"eval\.metrics: .*broken"):
            train(broken)

    run_ranks(1, refused)
    assert not losses(RunDir(Path(broken.run_dir)))
