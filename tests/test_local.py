"""`wavefleet train`: where it runs, what it refuses, how stop requests and exit codes travel."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from asr_train import resources
from asr_train.errors import RecipeError, RunError
from asr_train.recipe import load_recipe
from asr_train.run_dir import RunDir
from launch import cli, local
from launch.child import Ended
from launch.node import devices, placement

DONE = {"status": "done", "exit_code": 0, "message": ""}
STOPPED = {"status": "stopped", "exit_code": 3, "message": "stopped by SIGTERM"}
NOT_FINITE = "TrainingError: 10 steps in a row were not finite, the last one step 57 (loss of a-1); checkpoints before"
FAILED = {"status": "failed", "exit_code": 4, "message": NOT_FINITE}
BAD_DATA = {"status": "failed", "exit_code": 4, "message": "CorpusError: shard 3 is gone"}
LOST_PEER = {**FAILED, "lost_peer": True}
NO_CHECKPOINT = {"status": "failed", "exit_code": 5, "message": "CheckpointError: none of 2 can be used"}


@pytest.fixture
def machine(monkeypatch):
    """Make this machine one with so many GPUs and 16 cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)

    def set_gpus(number):
        monkeypatch.setattr(devices, "num_gpus", lambda: number)
        monkeypatch.setattr(devices, "torch_is_cpu_build", lambda: False)
        monkeypatch.setattr(devices, "num_cores", lambda: 16)

    return set_gpus


@pytest.fixture
def recipe():
    return load_recipe("demo", ["units_per_step=8"])


@pytest.mark.parametrize(
    ("gpus", "processes", "config", "num_processes", "num_threads"),
    [
        (0, None, "cpu", 1, 16),
        (0, 4, "cpu", 4, 4),
        (1, None, "one_gpu", 1, 16),
        (8, None, "ddp", 8, 2),
        (8, 2, "ddp", 2, 8),
        (8, 1, "one_gpu", 1, 16),
    ],
)
def test_the_machine_picks_the_config(machine, recipe, gpus, processes, config, num_processes, num_threads):
    machine(gpus)
    placed = placement.place(recipe, accelerate=None, processes=processes)
    chosen = (placed.config.stem, placed.num_processes, placed.num_threads, placed.on_cpu)
    assert chosen == (config, num_processes, num_threads, gpus == 0)


def test_a_named_config_takes_all_gpus_and_a_file_its_own_number(machine, recipe, tmp_path):
    machine(4)
    assert placement.place(recipe, accelerate="fsdp2", processes=None).num_processes == 4
    own = tmp_path / "mine.yaml"
    own.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    placed = placement.place(recipe, accelerate=str(own), processes=None)
    assert (placed.config, placed.num_processes) == (own, 2)


@pytest.mark.parametrize(
    ("gpus", "accelerate", "processes", "message"),
    [
        (0, "ddp", None, "this machine shows none; use --accelerate cpu"),
        (2, "ddp", 3, "3 processes need as many GPUs, and this machine shows 2; use --processes 2"),
        (2, "one_gpu", 2, "runs one process, not 2"),
        (2, "nonsense", None, "no shipped one of that name in accelerate_configs: cpu, ddp, fsdp2"),
        (0, None, 9, "units_per_step=8 keeps 8 of 9 processes busy: use --processes 8"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(machine, recipe, gpus, accelerate, processes, message):
    machine(gpus)
    with pytest.raises(RecipeError, match=message):
        placement.place(recipe, accelerate=accelerate, processes=processes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_processes: 2", "has no distributed_type"),
        ("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2", "MULTI_CPU runs one process, not 2"),
        ("distributed_type: FSDP\nuse_cpu: true", "FSDP needs GPUs"),
        ("distributed_type: MULTI_GPU\nnum_machines: 2", "several machines"),
    ],
)
def test_a_config_that_accelerate_would_not_keep_to_is_refused(machine, recipe, tmp_path, text, message):
    machine(2)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        placement.place(recipe, accelerate=str(path), processes=None)


def test_a_cpu_build_of_torch_uses_no_gpu(machine, recipe, monkeypatch, capsys):
    machine(2)
    monkeypatch.setattr(devices, "torch_is_cpu_build", lambda: True)
    assert placement.place(recipe, accelerate=None, processes=None).config.stem == "cpu"
    assert "CPU build" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 3),
        ("", 0),
        ("0,2", 2),
        ("-1,-1", 0),
        ("1,7,0", 1),  # CUDA stops at the first that is not there
        ("1,1", 1),
        ("GPU-bb", 1),
        ("GPU-zz", 0),
        ("MIG-1234,MIG-5678", 2),
    ],
)
def test_hidden_gpus_do_not_count(monkeypatch, visible, expected):
    monkeypatch.setattr(devices, "_installed_gpus", lambda: ["GPU-aa11", "GPU-bb22", "GPU-cc33"])
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert devices.num_gpus(environ) == expected


@pytest.fixture
def fake_training(machine, monkeypatch, tmp_path):
    """`wavefleet train` on a machine whose training program writes these outcomes and ends with this code."""
    machine(0)
    monkeypatch.chdir(tmp_path)
    started = []

    def install(outcomes, exit_code=0):
        def run_child(command, *, env, receivers, signals, is_over):
            started.append((command, env))
            run = RunDir(next(Path().glob("**/run.json")).parent)
            with mock.patch.dict(os.environ, env):
                number = run.start_attempt({"resumed_from": "step-0000000050"})
            for rank, outcome in outcomes.items():
                path = run.path / "outcome" / f"attempt-{number:03d}" / f"rank-{rank}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"time": 100.0, **outcome}))
            return Ended(exit_code, None)

        monkeypatch.setattr(local, "run_child", run_child)
        return started

    return install


