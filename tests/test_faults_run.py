"""Damaged runs and checkpoints, and stop signals, through command lines: a message, its exit code, and nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fault_inputs import (
    check_refused,
    command,
    command_in_rank,
    contents,
    on_small_disk,
    remount,
    set_trap_in_a_value,
    set_trap_in_metadata,
)
from fault_run import WORK, cut_to_step, finished, goes_on, losses, recipe_file, run, trap  # noqa: F401  fixtures

from asr_train import checkpoints, evaluate, export, train
from asr_train.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_CHECKPOINT, EXIT_USAGE
from asr_train.files import read_json
from asr_train.run_dir import RunDir
from launch import cli

# ruff: noqa: F811  their names as arguments

# --- run directories --------------------------------------------------------------------------------------------


def test_a_file_where_the_run_directory_should_be(recipe_file, tmp_path):
    thesis = tmp_path / "thesis"
    thesis.write_text("years")
    for where in (thesis, thesis / "run"):
        for program, verb in ((train.main, ()), (cli.main, ("train",))):
            said = command(program, *verb, recipe_file, f"run_dir={where}")
            check_refused(said, EXIT_USAGE, f"run_dir: {where} cannot be made", "choose another")
    assert thesis.read_text() == "years"


def test_a_run_that_may_not_be_written(recipe_file, finished, tmp_path):
    """On a read-only disk, for root may write anywhere else: nothing is trained, what only reads works."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    run = RunDir(disk / "run")

    def story():
        shutil.copytree(finished.path, run.path)
        cut_to_step(run, 2)
        remount(disk, "ro")
        refused = [
            command_in_rank(train.main, recipe_file, f"run_dir={run.path}"),
            command(cli.main, "train", recipe_file, f"run_dir={run.path}"),
            command_in_rank(evaluate.main, run.path),
            command(export.main, run.path),
        ]
        taken = [
            command_in_rank(evaluate.main, run.path, "--out", out / "scores"),
            command(export.main, run.path, "--out", out / "model"),
        ]
        remount(disk, "rw")
        goes_on(recipe_file, run, finished)
        return refused, taken

    refused, taken = on_small_disk(disk, "20m", story)
    for said in refused:
        check_refused(said, EXIT_FAILED, "Read-only file system", run.path)
    assert [said.code for said in taken] == [EXIT_DONE] * 2


def test_a_live_run_is_left_alone(recipe_file, run):
    work = contents(run.path)
    with run.lock():
        lock = (run.path / "lock.json").read_text()
        said = command(train.main, recipe_file, f"run_dir={run.path}")
        check_refused(said, EXIT_USAGE, f"pid {os.getpid()} on {os.uname().nodename}", "nothing was started")
        assert (run.path / "lock.json").read_text() == lock
    assert contents(run.path) == work


@pytest.mark.parametrize("content", ["", "[1]", "name: [", "\x00", "name: tiny\n", "TRAP"])
def test_a_recipe_file_of_a_run_that_is_damaged_or_a_program(recipe_file, run, trap, content):
    (run.path / "recipe.yaml").write_text(f"name: {trap.tagged()}" if content == "TRAP" else content)
    work = contents(run.path)
    for program, arguments in (
        (train.main, (recipe_file, f"run_dir={run.path}")), (cli.main, ("train", recipe_file, f"run_dir={run.path}")),
        (evaluate.main, (run.path,)), (export.main, (run.path,)),
    ):  # fmt: skip
        call = command_in_rank if program is evaluate.main else command
        check_refused(call(program, *arguments), EXIT_USAGE, run.path / "recipe.yaml")
    assert contents(run.path) == work
    assert not trap.was_sprung()


# --- checkpoints ------------------------------------------------------------------------------------------------


def torn_manifest(folder):
    path = folder / "MANIFEST.json"
    path.write_text(path.read_text()[:50])


def manifest_of_something_else(folder):
    (folder / "MANIFEST.json").write_text("[1, 2]")


def cut_shard(folder):
    shard = next((folder / "shards").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])


def missing_state(folder):
    (folder / "state.json").unlink()


@pytest.mark.parametrize("damage", [torn_manifest, manifest_of_something_else, cut_shard, missing_state])
def test_a_broken_checkpoint_is_passed_over_and_the_run_ends_the_same(recipe_file, run, finished, damage):
    newest = run.checkpoints / "step-0000000002"
    damage(newest)
    said = command(export.main, run.path, "--checkpoint", newest)
    check_refused(said, EXIT_NO_CHECKPOINT, f"{newest} is damaged")
    goes_on(recipe_file, run, finished)


