"""Trainings as jobs on a real Slurm: submitted, stopped, gone on with, as if one process had trained all the while."""

import json
import re
import shutil
import signal
import subprocess
import sys

from survivor import expected, profile, recipe, reference, survivor  # noqa: F401  fixtures

from asr_train.files import read_json
from launch.jobs.notify import WEBHOOK

# ruff: noqa: F811  their names as arguments

# `wavefleet`, which kills itself where it would write down the job that it has submitted
KILLED_WHEN_SUBMITTED = """
import os, signal, sys
from launch import cli
from launch.jobs import submit
submit._note = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cli.main(sys.argv[1:])
"""


def test_a_run_on_two_nodes_to_its_end(survivor, expected):
    run = survivor()
    secrets = {"HF_TOKEN": "hf_planted0123", "WAVEFLEET_WEBHOOK": "http://127.0.0.1:9/planted4567"}
    assert "submitted as job" in run.wavefleet(*run.submission, environ=secrets)
    assert "already" in run.wavefleet(*run.submission)
    run.ends_as(expected)
    assert run.lines("started")[0]["world_size"] == 2
    assert read_json(run.run.done)["step"] == run.status()["step"] == run.recipe.max_steps
    assert [line["kind"] for line in run.verdicts()] == ["done"]
    verdict = json.loads(run.wavefleet("why", run.path, "--json"))
    assert (verdict["kind"], verdict["exit_code"]) == ("done", 0)
    assert WEBHOOK in "".join(path.read_text() for path in run.path.glob("slurm/*_log.err"))  # it had the secrets
    written = [path for path in run.path.rglob("*") if path.is_file()]
    assert [path for path in written if re.search(rb"planted(0123|4567)", path.read_bytes())] == []
    assert [path for path in [run.path, run.path / "slurm"] if path.stat().st_mode & 0o077] == []
    assert "--force" in run.wavefleet(*run.submission, code=2)


def test_a_killed_submitter_edited_code_warnings_and_a_controller_that_is_down(survivor, expected, tmp_path):
    """The checkout is a copy, whose program is broken as soon as the job is in the queue."""
    run, checkout = survivor(), tmp_path / "checkout"
    for name in ("asr_train", "launch", "accelerate_configs", "recipes", "slurm"):
        shutil.copytree(name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy("pyproject.toml", checkout)
    environ = {**run.cluster.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", KILLED_WHEN_SUBMITTED, *map(str, run.submission)]
    assert subprocess.run(command, env=environ, cwd=checkout, check=False).returncode == -signal.SIGKILL
    for path in ("asr_train/loop.py", "launch/node_agent.py"):
        (checkout / path).write_text("raise RuntimeError('edited')\n")
    (job,) = (number for number, fields in run.cluster.jobs().items() if fields["JobState"] == "PENDING")
    assert run.cluster.job(job)["Reason"] == "JobHeldUser"
    assert not list(run.path.glob("jobs/*"))

    said = run.wavefleet(*run.submission)
    assert f"job {job} was submitted for this run and never written down; it is now" in said
    assert f"job {job} is " in run.wavefleet(*run.submission)

    run.trains(attempt=1)
    with run.paused():
        run.cluster.kill_controller()
        found = run.status()
        assert found["slurm_problem"]
        assert found["step"] >= 2
        run.cluster.start_controller()
        found = run.status()
        assert (found["slurm_problem"], found["state"], found["job_id"]) == (None, "running", job)
        run.cluster.run("scancel", "--signal=USR2", job)  # to every process, as before a time limit
        run.until(run.is_asked_to_stop)
    assert run.verdict(1)["kind"] == "time_limit"
    run.trains(attempt=2)
    run.signal_agents(signal.SIGUSR2)  # and to them alone
    assert run.verdict(2)["kind"] == "time_limit"
    run.ends_as(expected)
    assert [run.resumed_from(attempt) for attempt in (2, 3)] == [line["step"] for line in run.lines("stopped")]
    assert run.status()["job_id"] == job
    assert len(list(run.path.glob("code/*"))) == 1


def test_save_stop_and_going_on_with_the_same_command(survivor, expected):
    run = survivor(checkpoint={"every": None})
    run.submit()
    run.trains(attempt=1)
    with run.paused():
        assert run.status()["checkpoint"] is None
        run.wavefleet("save", run.path)
    run.until(lambda: list(run.run.checkpoints.glob("step-*")))
    with run.paused():
        run.wavefleet("stop", run.path)
    assert run.verdict(1)["kind"] == "stopped_by_user"
    run.until(lambda: run.status()["state"] == "stopped")
    stopped = run.status()
    assert stopped["checkpoint"] == f"step-{stopped['step']:010d}"
    assert stopped["step"] < run.recipe.max_steps
    assert "nobody trains" in run.wavefleet("stop", run.path, code=2)
    run.submit()
    run.ends_as(expected)
    assert run.resumed_from(2) == stopped["step"]
