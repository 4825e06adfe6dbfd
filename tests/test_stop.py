"""How a training is asked to stop or to save, and what it then does: real processes and signals."""

import ctypes
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import run_ranks
from small_run import assert_close, losses, recipe, run_on, trained  # noqa: F401  recipe is a fixture

from asr_train import checkpoint, checkpoints, loop
from asr_train.files import read_jsonl
from asr_train.run_dir import RunDir
from asr_train.stop import IMPATIENT_S, PR_SET_PDEATHSIG, Requests, StopFlag, follow_launcher
from asr_train.train import train


def at_step(actions):
    """Have each rank do something in the forward pass of a step: {(rank, step): function}."""
    forward = loop._forward
    rank = int(os.environ["RANK"])
    seen = set()

    def acting(job, turn, *rest):
        step = turn.epoch * job.plan.steps_per_epoch + turn.step + 1
        if (rank, step) in actions and step not in seen:
            seen.add(step)
            actions[rank, step]()
        return forward(job, turn, *rest)

    loop._forward = acting


def signal_me(number, *, again_after_s=None):
    def send():
        os.kill(os.getpid(), number)
        if again_after_s is not None:
            time.sleep(again_after_s)
            os.kill(os.getpid(), number)

    return send


def stopped_steps(run):
    return [line["step"] for line in read_jsonl(run.metrics) if line.get("event") == "stopped"]


@pytest.mark.parametrize(
    "actions",
    [
        pytest.param({(0, 7): signal_me(signal.SIGTERM), (1, 8): signal_me(signal.SIGTERM)}, id="different steps"),
        pytest.param({(1, 7): signal_me(signal.SIGUSR2, again_after_s=0.003)}, id="twice within 5 ms"),
        pytest.param({(1, 7): signal_me(signal.SIGINT, again_after_s=5.1)}, id="twice after 5 s, no terminal"),
        pytest.param({(0, 7): signal_me(signal.SIGTERM), (1, 7): signal_me(signal.SIGUSR1)}, id="two kinds"),
    ],
)
def test_signals_stop_all_ranks_after_one_step_and_the_run_goes_on(recipe, actions):  # noqa: F811
    whole = run_on(2, recipe("whole", max_steps=12))
    stopped = recipe("stopped", max_steps=12)

    def stopping():
        at_step(actions)
        return train(stopped)

    assert run_ranks(2, stopping) == [0, 0]
    run = RunDir(Path(stopped.run_dir))
    assert {(found["status"], found["step"]) for found in run.outcomes().values()} == {("stopped", 7)}
    assert checkpoints.newest(run.checkpoints).step == 7
    run_on(2, stopped)
    assert losses(run) == losses(whole)
    assert trained(run) == trained(whole)


def test_a_signal_during_an_asynchronous_save_waits_for_it(recipe):  # noqa: F811
    stopped = recipe("stopped", max_steps=40, checkpoint__every="5", checkpoint__keep_last=9)
    write = checkpoint.Saver._write

    def slowly(self, *rest):
        time.sleep(1)
        return write(self, *rest)

    def stopping():
        checkpoint.Saver._write = slowly
        at_step({(1, 6): signal_me(signal.SIGTERM)})
        return train(stopped)

    assert run_ranks(2, stopping) == [0, 0]
    run = RunDir(Path(stopped.run_dir))
    assert stopped_steps(run) == [6]
    assert [found.step for found in checkpoints.whole(run.checkpoints)] == [5, 6]


def test_requests_by_file_save_and_stop(recipe):  # noqa: F811
    asked = recipe("asked", max_steps=400)
    run = RunDir(Path(asked.run_dir))

    def ask(kind):
        def make():
            run.control.mkdir(exist_ok=True)
            (run.control / kind).touch()

        return make

    def asking():
        job_steps = {(1, 5): ask("save"), (0, 30): lambda: time.sleep(0.6), (1, 31): ask("stop")}
        at_step({**job_steps, (0, 6): lambda: time.sleep(0.6), (0, 32): lambda: time.sleep(0.6)})
        return train(asked)

    assert run_ranks(2, asking) == [0, 0]
    saved = [line["step"] for line in read_jsonl(run.metrics) if line.get("event") == "saved"]
    assert len(saved) == 2
    assert 5 <= saved[0] < 31 <= saved[1] < 400
    assert stopped_steps(run) == saved[1:]
    assert run.outcomes()[0]["message"] == "stopped by control/stop"
    assert not list(run.control.iterdir())  # done, and taken away


