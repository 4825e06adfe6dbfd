"""The hang detector: limits a phase, who is to blame, stacks of all ranks, one verdict for all nodes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ranks import RankError, run_ranks
from small_run import recipe  # noqa: F401  recipe is a fixture

from asr_train.config import LimitSettings
from asr_train.files import read_json, write_json
from asr_train.phase import FOLDER, PhaseFile, read_record
from asr_train.train import train
from asr_train.training_log import TrainingLog
from launch.ending.outcome import judge
from launch.node import hang, stacks
from launch.node.hang import HangWatch, blamed
from launch.node.ranks import RankState
from launch.verdict import Evidence, NodeReport

LIMITS = LimitSettings(start_s=100, checkpoint_s=200, evaluation_s=400)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watched(clock, tmp_path, monkeypatch):
    """A function: limits -> (watch, the phase file of its only rank, which is this process)."""
    watches = []

    def make(limits=LIMITS, **options):
        watch = HangWatch([0], limits, tmp_path / "hangs" / "7.0", host="n1", clock=clock, **options)
        watches.append(watch)
        return watch, PhaseFile(Path(watch.environment[FOLDER]), 0)

    yield make
    for watch in watches:
        watch.__exit__(None, None, None)


def passes(watch, clock, seconds):
    """Let time go by as an agent sees it, in polls; whether it saw a hang."""
    for _poll in range(round(seconds)):
        clock.now_s += 1
        if watch.look():
            return True
    return False


def test_a_rank_that_never_shows_a_phase_has_the_limit_of_the_start(watched, clock):
    watch, _rank = watched()
    assert not passes(watch, clock, 100)
    assert passes(watch, clock, 2)


@pytest.mark.parametrize(
    ("phase", "limit_s"), [("start", 100), ("checkpoint", 200), ("evaluation", 400), ("end", 200), ("step", 100)]
)
def test_every_phase_has_its_limit_and_begins_anew_with_every_change(watched, clock, phase, limit_s):
    """A first step has the limit of the start, for nothing is known of steps yet."""
    watch, rank = watched()
    rank.show(phase, 5)
    assert not passes(watch, clock, limit_s - 1)
    rank.show(phase, 5)  # another unit, another set
    assert not passes(watch, clock, limit_s)
    assert passes(watch, clock, 2)
    assert hang.found(watch._shared).phase == phase


def test_preparing_a_corpus_takes_as_long_as_it_takes(watched, clock):
    watch, rank = watched()
    rank.show("prepare")
    assert not passes(watch, clock, 10_000)


@pytest.mark.parametrize(("usual_s", "limit_s"), [(0.5, 300), (60.0, 1200)])
def test_a_step_may_take_20_times_the_usual_and_300_s_at_least(watched, clock, usual_s, limit_s, monkeypatch):
    watch, rank = watched()
    monkeypatch.setattr("asr_train.phase.time.monotonic", clock)
    for step in range(1, 6):
        rank.show("step", step)
        clock.now_s += usual_s
    rank.show("step", 6)
    monkeypatch.undo()
    clock.now_s = clock.now_s + 1
    watch._last_s = clock.now_s
    watch.look()
    assert not passes(watch, clock, limit_s - 1)
    assert passes(watch, clock, 2)


def test_a_limit_that_the_recipe_gives_is_kept_to(watched, clock):
    watch, rank = watched(LimitSettings(step_s=7))
    rank.show("step", 1)
    assert not passes(watch, clock, 1000)  # the first one connects ranks, and compiles
    rank.show("step", 2)
    assert not passes(watch, clock, 7)
    assert passes(watch, clock, 2)


def test_the_time_in_which_the_agent_itself_was_stopped_does_not_count(watched, clock):
    """Slurm suspends whole jobs."""
    watch, rank = watched()
    rank.show("checkpoint", 5)
    assert not passes(watch, clock, 150)
    clock.now_s += 3600
    assert not passes(watch, clock, 49)
    assert passes(watch, clock, 5)


def state(rank, num_changes=10, letter="S", **more):
    return RankState(rank=rank, host=f"n{rank}", phase="step", step=5, num_changes=num_changes, state=letter, **more)


@pytest.mark.parametrize(
    ("ranks", "culprit"),
    [
        ([state(0), state(1, letter="T")], 1),
        ([state(0, 9), state(1, letter="t")], 1),
        ([state(0, 9), state(1, letter="D")], 1),
        ([state(0, letter="D"), state(1, letter="T")], 1),
        ([state(0), state(1, letter="Z")], 1),
        ([state(0, letter="T"), state(1, 9, letter="T")], 1),
        ([state(0), state(1), state(2, 9)], 2),
        ([state(0), state(1, 9), state(2, 9)], None),
        ([state(0), state(1)], None),
        ([state(0)], 0),
        ([state(0), RankState(rank=1, host="n1")], 1),
        ([], None),
    ],
)
def test_who_is_to_blame(ranks, culprit):
    """A stopped process first, then one that waits for a disk, then the only one that is behind all others."""
    found = blamed(ranks)
    assert (None if found is None else found.rank) == culprit


LIVES = """
import os, sys, time
from asr_train.phase import PhaseFile
rank = PhaseFile.from_environment(os.environ)
rank.show("step", 3)
def compute():
    for _turn in range(int(sys.argv[1])):
        rank.show("step", 4)
    time.sleep(600)