def test_none_whole_is_a_stop_and_nothing_is_lost(recipe_file, run):
    for found in checkpoints.whole(run.checkpoints):
        torn_manifest(found.path)
    work = contents(run.path, *WORK)
    for program, arguments in ((evaluate.main, (run.path,)), (export.main, (run.path,))):
        check_refused(command_in_rank(program, *arguments), EXIT_NO_CHECKPOINT, "holds no checkpoint that can be used")
        assert contents(run.path, *WORK) == work
    said = command_in_rank(train.main, recipe_file, f"run_dir={run.path}")
    assert said.code == EXIT_NO_CHECKPOINT
    assert "step-0000000001 is not whole, and was set aside" in said.err
    assert "Nothing was overwritten." in said.err
    for name in ("step-0000000001", "step-0000000002"):  # all of it is there, beside the reason
        (aside,) = (run.checkpoints / ".quarantine").glob(f"{name}-*")
        files = [path for path in work if path.startswith(f"checkpoints/{name}/")]
        assert files
        assert all((aside / path.removeprefix(f"checkpoints/{name}/")).is_file() for path in files)


def test_a_state_that_is_damaged_is_named_and_the_one_before_is_used(recipe_file, run, finished):
    path = run.checkpoints / "step-0000000002" / "state.json"
    path.write_text("{".ljust(path.stat().st_size))
    check_refused(command_in_rank(export.main, run.path), EXIT_NO_CHECKPOINT, "state.json is not what was written")
    goes_on(recipe_file, run, finished)


@pytest.mark.parametrize("set_trap", [set_trap_in_metadata, set_trap_in_a_value])
def test_a_checkpoint_that_is_a_program_is_not_run(recipe_file, run, trap, set_trap):
    """Torch itself would: it unpickles a checkpoint's metadata, and all values that are no tensors."""
    for found in checkpoints.whole(run.checkpoints):
        set_trap(found.path, trap)
    for program in (evaluate.main, export.main):
        assert command_in_rank(program, run.path).code == EXIT_NO_CHECKPOINT
    said = command_in_rank(train.main, recipe_file, f"run_dir={run.path}")
    assert said.code == EXIT_NO_CHECKPOINT
    assert "step-0000000002 is not whole, and was set aside" in said.err
    assert not trap.was_sprung()


# --- stop signals, and the real processes -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_stop_signals_save_and_the_same_command_goes_on(recipe_file, finished, tmp_path, number):
    """Twice in a row, as Ctrl-C reaches a process from the terminal and from its launcher."""
    run = RunDir(tmp_path / "run")

    def stopping():
        started = time.monotonic()

        def twice(*_):
            if losses(run):
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            elif time.monotonic() - started < 300:
                signal.setitimer(signal.ITIMER_REAL, 0.02)

        signal.signal(signal.SIGALRM, twice)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        return train.main([str(recipe_file), f"run_dir={run.path}", "max_steps=300", "checkpoint.every=null"])

    assert command_in_rank(lambda _: stopping()).code == EXIT_DONE
    outcome = run.outcomes()[0]
    assert (outcome["status"], outcome["exit_code"]) == ("stopped", 3)
    assert outcome["message"] == f"stopped by {number.name}"
    assert [found.step for found in checkpoints.whole(run.checkpoints)] == [outcome["step"]]
    last = outcome["step"] + 1
    arguments = (recipe_file, f"run_dir={run.path}", f"max_steps={last}", "--allow-change")
    assert command_in_rank(train.main, *arguments).code == EXIT_DONE
    assert sorted(losses(run)) == list(range(1, last + 1))


def test_exit_codes_of_the_real_command(recipe_file, run, tmp_path):
    """A config that contradicts the recipe, steps that are not finite, no whole checkpoint: 2, 4, 5."""
    config = tmp_path / "mine.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 1\n"
        "mixed_precision: bf16\n"
    )
    for found in checkpoints.whole(run.checkpoints):
        torn_manifest(found.path)
    wild = ["optim.lr=1e30", "optim.max_grad_norm=null", "limits.max_skipped_steps=1", "max_steps=50"]
    cases = {
        EXIT_USAGE: ([f"run_dir={tmp_path / 'new'}", "--accelerate", config], ["mixed_precision: bf16", "fp32 here"]),
        EXIT_FAILED: ([f"run_dir={tmp_path / 'wild'}", *wild], ["A step was not finite: step "]),
        EXIT_NO_CHECKPOINT: ([f"run_dir={run.path}"], ["no checkpoint that can be used"]),
    }
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    line = [sys.executable, "-m", "launch.cli", "train", str(recipe_file), "--processes", "1"]
    started = {
        code: subprocess.Popen([*line, *map(str, arguments)], env=environ, stderr=subprocess.PIPE, text=True)
        for code, (arguments, _) in cases.items()
    }
    for code, (_, words) in cases.items():
        _, errors = started[code].communicate(timeout=300)
        assert started[code].returncode == code, errors
        assert all(word in errors for word in [*words, "Rank 0 on "]), errors
    assert read_json(tmp_path / "wild" / "outcome" / "attempt-001" / "rank-0.json")["exit_code"] == EXIT_FAILED
