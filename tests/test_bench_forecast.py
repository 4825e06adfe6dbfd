"""The forecast benchmark forecasts from a trial, trains, and compares; nothing here asserts a time."""

import json

import pytest
from bench import check_committed, load, run

from asr_train.files import append_jsonl
from asr_train.run_dir import RunDir

PARTS = ("compute", "padding", "data_wait", "peer_wait", "checkpoint", "evaluation", "startup", "other")


@pytest.fixture(scope="module")
def forecast():
    return load("forecast")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A small run: its result and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "forecast.json"
    done = run("forecast.py", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    assert list(out.parent.iterdir()) == [out]
    return json.loads(out.read_text()), done.stdout


def test_a_training_is_forecast_and_made(smoke, forecast):
    result, printed = smoke
    (row,) = result["rows"]
    assert (row["num_steps"], row["processes"], row["by_run_before_percent"]) == (12, 1, None)
    for name in ("measured_s", "forecast_s", "flops_per_s", "step_s"):
        assert row[name]["runs"][0] > 0
    told, made = row["forecast_s"]["median"], row["measured_s"]["median"]
    assert row["error_percent"]["median"] == pytest.approx(100 * (told - made) / made)
    assert forecast.render(result) in printed


def test_the_committed_result_is_of_this_benchmark_and_its_table_is_in_the_readme(smoke, forecast):
    check_committed("forecast", smoke[0])
    committed = json.loads(forecast.RESULTS.read_text(encoding="utf-8"))
    assert not committed["smoke"]
    assert len(committed["rows"]) == 4
    assert all(row["num_steps"] >= 60 for row in committed["rows"])
    assert committed["bars"] == forecast.bars(committed["rows"])


def test_steps_are_timed_without_start_and_checkpoint(forecast, tmp_path):
    """Two ranks, each 13 s from the first line to the last, besides what is in no step."""
    run_dir = RunDir(tmp_path)
    for step, compute_s, wait_s in ((0, 0.0, 0.0), (5, 3.0, 1.0), (9, 9.0, 4.0)):
        one = {**{f"{part}_s": 0.0 for part in PARTS}, "startup_s": 50.0, "checkpoint_s": 2.0 * step}
        ranks = [{**one, "compute_s": compute_s, "peer_wait_s": wait_s}, {**one, "padding_s": compute_s + wait_s}]
        append_jsonl(run_dir.metrics, {"event": "ledger", "step": step, "ranks": ranks})
    assert forecast.time_of_steps(run_dir) == (pytest.approx(13.0), 9)


def test_bars_are_the_median_of_the_distances(forecast):
    row = {"data": "s", "model": "tiny", "processes": 2, "error_percent": {"runs": [-40.0, 25.0, 10.0]}}
    (bar,) = forecast.bars([row])
    assert (bar["found"], bar["met"]) == (25.0, True)
    assert "s, tiny, 2 processes" in bar["bar"]
    row["error_percent"]["runs"][1] = -25.01
    assert not forecast.bars([row])[0]["met"]
