"""Trainings as jobs on a real Slurm: submitted, stopped, gone on with, explained. Two nodes, gloo, a tiny model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asr_train.files import read_json, read_jsonl
from asr_train.run_dir import RunDir, read_metrics
from launch.notify import WEBHOOK

WAVEFLEET = [sys.executable, "-m", "launch.cli"]


@pytest.fixture
def cluster(slurm):
    return slurm


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "small.yaml"
    path.write_text(
        "nodes: 2\ngpus_per_node: 0\ncpus_per_node: 1\ntime: 30\nsignal_lead_s: 30\nprocesses_per_node: 1\n"
        "environment: {OMP_NUM_THREADS: 1, TOKENIZERS_PARALLELISM: 'false'}\n"
    )
    return str(path)


@pytest.fixture
def recipe_file(tiny_corpus, tiny_recipe_file):
    return str(tiny_recipe_file(max_steps=12, units_per_step=3, **{"log.every": 1, "num_workers": 0}))


def wavefleet(cluster, *arguments, code=0, environ=None):
    done = subprocess.run(
        [*WAVEFLEET, *map(str, arguments)], env={**cluster.environ, "PYTHONPATH": str(Path.cwd()), **(environ or {})},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(RunDir(folder)) if "loss" in line}


def status(cluster, folder):
    return json.loads(wavefleet(cluster, "status", folder, "--json").stdout)


def wait_until(cluster, folder, condition, timeout_s=180):
    until = time.monotonic() + timeout_s
    while not condition(found := status(cluster, folder)):
        if time.monotonic() > until:
            logs = "".join(path.read_text()[-3000:] for path in (folder / "slurm").glob("*_log.*"))
            raise AssertionError(f"{found}\n{logs}")
        time.sleep(1)
    return found


def verdicts(folder):
    return [line["kind"] for line in read_jsonl(folder / "verdicts.jsonl") if "kind" in line]


def submitted(cluster, profile, recipe_file, folder, *overrides):
    wavefleet(cluster, "submit", recipe_file, f"run_dir={folder}", *overrides, "--cluster", profile)
    return status(cluster, folder)["job_id"]


def test_a_run_on_two_nodes_to_its_end(cluster, profile, recipe_file, tmp_path):
    folder = tmp_path / "run"
    submit = ["submit", recipe_file, f"run_dir={folder}", "--cluster", profile]
    secrets = {"HF_TOKEN": "hf_planted0123", "WAVEFLEET_WEBHOOK": "http://127.0.0.1:9/planted4567"}
    first = wavefleet(cluster, *submit, environ=secrets)
    assert "submitted as job" in first.stdout
    again = wavefleet(cluster, *submit)
    assert "already" in again.stdout
    found = wait_until(cluster, folder, lambda found: found["state"] == "done" and verdicts(folder))
    assert found["step"] == 12
    started = next(line for line in read_jsonl(folder / "metrics.jsonl") if line.get("event") == "started")
    assert started["world_size"] == 2
    assert read_json(folder / "done.json")["step"] == 12
    verdict = json.loads(wavefleet(cluster, "why", folder, "--json").stdout)
    assert (verdict["kind"], verdict["exit_code"]) == ("done", 0)
    assert WEBHOOK in "".join(path.read_text() for path in (folder / "slurm").glob("*_log.err"))  # it had the secrets
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in written if re.search(rb"planted(0123|4567)", path.read_bytes())] == []
    assert [path for path in [folder, folder / "slurm"] if path.stat().st_mode & 0o077] == []
    local = subprocess.run(
        [*WAVEFLEET, "train", recipe_file, f"run_dir={tmp_path / 'local'}", "--processes", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert local.returncode == 0, local.stderr
    expected = losses(tmp_path / "local")
    for step, loss in losses(folder).items():
        assert abs(loss - expected[step]) <= 1e-5 * abs(loss)
    wavefleet(cluster, *submit, code=2)  # done: needs --force


def test_stop_save_and_going_on_with_the_same_command(cluster, profile, recipe_file, tmp_path):
    folder = tmp_path / "run"
    submit = ["submit", recipe_file, f"run_dir={folder}", "max_steps=3000", "--cluster", profile]
    wavefleet(cluster, *submit)
    wait_until(cluster, folder, lambda found: found["step"] >= 3)
    wavefleet(cluster, "save", folder)
    wait_until(cluster, folder, lambda found: found["checkpoint"])
    wavefleet(cluster, "stop", folder)
    wait_until(cluster, folder, lambda found: verdicts(folder))
    assert verdicts(folder) == ["stopped_by_user"]
    stopped = wait_until(cluster, folder, lambda found: found["state"] == "stopped")
    assert stopped["checkpoint"] == f"step-{stopped['step']:010d}"
    wavefleet(cluster, "stop", folder, code=2)  # nobody trains it now
    last = stopped["step"] + 3
    wavefleet(cluster, *[*submit[:3], f"max_steps={last}", *submit[4:], "--allow-change"])
    wait_until(cluster, folder, lambda found: found["state"] == "done")
    assert list(losses(folder)) == list(range(1, last + 1))


@pytest.mark.parametrize("whole_tree", [True, False], ids=["to every process", "to the agents alone"])
def test_the_warning_before_a_time_limit_saves_and_requeues(cluster, profile, recipe_file, tmp_path, whole_tree):
    """Slurm's signal, sent by hand: a real limit is a matter of minutes."""
    folder = tmp_path / "run"
    job = submitted(cluster, profile, recipe_file, folder, "max_steps=3000")
    wait_until(cluster, folder, lambda found: found["step"] >= 3)
    if whole_tree:
        cluster.run("scancel", "--signal=USR2", job)
    else:
        for path in (folder / "agents" / f"{job}.0").glob("node-*.json"):
            os.kill(read_json(path)["pid"], signal.SIGUSR2)
    wait_until(cluster, folder, lambda found: found["attempts"] == 2 and found["step"] > found_step(folder, 1))
    assert verdicts(folder) == ["time_limit"]
    wavefleet(cluster, "stop", folder)
    wait_until(cluster, folder, lambda found: len(verdicts(folder)) == 2)
    first, second = (line for line in read_jsonl(folder / "metrics.jsonl") if line.get("event") == "stopped")
    assert second["step"] > first["step"]
    restored = next(line for line in read_jsonl(folder / "metrics.jsonl") if line.get("event") == "restored")
    assert restored["step"] == first["step"]
    assert status(cluster, folder)["job_id"] == job


