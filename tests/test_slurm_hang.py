"""A rank that is stopped in the middle of a training, on a real Slurm: found, explained, gone on without anybody."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from slurm_cluster import WAVEFLEET
from slurm_conf import NODES
from survivor import STEPS, Survivor, expected, profile, rank_below, recipe, reference, survivor  # noqa: F401  fixtures

from asr_train.phase import FOLDER, read_record

# ruff: noqa: F811  their names as arguments

pytestmark = pytest.mark.slurm

# a checkpoint is waited for; the limit is a thousand of these steps
EVERY = 20
CHANGES = {"checkpoint": {"every": str(EVERY), "asynchronous": False}, "limits.step_s": 25}


def stop_rank(run, process):
    """SIGSTOP in a step, for whose gradients the other waits, once there is a checkpoint to go on from."""
    folder = Path(process.environ()[FOLDER])
    run.until(lambda: list(run.run.checkpoints.glob("step-*")), poll_s=0.05)
    while True:
        process.suspend()
        record = read_record(folder, 1)
        if record["phase"] == "step" and record["step"] % EVERY not in (0, 1):
            return
        process.resume()
        time.sleep(0.01)


def assert_hang_is_explained(run, verdict):
    """The verdict on the first attempt, and what it refers to."""
    assert (verdict["kind"], verdict["action"], verdict["rank"]) == ("hang", "retry", 1)
    assert "stopped by a signal" in verdict["message"]
    assert any(f"hangs/{verdict['start']}/" in line["text"] for line in verdict["evidence"])
    hangs = run.path / "hangs" / verdict["start"]
    assert "in backward" in (hangs / "rank-0.txt").read_text()
    assert "state T" in (hangs / "rank-1.txt").read_text()


def test_a_stopped_rank_is_named_the_others_show_their_stacks_and_the_run_goes_on(survivor, expected):
    run = survivor(**CHANGES)
    run.submit()
    run.trains(attempt=1)
    stop_rank(run, run.rank(1))
    verdict = run.verdict(1)
    assert_hang_is_explained(run, verdict)
    assert verdict["host"] in NODES
    said = json.loads(run.wavefleet("why", run.path, "--json"))
    assert said == verdict
    first_error = run.wavefleet("logs", run.path, "--attempt", "1", "--first-error")
    assert first_error.startswith(f"rank 1 on {verdict['host']} failed first: hung in phase")
    run.ends_as(expected)
    assert [line["kind"] for line in run.verdicts()] == ["hang", "done"]
    for attempt in "12":  # both starts of the job wrote to the same files
        lines = run.wavefleet("logs", run.path, "--attempt", attempt).splitlines()
        assert len([line for line in lines if line.startswith("node 0 | ") and ", node 0 of 2: " in line]) == 1
    assert run.resumed_from(2) >= 20


def test_on_this_machine_too(recipe, expected, tmp_path):
    run = Survivor(None, None, recipe(tmp_path / "run", **CHANGES))
    command = [*WAVEFLEET, "train", str(run.recipe_file), "--processes", "2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        run.until(run.lines)
        stop_rank(run, rank_below([process.pid], 1))
        said = process.stderr.read()
    assert process.returncode == 0, said
    first, second = run.verdicts()
    assert second["kind"] == "done"
    assert_hang_is_explained(run, first)
    assert "this is a hang" in said
    logs = [*WAVEFLEET, "logs", str(run.path), "--rank", "0", "--attempt"]
    first, second = (subprocess.check_output([*logs, number], text=True) for number in "12")
    assert f"step {STEPS}/{STEPS}" not in first
    assert f"step {STEPS}/{STEPS}" in second
    run.ends_as(expected)
    assert run.resumed_from(2) >= 20