compute()
"""


@pytest.fixture
def processes():
    """A function: watch, rank, units made -> a real process that has shown a phase, and went to sleep."""
    started = []

    def start(watch, rank, num_units=3):
        environ = {**os.environ, **watch.environment, "RANK": str(rank)}
        process = subprocess.Popen([sys.executable, "-c", LIVES, str(num_units)], env=environ)
        started.append(process)
        while (read_record(watch._folder, rank) or {}).get("num_changes") != 1 + num_units:
            time.sleep(0.02)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def look_until_hang(watch, timeout_s=300):
    until = time.monotonic() + timeout_s
    while not watch.look():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_stopped_rank_is_named_and_all_others_show_their_stacks(processes, tmp_path):
    shared = tmp_path / "hangs" / "7.0"
    with HangWatch([0, 1], LimitSettings(step_s=1), shared, host="n1") as watch:
        processes(watch, 0)
        stopped = processes(watch, 1)
        stopped.send_signal(signal.SIGSTOP)
        look_until_hang(watch)
        folder = watch._folder
    assert not folder.exists()
    found = hang.found(shared)
    assert (found.rank, found.host, found.state, found.phase, found.step) == (1, "n1", "T", "step", 4)
    assert "in compute" in (shared / "rank-0.txt").read_text()
    silent = (shared / "rank-1.txt").read_text()
    assert "state T" in silent
    assert "cannot answer" in silent
    verdict = judge(
        Evidence(num_ranks=2, time=found.time + 5, hang=found, nodes={"n1": NodeReport(exit_code=-9, ranks=(0, 1))})
    )
    assert (verdict.kind, verdict.action, verdict.rank, verdict.step) == ("hang", "retry", 1, 4)
    assert "stopped by a signal" in verdict.message
    assert any("hangs/7.0/" in line.text for line in verdict.evidence)


def test_the_rank_that_is_behind_is_named_by_its_place_in_the_step(processes, tmp_path):
    shared = tmp_path / "hangs" / "7.0"
    with HangWatch([0, 1, 2], LimitSettings(step_s=1), shared, host="n1") as watch:
        for rank, num_units in enumerate((3, 2, 3)):
            processes(watch, rank, num_units)
        look_until_hang(watch)
    found = hang.found(shared)
    assert (found.rank, found.state) == (1, "S")


def test_a_rank_whose_process_is_gone_or_never_came_has_no_stacks_and_keeps_nobody_waiting(
    processes, tmp_path, monkeypatch
):
    monkeypatch.setattr(stacks, "_ANSWER_S", 300)
    shared = tmp_path / "hangs" / "7.0"
    with HangWatch([0, 1], LimitSettings(step_s=1, start_s=600), shared) as watch:
        gone = processes(watch, 0)
        gone.kill()
        gone.wait()
        began_s = time.monotonic()
        look_until_hang(watch)
        assert time.monotonic() - began_s < 300
    assert "its process is gone" in (shared / "rank-0.txt").read_text()
    assert "never showed a phase" in (shared / "rank-1.txt").read_text()


def test_the_hang_that_one_node_sees_is_written_down_by_all(processes, tmp_path):
    """Node 1's rank is stopped in what has no limit; node 0 sees that its own rank goes on no more."""
    shared = tmp_path / "hangs" / "7.0"
    patient = LimitSettings(start_s=600)
    with (
        HangWatch([0], LimitSettings(step_s=1), shared, node=0, num_nodes=2, host="n1") as first,
        HangWatch([1], patient, shared, node=1, num_nodes=2, host="n2") as second,
    ):
        processes(first, 0)
        processes(second, 1, num_units=2).send_signal(signal.SIGSTOP)
        other = threading.Thread(target=look_until_hang, args=(second,))
        other.start()
        look_until_hang(first)
        other.join()
    assert {path.name for path in shared.glob("*.json")} == {"hang-0.json", "ranks-0.json", "ranks-1.json"}
    assert {path.name for path in shared.glob("*.txt")} == {"rank-0.txt", "rank-1.txt"}
    found = hang.found(shared)
    assert (found.rank, found.host, found.state) == (1, "n2", "T")
    assert found.time == read_json(shared / "hang-0.json")["time"]