def found_step(folder, attempt):
    return max(line["step"] for line in read_jsonl(folder / "metrics.jsonl") if line["attempt"] == attempt)


def test_a_failure_is_explained_and_needs_retry(cluster, profile, recipe_file, tmp_path):
    folder = tmp_path / "run"
    wild = ["optim.lr=1e30", "optim.max_grad_norm=null", "limits.max_skipped_steps=2"]
    submitted(cluster, profile, recipe_file, folder, *wild)
    wait_until(cluster, folder, lambda found: verdicts(folder) and found["state"] == "failed")
    said = wavefleet(cluster, "why", folder).stdout
    assert "2 steps in a row were not finite" in said
    submit = ["submit", recipe_file, f"run_dir={folder}", *wild, "--cluster", profile]
    refused = wavefleet(cluster, *submit, code=2)
    assert "--retry" in refused.stderr
    assert "2 steps in a row were not finite" in refused.stderr


def test_a_submitter_that_is_killed_before_it_wrote_the_job_down_leaves_one_that_is_adopted(
    cluster, profile, recipe_file, tmp_path
):
    folder = tmp_path / "run"
    job = submitted(cluster, profile, recipe_file, folder, "max_steps=3000")
    cluster.run("scontrol", "hold", job)
    shutil.rmtree(folder / "jobs")
    again = wavefleet(cluster, "submit", recipe_file, f"run_dir={folder}", "max_steps=3000", "--cluster", profile)
    assert f"job {job} " in again.stdout
    assert "never written down" in again.stderr
    wait_until(cluster, folder, lambda found: found["step"] >= 1)
    wavefleet(cluster, "cancel", folder)
    wait_until(cluster, folder, lambda found: found["state"] not in ("running", "completing"))


def test_status_works_while_slurm_does_not_answer(cluster, profile, recipe_file, tmp_path):
    folder = tmp_path / "run"
    submitted(cluster, profile, recipe_file, folder)
    wait_until(cluster, folder, lambda found: found["step"] >= 2)
    cluster.kill_controller()
    try:
        found = status(cluster, folder)
        assert found["slurm_problem"]
        assert found["step"] >= 2
    finally:
        cluster.start_controller()
    wait_until(cluster, folder, lambda found: found["state"] == "done")


def test_code_edited_after_submitting_does_not_reach_the_job(cluster, profile, recipe_file, tmp_path):
    """The checkout is a copy, whose program is broken as soon as the job is in the queue."""
    checkout = tmp_path / "checkout"
    for name in ("asr_train", "launch", "accelerate_configs", "recipes", "slurm"):
        shutil.copytree(name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy("pyproject.toml", checkout)
    folder = tmp_path / "run"
    command = [*WAVEFLEET, "submit", recipe_file, f"run_dir={folder}", "--cluster", profile]
    environ = {**cluster.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(command, env=environ, cwd=checkout, check=True)
    (checkout / "asr_train" / "loop.py").write_text("raise RuntimeError('edited')\n")
    wait_until(cluster, folder, lambda found: found["state"] == "done")


def test_a_dry_run_touches_nothing(cluster, profile, recipe_file, tmp_path):
    folder = tmp_path / "run"
    said = wavefleet(cluster, "submit", recipe_file, f"run_dir={folder}", "--cluster", profile, "--dry-run").stdout
    assert "#SBATCH --nodes=2" in said
    assert "submitit.core._submit" in said
    assert not folder.exists()