def test_train_passes_recipe_and_flags_on_and_returns_the_ranks_code(fake_training, capsys):
    started = fake_training({0: BAD_DATA, 1: LOST_PEER}, exit_code=1)
    assert cli.main(["train", "demo", "units_per_step=2", "--processes", "2", "--debug"]) == 4
    said = capsys.readouterr().err
    assert "CorpusError: shard 3 is gone" in said
    assert "Mend what the message names, then the same command." in said
    assert "retry" not in said  # makes jobs
    ((command, env),) = started
    assert command[-5:] == ["-m", "asr_train", "demo", "units_per_step=2", "--debug"]
    assert command[command.index("--num_processes") + 1] == "2"
    assert env["ACCELERATE_USE_CPU"] == "true"
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 600


def test_a_failure_that_may_pass_is_tried_again_and_the_same_one_again_stops(fake_training, capsys):
    started = fake_training({0: FAILED}, exit_code=1)
    assert cli.main(["train", "demo"]) == 4
    assert len(started) == 2
    said = capsys.readouterr().err
    assert "Trying again from the checkpoint of step 50" in said
    assert "It failed so at step 57 in an earlier attempt already" in said
    assert cli.main(["train", "demo"]) == 4  # a person asked: what was before does not count
    assert len(started) == 4


def test_an_older_attempts_outcome_is_not_this_ones(fake_training):
    fake_training({0: STOPPED})
    assert cli.main(["train", "demo"]) == 3
    fake_training({}, exit_code=1)  # killed: wrote nothing
    assert cli.main(["train", "demo"]) == 4


def test_wrong_recipes_and_live_or_foreign_runs_start_nothing(fake_training, tmp_path):
    started = fake_training({0: DONE})
    assert cli.main(["train", "demo", "optim.lrr=1"]) == 2
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "demo", "--processes", "0"])
    assert started == []
    assert cli.main(["train", "demo", "run_dir=mine"]) == 0
    assert cli.main(["train", "demo", "run_dir=mine", "seed=9"]) == 2  # another recipe
    assert len(started) == 1


WORKER = r"""
import os, signal, sys, time
def stop(number, frame):
    time.sleep(0.5)
    sys.stdout.write("rank " + os.environ.get("RANK", "0") + " saved\n"); sys.stdout.flush()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
sys.stdout.write("ready\n"); sys.stdout.flush()
time.sleep(60)
"""


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_stop_request_reaches_every_rank_through_accelerate_launch(tmp_path, num_processes):
    """One process: accelerate passes no signal on. Two: torchrun does. Either way each rank saves, and we wait."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    placed = placement.Placement(
        config=resources.find("accelerate_configs", "cpu"), num_processes=num_processes, num_threads=1, on_cpu=True
    )
    command = [*placed.command([])[:-2], str(worker)]
    program = (
        "import json, os, sys; from launch.child import run_child, workers; "
        "ended = run_child(json.loads(sys.argv[1]), env=os.environ, receivers=workers); print('ended', *ended)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(command)],
        stdout=subprocess.PIPE,
        text=True,
        env=placed.environ(os.environ),
    )
    for _ in range(num_processes):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert sorted(out.splitlines()) == [f"ended 0 {int(signal.SIGTERM)}"] + [
        f"rank {rank} saved" for rank in range(num_processes)
    ]


@pytest.mark.parametrize("name", ["cpu", "one_gpu", "ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_each_config_and_none_sets_what_the_recipe_decides(name):
    from accelerate.commands.config.config_args import load_config_from_file  # noqa: PLC0415 - seconds, for this alone

    config = load_config_from_file(str(resources.find("accelerate_configs", name)))
    assert config.mixed_precision is None
    assert config.num_machines == 1
    deepspeed = config.deepspeed_config or {}
    assert not {"gradient_clipping", "deepspeed_config_file"} & set(deepspeed)
    assert deepspeed.get("gradient_accumulation_steps", 1) == 1
    kinds = {"cpu": "MULTI_GPU", "one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type.value == kinds.get(name, "DEEPSPEED")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fsdp2", {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "WORLD_SIZE": "2"}),
        ("cpu", {"CUDA_VISIBLE_DEVICES": "-1,-1", "WORLD_SIZE": "2"}),
    ],
)
def test_accelerate_launch_alone_hands_the_config_to_the_program(tmp_path, name, expected):
    probe = tmp_path / "probe.py"
    probe.write_text("import json, os, sys; sys.stdout.write(json.dumps(dict(os.environ)) + '\\n')")
    config = str(resources.find("accelerate_configs", name))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    done = subprocess.run([*command, str(probe)], capture_output=True, text=True, check=True)
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{key: rank[key] for key in expected} for rank in seen] == [expected] * 2


def test_a_live_run_is_refused(machine, recipe, tmp_path):
    run = RunDir(tmp_path / "run")
    with run.lock(), pytest.raises(RunError, match=f"pid {os.getpid()} on"):
        local.claim(run, recipe, allow_change=False, takes_change=False)
