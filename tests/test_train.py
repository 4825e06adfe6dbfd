"""The promises of the loop: the same run on any number of processes, nothing lost, nothing twice, bit-equal resume."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_run import assert_close, audio, losses, recipe, run_on, trained, weights  # noqa: F401  fixtures

from asr_train import checkpoints, loop
from asr_train.errors import CheckpointError
from asr_train.files import read_json, read_jsonl
from asr_train.prepare import prepare
from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir, read_metrics
from asr_train.train import train

# ruff: noqa: F811  their names as arguments


def test_1_2_and_3_processes_make_the_same_run(recipe):
    one, two, three = (run_on(size, recipe(f"on{size}", units_per_step=5)) for size in (1, 2, 3))
    assert len(losses(one)) == 60
    assert_close(losses(two), losses(one))
    assert_close(losses(three), losses(one))
    assert trained(one) == trained(two) == trained(three)
    steps = read_json(one.path / "attempts" / "attempt-001.json")
    assert steps["world_size"] == 1
    everyone = Counter(ids_ for ids in trained(two).values() for ids_ in ids)
    per_epoch = next(line for line in read_jsonl(one.metrics) if line.get("event") == "started")["steps_per_epoch"]
    whole_epochs = 60 // per_epoch
    assert whole_epochs >= 2
    seen = Counter(ids_ for step, ids in trained(two).items() if step <= whole_epochs * per_epoch for ids_ in ids)
    assert set(seen.values()) == {whole_epochs}
    assert seen.keys() == everyone.keys()

    assert audio(one) == audio(two) == audio(three)  # exactly
    rows = prepare(recipe("on1", units_per_step=5)).train
    seconds = {rows.id(row): rows.num_samples[row] / 16_000 for row in range(len(rows))}
    lines, whole = audio(one)
    for step, ids in trained(one).items():
        num_utterances, audio_s, padded_audio_s = lines[step]
        assert num_utterances == len(ids)
        assert audio_s == pytest.approx(sum(seconds[name] for name in ids))
        assert audio_s < padded_audio_s < 1.5 * audio_s
    assert whole == [sum(everyone.values()), pytest.approx(sum(line[1] for line in lines.values()))]


def test_a_step_with_fewer_units_than_ranks(recipe):
    one = run_on(1, recipe("on1", units_per_step=2, max_steps=20))
    three = run_on(3, recipe("on3", units_per_step=2, max_steps=20, allow_idle_ranks=True))
    assert_close(losses(three), losses(one))
    assert trained(three) == trained(one)
    assert audio(three) == audio(one)


def test_accelerate_launch_makes_the_same_run_too(recipe, tmp_path):
    alone = run_on(1, recipe("alone", max_steps=50))
    launched = recipe("launched", max_steps=50)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(launched))
    config = Path(__file__).parent.parent / "accelerate_configs" / "cpu.yaml"
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2",
            "--main_process_port", "0", "-m", "asr_train", str(path),
        ],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = RunDir(Path(launched.run_dir))
    assert_close(losses(run), losses(alone))
    assert {rank: found["status"] for rank, found in run.outcomes().items()} == {0: "done", 1: "done"}


def start(recipe, own_group=False, slow_after=None):
    """Train in a forked process, in a process group of its own if asked, slowly after a step if asked; its pid."""
    forward = loop._forward

    def slowly(job, turn, *rest):
        if turn.epoch * job.plan.steps_per_epoch + turn.step >= slow_after:
            time.sleep(0.1)
        return forward(job, turn, *rest)

    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if own_group:
                os.setsid()
            if slow_after is not None:
                loop._forward = slowly
            code = train(recipe)
        finally:
            os._exit(code)
    return pid


def wait_for_step(recipe, step):
    run = RunDir(Path(recipe.run_dir))
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_metrics(run)):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(recipe, number, num_workers):
    def slowed(name):
        return recipe(name, max_steps=40, num_workers=num_workers, checkpoint__every="7")

    whole = run_on(1, slowed("whole"))
    broken = slowed("broken")
    pid = start(broken, slow_after=17)  # so that the signal comes before the end, on a busy machine too
    wait_for_step(broken, 17)
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    if number == signal.SIGTERM:
        assert os.waitstatus_to_exitcode(status) == 0
        assert RunDir(Path(broken.run_dir)).outcomes()[0]["status"] == "stopped"
        assert RunDir(Path(broken.run_dir)).outcomes()[0]["exit_code"] == 3
    else:
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    resumed = run_on(1, broken)
    assert max(line["attempt"] for line in read_metrics(resumed)) == 2
    assert losses(resumed) == losses(whole)
    assert trained(resumed) == trained(whole)
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_stop_on_2_processes_resume_on_3_then_on_1(recipe):
    one = run_on(1, recipe("one", max_steps=30))
    moving = recipe("moving", max_steps=30)

    def stopping():
        if os.environ["RANK"] == "1":  # one rank is told; all stop after the same step
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            signal.setitimer(signal.ITIMER_REAL, 1.0)
        return train(moving)

    run = RunDir(Path(moving.run_dir))
    assert run_ranks(2, stopping) == [0, 0]
    first = checkpoints.newest(run.checkpoints).step
    assert {found["status"] for found in run.outcomes().values()} == {"stopped"} or first == 30
    run_on(3, moving)
    assert_close(losses(run), losses(one))
    assert trained(run) == trained(one)


def test_a_frozen_transformer_thaws_at_its_step_wherever_the_run_was_stopped(recipe):
    def frozen(name, **changes):
        return recipe(name, max_steps=12, model__freeze_transformer_steps=6, checkpoint__every="1",
                      checkpoint__keep_last=20, **changes)  # fmt: skip

    whole = run_on(1, frozen("whole"))
    start_weights = weights(whole, 1)
    before_thaw, after_thaw = weights(whole, 6), weights(whole, 7)
    moved = {key for key in start_weights if not torch.equal(start_weights[key], before_thaw[key])}
    assert moved == {key for key in start_weights if ".lm_head." in key}
    assert any(not torch.equal(before_thaw[key], after_thaw[key]) for key in before_thaw if ".encoder." in key)
    two = run_on(2, frozen("two"))
    assert_close(losses(two), losses(whole))
    for stop_at in (5, 6, 7):
        resumed = frozen(f"stop{stop_at}")
        _copy_run_until(whole, RunDir(Path(resumed.run_dir)), stop_at)
        run = run_on(1, resumed)
        for key, tensor in weights(whole, 12).items():
            assert torch.equal(weights(run, 12)[key], tensor), (stop_at, key)


def _copy_run_until(source, target, step):
    for found in checkpoints.whole(source.checkpoints):
        if found.step <= step:
            shutil.copytree(found.path, target.checkpoints / found.path.name)
    for name in ("run.json", "recipe.yaml"):
        shutil.copy(source.path / name, target.path / name)


def test_a_torn_checkpoint_is_set_aside_and_none_whole_is_a_hard_stop(recipe):
    run = run_on(1, recipe("torn", max_steps=6, checkpoint__every="2", checkpoint__keep_last=9))
    shard = next((run.checkpoints / "step-0000000006" / "shards").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert checkpoints.newest(run.checkpoints).step == 4
    for found in checkpoints.whole(run.checkpoints):
        (found.path / "MANIFEST.json").unlink()
    run.done.unlink()

    def refused():
        with pytest.raises(CheckpointError, match="no checkpoint that can be used"):
            train(run.recipe())

    for _ in range(2):  # not even when the folder looks empty does it start from nothing
        run_ranks(1, refused)
        assert run.outcomes()[0]["exit_code"] == 5
    assert len(list((run.checkpoints / ".quarantine").iterdir())) == 3


def test_a_signal_to_the_whole_process_group_stops_a_run_with_data_workers(recipe):
    """Launchers stop a worker by its process group; the data workers in it must not take the training down."""
    slow = recipe("slow", max_steps=400, num_workers=2)

    pid = start(slow, own_group=True)
    wait_for_step(slow, 5)
    os.killpg(pid, signal.SIGTERM)
    os.killpg(pid, signal.SIGTERM)  # and once more, as torchrun does
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    run = RunDir(Path(slow.run_dir))
    assert run.outcomes()[0]["status"] == "stopped"
    assert checkpoints.newest(run.checkpoints).step == run.outcomes()[0]["step"]
    with pytest.raises(ProcessLookupError):  # no data worker is left behind
        os.killpg(pid, 0)


def test_an_evaluation_that_a_stop_came_before_is_made_up_for(recipe):
    whole = run_on(1, recipe("whole", max_steps=6, eval__every="3"))
    stopped = recipe("stopped", max_steps=6, eval__every="3")

    def stopping():
        loop._forward = stop_in_forward(3)
        return train(stopped)

    assert run_ranks(1, stopping) == [0]
    run = RunDir(Path(stopped.run_dir))
    assert checkpoints.newest(run.checkpoints).step == 3
    assert not [line for line in read_metrics(run) if "set" in line]
    run_on(1, stopped)
    scores = [[(line["step"], line["wer"]) for line in read_metrics(found) if "set" in line] for found in (whole, run)]
    assert scores[0] == scores[1]
    assert [step for step, _ in scores[0]] == [3, 6]
    assert read_json(run.done)["best_step"] == read_json(whole.done)["best_step"]


def stop_in_forward(step):
    """The loop's forward, with a stop signal to this process in the unit that ends `step` updates."""
    forward = loop._forward
    turns = []

    def signalling(job, turn, *rest):
        turns.append(turn)
        if turn.is_last and sum(found.is_last for found in turns) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(job, turn, *rest)

    return signalling


def test_a_torn_last_checkpoint_is_written_anew_and_said(recipe, capfd):
    run = run_on(1, recipe("torn", max_steps=6, checkpoint__every="2", checkpoint__keep_last=9))
    shard = next((run.checkpoints / "step-0000000006" / "shards").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    run.done.unlink()
    assert run_ranks(1, train, run.recipe()) == [0]
    assert "step-0000000006 is not whole, and was set aside" in capfd.readouterr().err
    assert checkpoints.newest(run.checkpoints).step == 6
