"""A rank that is stopped in the middle of a training, on a real Slurm: found, explained, gone on without anybody."""

import json
import os
import signal
import subprocess
import time

import psutil
import pytest
from slurm_conf import NODES
from test_slurm_jobs import (  # noqa: F401  fixtures
    WAVEFLEET,
    cluster,
    losses,
    profile,
    wait_until,
    wavefleet,
)

from asr_train.files import read_json
from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir
from launch.starts import verdicts

ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}
NUM_STEPS = 100
# a checkpoint is waited for, so that one is there when the step is
SETTINGS = {
    "max_steps": NUM_STEPS, "units_per_step": 3, "log.every": 1, "num_workers": 0, "checkpoint.every": "20",
    "checkpoint.asynchronous": False, "limits.step_s": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe_file(tiny_recipe, tiny_corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump_recipe(tiny_recipe(**SETTINGS)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def expected(recipe_file, tmp_path_factory):
    """The losses of the same run, uninterrupted, in one process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    command = [*WAVEFLEET, "train", recipe_file, f"run_dir={folder}", "--processes", "1"]
    subprocess.run(command, check=True, env=ENVIRON)
    found = losses(folder)
    assert list(found) == list(range(1, NUM_STEPS + 1))
    return found


def process_of(rank, folder):
    """The process that trains a run as one of its ranks."""
    for process in psutil.process_iter():
        try:
            if f"run_dir={folder}" in process.cmdline() and process.environ().get("RANK") == str(rank):
                return process
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    raise AssertionError(f"nobody trains {folder} as rank {rank}")


def stop_rank(rank, folder, at_step):
    """SIGSTOP, once so many steps are made."""
    until = time.monotonic() + 180
    while max(losses(folder), default=0) < at_step:
        assert time.monotonic() < until
        time.sleep(0.1)
    process_of(rank, folder).send_signal(signal.SIGSTOP)


def assert_hang_is_explained(verdict, folder):
    """The verdict on the first attempt, and what it refers to."""
    start = read_json(folder / "attempts" / "attempt-001.json")["start"]
    assert (verdict["kind"], verdict["action"], verdict["rank"]) == ("hang", "retry", 1)
    assert "stopped by a signal" in verdict["message"]
    assert any(f"hangs/{start}/" in line["text"] for line in verdict["evidence"])
    assert "in backward" in (folder / "hangs" / start / "rank-0.txt").read_text()
    assert "state T" in (folder / "hangs" / start / "rank-1.txt").read_text()


def assert_went_on(folder, expected):
    """From a checkpoint, to the losses that it would have had."""
    assert read_json(folder / "attempts" / "attempt-002.json")["resumed_from"] >= "step-0000000020"
    found = losses(folder)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert abs(found[step] - loss) <= 1e-5 * abs(loss)


def test_a_stopped_rank_is_named_the_others_show_their_stacks_and_the_run_goes_on(
    cluster, profile, recipe_file, expected, tmp_path  # noqa: F811
):  # fmt: skip
    folder = tmp_path / "run"
    wavefleet(cluster, "submit", recipe_file, f"run_dir={folder}", "--cluster", profile)
    stop_rank(1, folder, at_step=25)
    wait_until(cluster, folder, lambda found: list(verdicts(RunDir(folder))))
    why = json.loads(wavefleet(cluster, "why", folder, "--json").stdout)
    assert_hang_is_explained(why, folder)
    assert why["host"] in NODES
    first_error = wavefleet(cluster, "logs", folder, "--attempt", "1", "--first-error").stdout
    assert first_error.startswith(f"rank 1 on {why['host']} failed first: hung in phase")
    wait_until(cluster, folder, lambda found: found["state"] == "done" and len(list(verdicts(RunDir(folder)))) == 2)
    assert [line["kind"] for line in verdicts(RunDir(folder))] == ["hang", "done"]
    assert_went_on(folder, expected)


def test_on_this_machine_too(recipe_file, expected, tmp_path):
    folder = tmp_path / "run"
    command = [*WAVEFLEET, "train", recipe_file, f"run_dir={folder}", "--processes", "2"]
    with subprocess.Popen(command, env=ENVIRON, stderr=subprocess.PIPE, text=True) as process:
        stop_rank(1, folder, at_step=25)
        said = process.stderr.read()
    assert process.returncode == 0, said
    first, second = verdicts(RunDir(folder))
    assert second["kind"] == "done"
    assert_hang_is_explained(first, folder)
    assert "this is a hang" in said
    logs = [*WAVEFLEET, "logs", str(folder), "--rank", "0", "--attempt"]
    first, second = (subprocess.check_output([*logs, number], text=True) for number in "12")
    assert f"step {NUM_STEPS}/{NUM_STEPS}" not in first
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in second
    assert_went_on(folder, expected)
