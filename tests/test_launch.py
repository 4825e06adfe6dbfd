"""Whole trainings through the command line: `wavefleet train`, plain `accelerate launch`, a stop, going on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from asr_train import resources
from asr_train.files import read_jsonl
from asr_train.run_dir import RunDir, read_metrics

ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
WAVEFLEET = [sys.executable, "-m", "launch.cli", "train"]


@pytest.fixture
def recipe_file(tiny_corpus, tiny_recipe_file):
    """A recipe whose corpus is prepared, and which trains on in the background of a test for as long as need be."""
    return str(tiny_recipe_file(max_steps=8, units_per_step=3, **{"log.every": 1, "num_workers": 0}))


def run(command, **options):
    return subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=240, check=False, **options)


def losses(folder):
    return [line["loss"] for line in read_metrics(RunDir(folder)) if "loss" in line]


def test_plain_accelerate_launch_trains_the_same_as_wavefleet(recipe_file, tmp_path):
    ours = run([*WAVEFLEET, recipe_file, f"run_dir={tmp_path / 'ours'}", "--processes", "2"])
    assert ours.returncode == 0, ours.stderr
    config = str(resources.find("accelerate_configs", "cpu"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    plain = run([*launch, "-m", "asr_train", recipe_file, f"run_dir={tmp_path / 'plain'}"])
    assert plain.returncode == 0, plain.stderr
    assert len(losses(tmp_path / "ours")) == 8
    assert losses(tmp_path / "plain") == losses(tmp_path / "ours")
    (started,) = (line for line in read_jsonl(tmp_path / "plain" / "metrics.jsonl") if line.get("event") == "started")
    assert started["world_size"] == 2


def wait_for_step(folder, process, step):
    until = time.monotonic() + 200
    while not any(line.get("step", 0) >= step for line in read_jsonl(folder / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.2)


def test_stopped_refused_while_live_continued_elsewhere_and_done(recipe_file, tmp_path):
    folder = tmp_path / "run"
    command = [*WAVEFLEET, recipe_file, f"run_dir={folder}", "max_steps=400", "--processes", "2"]
    process = subprocess.Popen(command, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(folder, process, 2)
    second = run(command)
    assert second.returncode == 2
    assert "is being trained by pid" in second.stderr
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 3, errors
    stopped_at = len(losses(folder))

    changed = run([*WAVEFLEET, recipe_file, f"run_dir={folder}", "max_steps=400", "optim.lr=0.5"])
    assert changed.returncode == 2
    assert "optim.lr: 0.0001 -> 0.5" in changed.stderr

    last = stopped_at + 3
    finish = [*WAVEFLEET, recipe_file, f"run_dir={folder}", f"max_steps={last}", "--allow-change", "--processes", "1"]
    assert run(finish).returncode == 0
    assert [line["step"] for line in read_metrics(RunDir(folder)) if "loss" in line] == list(range(1, last + 1))
    again = run(finish)
    assert again.returncode == 0
    assert "done already" in again.stderr


def test_exit_codes_through_wavefleet_and_through_accelerate(recipe_file, tmp_path):
    """What ranks wrote decides the code of `wavefleet train`; `accelerate launch` itself knows only 0 and 1."""
    config = str(resources.find("accelerate_configs", "cpu"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    plain = [*launch, "-m", "asr_train", recipe_file]
    ours = [*WAVEFLEET, recipe_file, "--processes", "2"]

    limited = ["max_steps=100000", "limits.max_time_s=2"]
    assert run([*ours, *limited, f"run_dir={tmp_path / 'a'}"]).returncode == 3
    stopped = run([*plain, *limited, f"run_dir={tmp_path / 'b'}"])
    assert stopped.returncode == 0, stopped.stderr
    assert {found["exit_code"] for found in RunDir(tmp_path / "b").outcomes().values()} == {3}

    wild = ["optim.lr=1e30", "optim.max_grad_norm=null", "limits.max_skipped_steps=2"]
    failed = run([*ours, *wild, f"run_dir={tmp_path / 'c'}"])
    assert failed.returncode == 4
    *said, why, again = failed.stderr.splitlines()
    assert "2 steps in a row were not finite" in said[-1] + said[-2]
    assert ("wavefleet why" in why, "wavefleet train" in again) == (True, True)  # what may be done next
    assert run([*plain, *wild, f"run_dir={tmp_path / 'd'}"]).returncode == 1

    for folder in ("a", "b"):
        for manifest in (tmp_path / folder / "checkpoints").glob("step-*/MANIFEST.json"):
            manifest.unlink()
    unusable = run([*ours, *limited, f"run_dir={tmp_path / 'a'}"])
    assert unusable.returncode == 5
    assert "no checkpoint that can be used" in unusable.stderr
    assert run([*plain, *limited, f"run_dir={tmp_path / 'b'}"]).returncode == 1
    assert run([*ours, "optim.lrr=1"]).returncode == 2
