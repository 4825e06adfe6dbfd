"""Attempts that end again and again: from outside, in the middle of a save; or by themselves, at the same step."""

import os
import signal
from pathlib import Path

import pytest
from ranks import RankError, run_ranks
from small_run import losses, recipe, run_on  # noqa: F401  recipe is a fixture

from asr_train import checkpoint, checkpoints, loop
from asr_train.errors import CheckpointError
from asr_train.run_dir import RunDir
from asr_train.train import train
from asr_train.training_log import TrainingLog

EVERY = {"checkpoint__every": "2", "checkpoint__keep_last": 1, "checkpoint__keep_best": 0}


def killed_in_the_middle_of_a_save(recipe, number):  # noqa: F811
    """Killed when its first save has written its shards, or half of its manifest, or just been given its name."""
    points = {0: "_write", 1: "_commit", 2: "_verify_and_prune"}
    name = points[number % 3]
    do = getattr(checkpoint.Saver, name)

    def dying(self, *rest):
        if name != "_verify_and_prune":
            do(self, *rest)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(checkpoint.Saver, name, dying)
    return train(recipe)


def test_with_one_kept_the_last_good_one_survives_any_number_of_kills(recipe):  # noqa: F811
    whole = run_on(2, recipe("whole", max_steps=14, **EVERY))
    looping = recipe("looping", max_steps=14, **EVERY)
    run = RunDir(Path(looping.run_dir))

    def first():
        count = 0
        save = loop._Saves.save

        def dying(self, *rest, **how):
            nonlocal count
            save(self, *rest, **how)
            self._job.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)

        loop._Saves.save = dying
        return train(looping)

    with pytest.raises(RankError):
        run_ranks(2, first)
    for number in range(6):
        before = checkpoints.newest(run.checkpoints)
        with pytest.raises(RankError):
            run_ranks(2, killed_in_the_middle_of_a_save, looping, number)
        after = checkpoints.newest(run.checkpoints)
        assert checkpoints.verify(after).problem is None
        assert after.step >= before.step
        assert run.failures(looping) == {}
    run_on(2, looping)
    assert losses(run) == losses(whole)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-0000000014"]


def test_attempts_that_fail_by_themselves_step_back_once_and_then_stop_with_a_reason(recipe, capfd):  # noqa: F811
    """An error in step 5, each time; saves at 2 and 4. What is saved at 4 again is nothing new."""
    doomed = recipe("doomed", max_steps=12, checkpoint__every="2", checkpoint__keep_last=9)
    run = RunDir(Path(doomed.run_dir))
    count = TrainingLog.count_skip

    def failing():
        def fail_at_5(self, *rest, **how):
            if self._state.step == 5:
                raise ValueError("utterance 17 is cursed")
            count(self, *rest, **how)

        TrainingLog.count_skip = fail_at_5
        return train(doomed)

    def stopped():
        with pytest.raises(CheckpointError, match=r"3 attempts failed from step-0000000004.*, and as many from"):
            train(doomed)

    begun = []
    for _ in range(7):
        with pytest.raises(RankError, match="cursed"):
            run_ranks(1, failing)
        begun.append(run.attempt_record(run.newest_attempt()).get("resumed_from"))
    assert begun[:4] == [None, *["step-0000000004"] * 3]
    assert begun[4:] == ["step-0000000002"] * 3
    assert "3 attempts failed from step-0000000004; going on from the one before it" in capfd.readouterr().err
    run_ranks(1, stopped)
    assert run.outcomes()[0]["exit_code"] == 5
    assert "checkpoint.max_failed_attempts=4" in run.outcomes()[0]["message"]
    more = recipe("doomed", max_steps=12, checkpoint__every="2", checkpoint__keep_last=9,
                  checkpoint__max_failed_attempts=9)  # fmt: skip
    run_on(1, more)  # the cause is removed
    assert max(losses(run)) == 12