def test_a_node_that_is_gone_keeps_the_others_waiting_for_a_grace_only(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(hang, "_GRACE_S", 1.0)
    shared = tmp_path / "hangs" / "7.0"
    with HangWatch([0], LimitSettings(step_s=1), shared, node=0, num_nodes=2) as watch:
        processes(watch, 0)
        look_until_hang(watch)
    assert hang.found(shared).rank == 0


def test_the_first_of_several_that_saw_it_gives_the_time(tmp_path):
    for node, seconds in ((0, 50.0), (1, 40.0)):
        content = {"node": node, "host": f"n{node}", "time": seconds, "limit_s": 1, **state(node).to_json()}
        write_json(tmp_path / f"hang-{node}.json", content)
        write_json(tmp_path / f"ranks-{node}.json", {"ranks": [state(node).to_json()]})
    (tmp_path / "hang-2.json").write_text("{")
    found = hang.found(tmp_path)
    assert (found.time, found.rank, found.phase) == (40.0, None, "step")


def test_no_hang_no_folder(watched, clock):
    watch, rank = watched()
    rank.show("step", 1)
    assert not passes(watch, clock, 50)
    assert not watch._shared.exists()
    assert hang.found(watch._shared) is None


PIPED = """
import os, sys, time
from pathlib import Path
pipe, trace = sys.argv[1:]
os.mkfifo(pipe)
reading = os.open(pipe, os.O_RDONLY)
while not os.read(reading, 1):
    time.sleep(0.02)
Path(trace).write_text("collectives")
"""


def is_read(pipe):
    """Whether somebody reads a pipe, who is not written to now."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_nccl_is_asked_for_its_record_of_collectives(watched, clock):
    """A process that does with the pipe what NCCL's process group does."""
    watch, rank = watched(LimitSettings(checkpoint_s=1))
    rank.show("checkpoint", 1)
    pipe = watch.environment["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + "0.pipe"
    trace = watch.environment["TORCH_FR_DUMP_TEMP_FILE"] + "0"
    process = subprocess.Popen([sys.executable, "-c", PIPED, pipe, trace])
    while not is_read(pipe):
        time.sleep(0.02)
    assert passes(watch, clock, 3)
    process.wait()
    assert (watch._shared / Path(trace).name).read_text() == "collectives"


def test_what_nccl_writes_when_its_own_timeout_comes_first_is_kept(tmp_path):
    with HangWatch([0], LIMITS, tmp_path / "hangs" / "7.0") as watch:
        Path(watch.environment["TORCH_FR_DUMP_TEMP_FILE"] + "0").write_text("collectives")
    assert (tmp_path / "hangs" / "7.0" / "nccl-trace-0").read_text() == "collectives"
    assert hang.found(tmp_path / "hangs" / "7.0") is None


def test_variables_that_a_person_set_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "50")
    with HangWatch([0], LIMITS, tmp_path) as watch:
        assert "TORCH_FR_BUFFER_SIZE" not in watch.environment


def test_a_full_disk_ends_a_hang_all_the_same(watched, clock, tmp_path, capsys):
    (tmp_path / "hangs").write_text("no folder can be made here")
    watch, rank = watched()
    rank.show("checkpoint", 5)
    assert passes(watch, clock, 202)
    assert "could be written down" in capsys.readouterr().err


def test_a_training_that_waits_for_data_on_one_rank(recipe, tmp_path):  # noqa: F811
    """Rank 1 gets no data for step 3; rank 0 waits for its gradients, in the same step."""
    shared = tmp_path / "hangs" / "7.0"
    starved = recipe("starved", max_steps=6)
    with HangWatch([0, 1], LimitSettings(step_s=5), shared) as watch:

        def no_data(self, turns):
            if read_record(watch._folder, 1)["step"] == 3:
                time.sleep(600)
            return next_turn(self, turns)

        def training():
            os.environ.update(watch.environment)
            if os.environ["RANK"] == "1":
                TrainingLog.next_turn = no_data
            return train(starved)

        next_turn = TrainingLog.next_turn

        def end_on_hang():
            while (read_record(watch._folder, 1) or {}).get("step") != 3:
                time.sleep(0.1)
            look_until_hang(watch)
            for rank in (0, 1):
                os.kill(read_record(watch._folder, rank)["pid"], signal.SIGKILL)

        agent = threading.Thread(target=end_on_hang)
        agent.start()
        with pytest.raises(RankError):
            run_ranks(2, training)
        agent.join()
    found = hang.found(shared)
    assert (found.rank, found.phase, found.step) == (1, "step", 3)
    assert "in no_data" in (shared / "rank-1.txt").read_text()
    assert "in backward" in (shared / "rank-0.txt").read_text()
