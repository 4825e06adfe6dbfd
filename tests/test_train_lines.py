"""What a training writes down of its steps and evaluations: every field, the best checkpoint, where the time went."""

import json
import re
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from small_run import losses, recipe, run_on, trained  # noqa: F401  fixtures

from asr_train import checkpoints
from asr_train.errors import TrainingError
from asr_train.files import read_json, read_jsonl
from asr_train.ledger import PARTS
from asr_train.run_dir import RunDir, read_metrics
from asr_train.train import train

# ruff: noqa: F811  their names as arguments


def test_steps_that_are_not_finite_are_skipped_named_and_bounded(recipe):
    wild = recipe("wild", optim__lr=1e30, optim__max_grad_norm=None, limits__max_skipped_steps=3)

    def failing():
        with pytest.raises(TrainingError) as caught:
            train(wild)
        return str(caught.value)

    message = run_ranks(2, failing)[0]
    assert "3 steps in a row were not finite" in message
    run = RunDir(Path(wild.run_dir))
    skipped = [line for line in read_jsonl(run.metrics) if line.get("event") == "skipped"]
    assert len(skipped) == 3
    assert skipped[-1]["ids"] == trained(run).get(skipped[-1]["step"], skipped[-1]["ids"]) != []
    assert {found["exit_code"] for found in run.outcomes().values()} == {4}


def test_bf16_trains(recipe):
    run = run_on(1, recipe("half", precision="bf16", max_steps=4))
    assert len(losses(run)) == 4


def test_evaluations_lines_best_checkpoint_and_early_stopping(recipe):
    run = run_on(
        2,
        recipe("stale", max_steps=40, optim__lr=1e-9, eval__every="4", eval__early_stopping=2, checkpoint__keep_last=1),
    )
    lines = [line for line in read_metrics(run) if "set" in line]
    steps = [line["step"] for line in lines]
    assert steps == [4, 8, 12]  # the first is the best, two without a better one end the run
    for line in lines:
        assert line["num_rows"] > 0
        assert line["wer"] >= 0
        rows = list(read_jsonl(run.evaluation(line["step"], line["set"])))
        assert len(rows) == line["num_rows"]
    kept = [found.step for found in checkpoints.whole(run.checkpoints)]
    assert kept == [4, 12]  # the best and the last
    assert checkpoints.best(run.checkpoints).step == 4
    assert read_json(run.done)["best_step"] == 4


def test_training_lines_have_every_field(recipe):
    run = run_on(1, recipe("fields", max_steps=3))
    line = next(line for line in read_metrics(run) if "set" not in line)
    names = "attempt step epoch loss grad_norm lr num_utterances audio_s padded_audio_s step_time_s data_wait_s"
    assert {*names.split(), "audio_s_per_s"} <= line.keys()
    assert 0 < line["audio_s"] <= line["padded_audio_s"]
    assert line["num_utterances"] == len(trained(run)[line["step"]])


def test_trackers_get_the_curves(recipe):
    pytest.importorskip("tensorboard")
    run = run_on(1, recipe("tracked", max_steps=3, log__trackers=["tensorboard"]))
    assert list((run.path / "trackers").rglob("events.out.tfevents*"))
    assert json.loads((run.path / "done.json").read_text())["step"] == 3


def test_extra_metrics_pick_the_best_in_their_own_direction(recipe, tmp_path):
    metric = tmp_path / "word_accuracy.py"
    metric.write_text(EXTRA_METRIC)
    changes = {"trust_remote_code": True, "eval__metrics": [str(metric)], "eval__best": "dev/word_accuracy"}
    run = run_on(1, recipe("extra", max_steps=4, eval__every="2", **changes))
    assert [line["word_accuracy"] for line in read_metrics(run) if "set" in line] == [0.25, 0.75]
    assert read_json(run.done)["best_step"] == 4


EXTRA_METRIC = """
import os
import datasets
import evaluate

class WordAccuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        assert len(predictions) == len(references) > 0
        is_first = "SECOND_CALL" not in os.environ
        os.environ["SECOND_CALL"] = "yes"
        return {"word_accuracy": 0.25 if is_first else 0.75}
"""


def test_where_the_time_went_is_counted_over_all_attempts(recipe, capfd):
    def spent(max_steps):
        before = time.monotonic()
        again = recipe("run", max_steps=max_steps, eval__every="2", checkpoint__every="2")
        assert run_ranks(1, lambda: train(again, allow_change=True)) == [0]
        return read_json(Path(again.run_dir) / "done.json")["spent_s"], time.monotonic() - before

    first, wall_s = spent(4)
    assert set(first) == set(PARTS)
    assert 0.8 * wall_s < sum(first.values()) < wall_s
    assert all(first[part] > 0 for part in ("compute", "padding", "data_wait", "checkpoint", "evaluation", "startup"))
    assert first["peer_wait"] < 0.01 * wall_s  # one process waits for nobody
    both, _ = spent(8)
    assert all(both[part] > first[part] for part in ("compute", "evaluation", "startup"))  # a save is not in itself
    said = capfd.readouterr().err
    assert len(re.findall(r"in all: compute [\d.]+%, padding [\d.]+%, data wait [\d.]+%, ", said)) == 2