def test_a_request_that_an_earlier_attempt_did_not_live_to_see_is_forgotten(tmp_path):
    (tmp_path / "stop").touch()
    requests, stop = Requests(tmp_path, None), StopFlag()
    assert not requests.look(stop)
    assert not stop.is_set


def test_requests_of_other_users_are_not_heard(tmp_path):
    requests, stop = Requests(tmp_path, None), StopFlag()
    for kind in ("stop", "save"):
        (tmp_path / kind).touch()
        os.chown(tmp_path / kind, 12345, -1)
    assert not requests.look(stop)
    assert not stop.is_set


def test_the_time_limit_saves_and_stops(recipe):  # noqa: F811
    limited = recipe("limited", max_steps=100_000, limits__max_time_s=3)
    run = run_on(2, limited)
    assert run.outcomes()[1]["status"] == "stopped"
    assert run.outcomes()[0]["exit_code"] == 3
    assert run.outcomes()[0]["message"] == "stopped by limits.max_time_s"
    assert stopped_steps(run) == [checkpoints.newest(run.checkpoints).step]


def test_sigquit_shows_stacks_and_training_goes_on(recipe, capfd):  # noqa: F811
    asked = recipe("asked", max_steps=6)

    def asking():
        at_step({(0, 3): signal_me(signal.SIGQUIT)})
        return train(asked)

    assert run_ranks(1, asking) == [0]
    err = capfd.readouterr().err
    assert "most recent call first" in err
    assert "in fit" in err
    assert len(losses(RunDir(Path(asked.run_dir)))) == 6


STUBBORN = """
import time
from asr_train.stop import StopFlag
stop = StopFlag()
stop.install()
print("ready", flush=True)
time.sleep(60)
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(
    ("has_terminal", "pause_s", "ends"),
    [(True, 2 * IMPATIENT_S, True), (True, 0.1, False), (False, IMPATIENT_S + 0.2, False)],
)
def test_only_a_late_second_ctrl_c_at_a_terminal_exits_at_once(has_terminal, pause_s, ends):
    keyboard, terminal = pty.openpty()
    stdin = terminal if has_terminal else subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdin=stdin, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(pause_s)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        if ends:
            assert process.wait(timeout=55) == 130
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(keyboard)
        os.close(terminal)


def test_a_forked_child_does_not_react():
    def forked():
        stop = StopFlag()
        stop.install()
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0 if stop.reason is None else 1)
        _, status = os.waitpid(pid, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        return os.waitstatus_to_exitcode(status), stop.reason

    assert run_ranks(1, forked) == [(0, "SIGTERM")]


def test_outcomes_are_json_that_a_launcher_reads(recipe):  # noqa: F811
    run = run_on(2, recipe("small", max_steps=2))
    for rank in range(2):
        outcome = json.loads((run.path / "outcome" / "attempt-001" / f"rank-{rank}.json").read_text())
        assert (outcome["status"], outcome["exit_code"], outcome["step"]) == ("done", 0, 2)


@pytest.mark.parametrize(
    ("platform", "is_launched", "asked"),
    [("linux", True, [(PR_SET_PDEATHSIG, signal.SIGTERM)]), ("linux", False, []), ("darwin", True, [])],
)
def test_the_death_of_the_launcher_is_asked_for_where_the_system_can_tell(monkeypatch, platform, is_launched, asked):
    calls = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *given: calls.append(given)))
    if is_launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    else:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    follow_launcher()
    assert calls == asked
