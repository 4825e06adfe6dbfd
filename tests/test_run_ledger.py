"""Where the time of a run went: its parts add up to the wall time, whatever happened to it, and lost is not queue."""

import time
from pathlib import Path

import pytest
from ranks import RankError, run_ranks
from rich_run import write_rich_run
from test_resume import train_and_die
from test_train import recipe  # noqa: F401  a fixture

from asr_train.files import append_jsonl, read_jsonl, write_json
from asr_train.ledger import PARTS
from asr_train.run_dir import RunDir
from asr_train.run_ledger import RUN_PARTS
from asr_train.train import train
from launch.ending.starts import Start
from launch.report.lives import read_lives, run_ledger
from launch.status import describe


def lives_of(run):
    return read_lives(run, [line for line in read_jsonl(run.metrics) if "step" in line])


class Writer:
    """Writes the files of a run; every second of a step is compute."""

    def __init__(self, path):
        self.run = RunDir(path)

    def attempt(self, number, started, *, job=None, **facts):
        """An attempt, of a start of a Slurm job where `job` says so."""
        start = None
        if job is not None:
            start = f"{job}.0"
            Start(name=start, hosts=("n1",), processes_per_node=1, time=started, job_id=job).write(self.run)
        record = {"attempt": number, "started": started, "start": start, **facts}
        write_json(self.run.path / "attempts" / f"attempt-{number:03d}.json", record)

    def submit(self, job, when):
        facts = {"job_id": job, "cluster": "c", "num_nodes": 1, "submitted": when, "code": "code"}
        write_json(self.run.path / "jobs" / f"{job}.json", facts)

    def log(self, attempt, when, step, **more):
        append_jsonl(self.run.metrics, {"attempt": attempt, "step": step, "time": when, **more})

    def ledger(self, attempt, when, step, **parts):
        seconds = {f"{part}_s": float(parts.get(part, 0.0)) for part in PARTS}
        self.log(attempt, when, step, event="ledger", ranks=[{"rank": 0, "host": "n1", "straggler": 0.0, **seconds}])

    def outcome(self, attempt, when, status):
        write_json(
            self.run.path / "outcome" / f"attempt-{attempt:03d}" / "rank-0.json",
            {"status": status, "exit_code": 0 if status == "stopped" else 4, "time": when},
        )


@pytest.fixture
def writer(tmp_path):
    return Writer(tmp_path)


# --- real ranks -------------------------------------------------------------------------------------------------


def test_two_ranks_that_stop_and_go_on_account_for_every_second_of_both_attempts(recipe):  # noqa: F811
    """The clock of this test is asked, not the run's; a night between two commands is none of the run's time."""
    first = recipe("stopped", max_steps=10, units_per_step=2, log__every=2, eval__every="3", limits__max_time_s=1e-3)
    run = RunDir(Path(first.run_dir))

    def timed(changed):
        begun = time.time()
        train(changed)
        return time.time() - begun

    lives_s = []
    for changed in (first, recipe("stopped", max_steps=10, units_per_step=2, log__every=2, eval__every="3")):
        lives_s.append(max(run_ranks(2, timed, changed)))
        time.sleep(1.5)
    lives = lives_of(run)
    ledger = run_ledger(lives)
    assert [life.ending for life in lives] == ["stopped", "done"]
    assert [life.ledger.wall_s for life in lives] == pytest.approx(lives_s, abs=0.7)
    assert sum(ledger.spent_s.values()) == pytest.approx(ledger.wall_s, rel=1e-6)
    assert ledger.spent_s.get("unaccounted", 0.0) < 0.2 * ledger.wall_s, "the ends of two processes of two seconds"
    assert not {"lost", "queue"} & set(ledger.spent_s)
    for rank in (rank for life in lives for rank in life.ledger.ranks):
        assert sum(rank[f"{part}_s"] for part in PARTS) == pytest.approx(rank["wall_s"], rel=0.01)


def test_what_a_killed_attempt_did_after_its_checkpoint_is_lost(recipe):  # noqa: F811
    """Killed after the checkpoint of step 4, the second; the next attempt finds that of step 2 alone."""
    lost = recipe("lost", max_steps=6, checkpoint__every="2", checkpoint__keep_last=9, log__every=1)
    run = RunDir(Path(lost.run_dir))
    with pytest.raises(RankError):
        run_ranks(1, train_and_die, lost, 3)
    for path in (run.checkpoints / "step-0000000004").iterdir():
        path.unlink() if path.is_file() else None
    time.sleep(1)
    assert run_ranks(1, train, lost) == [0]
    first, second = lives_of(run)
    assert (first.num_lost_steps, second.num_lost_steps) == (2, 0)
    assert first.ledger.spent_s["lost"] > 0
    assert "lost" not in second.ledger.spent_s
    for life in (first, second):
        assert sum(life.ledger.spent_s.values()) == pytest.approx(life.wall_s, rel=0.01)
    assert "queue" not in run_ledger([first, second]).spent_s


# --- files ------------------------------------------------------------------------------------------------------


def test_every_second_of_a_run_on_a_cluster_is_sorted(tiny_recipe, tiny_corpus, tmp_path):
    truth = write_rich_run(tmp_path / "rich", tiny_recipe(), tiny_corpus, pairs={})
    run = RunDir(tmp_path / "rich")
    ledger = run_ledger(lives_of(run))
    assert sum(ledger.spent_s.values()) == pytest.approx(ledger.wall_s, rel=0.01)
    assert ledger.wall_s == pytest.approx(truth.wall_s, rel=1e-6)
    assert ledger.spent_s == pytest.approx(dict(truth.spent_s), rel=1e-6, abs=1e-3)
    assert ledger.rank_s["compute"] == pytest.approx(4 * truth.spent_s["compute"])
    assert ledger.rank_s["queue"] == 0
    shares = describe(run, ask_slurm=False)["ledger"]
    assert shares == pytest.approx({part: spent_s / truth.wall_s for part, spent_s in truth.spent_s.items()}, abs=1e-6)
    assert list(shares) == [part for part in RUN_PARTS if part in shares]
    assert sum(shares.values()) == pytest.approx(1)


def test_an_evaluation_at_the_step_that_the_run_went_on_from_is_not_lost(writer):
    """Lines at 10 before it, at 10 after it, at 20; the next attempt begins at 10."""
    writer.attempt(1, 0.0)
    writer.log(1, 5.0, 0, event="started")
    writer.ledger(1, 5.0, 0, startup=5)
    writer.ledger(1, 15.0, 10, startup=5, compute=10)
    writer.ledger(1, 45.0, 10, startup=5, compute=10, evaluation=30)
    writer.ledger(1, 55.0, 20, startup=5, compute=20, evaluation=30)
    writer.attempt(2, 100.0, resumed_from="step-0000000010")
    writer.log(2, 105.0, 10, event="restored")
    first, second = lives_of(writer.run)
    assert first.ledger.spent_s == {"compute": 10, "evaluation": 30, "startup": 5, "lost": 10}
    assert second.ledger.spent_s == {"startup": 5}


def test_time_in_a_queue_is_told_from_lost_steps_and_from_idle_time(writer):
    """Job 7 waits 20 s, dies at 60; job 8 was there already, and begins at 100; job 9 came at 500, and waits 5 s."""
    writer.submit("7", 0.0)
    writer.submit("8", 10.0)
    writer.submit("9", 500.0)
    for number, (job, began, first_step) in enumerate((("7", 20.0, 0), ("8", 100.0, 10), ("9", 505.0, 20)), start=1):
        writer.attempt(number, began, job=job)
        writer.log(number, began + 2, first_step, event="restored" if first_step else "started")
        writer.ledger(number, began + 2, first_step, startup=1)
        writer.ledger(number, began + 40, first_step + 20, startup=1, compute=38)
        writer.log(number, began + 40, first_step + 20, event="saved")
        writer.outcome(number, began + 40, "stopped")
    ledger = run_ledger(lives_of(writer.run))
    assert [life.spent_s.get("queue") for life in ledger.lives] == [20, 40, 5]
    assert [life.spent_s.get("lost", 0) for life in ledger.lives] == [19, 19, 0]
    assert ledger.wall_s == 20 + 40 + 40 + 40 + 5 + 40


def test_an_attempt_that_chose_no_checkpoint_says_nothing_of_those_before_it(writer):
    writer.attempt(1, 0.0)
    writer.log(1, 5.0, 0, event="started")
    writer.ledger(1, 5.0, 0, startup=5)
    writer.ledger(1, 15.0, 10, startup=5, compute=10)
    writer.log(1, 16.0, 10, event="saved")
    writer.outcome(1, 16.0, "stopped")
    writer.attempt(2, 20.0)
    writer.outcome(2, 25.0, "failed")
    assert [life.num_lost_steps for life in lives_of(writer.run)] == [0, 0]
    writer.attempt(3, 30.0)
    writer.log(3, 35.0, 4, event="restored")
    assert [life.num_lost_steps for life in lives_of(writer.run)] == [6, 0, 0]


def test_going_back_to_an_old_checkpoint_takes_steps_from_every_attempt_since(writer):
    """0 to 100, 100 to 120, and then from 50, the newer checkpoints being damaged."""
    for number, (first_step, last_step) in enumerate(((0, 100), (100, 120), (50, 60)), start=1):
        writer.attempt(number, 1000.0 * number)
        writer.log(number, 1000.0 * number, first_step, event="restored" if first_step else "started")
        writer.log(number, 1000.0 * number + 100, last_step, loss=1.0)
        writer.log(number, 1000.0 * number + 100, last_step, event="saved")
    assert [life.num_lost_steps for life in lives_of(writer.run)] == [50, 20, 0]


def test_what_was_done_after_the_last_line_is_lost_where_nothing_was_saved_at_the_end(writer):
    """A rank fails 7 s after the line of step 10; another attempt stops in order, and takes 3 s to close its files."""
    writer.attempt(1, 0.0)
    writer.log(1, 5.0, 0, event="started")
    writer.ledger(1, 5.0, 0, startup=5)
    writer.ledger(1, 15.0, 10, startup=5, compute=10)
    writer.outcome(1, 22.0, "failed")
    writer.attempt(2, 30.0)
    writer.log(2, 35.0, 10, event="restored")
    writer.ledger(2, 35.0, 10, startup=5)
    writer.outcome(2, 38.0, "stopped")
    first, second = lives_of(writer.run)
    assert first.ledger.spent_s == {"compute": 10, "startup": 5, "lost": 7}
    assert second.ledger.spent_s == {"startup": 5, "unaccounted": 3}


def test_an_attempt_that_came_to_no_step_was_starting_all_its_life(writer):
    assert lives_of(writer.run) == []
    assert describe(writer.run, ask_slurm=False)["ledger"] == {}
    writer.attempt(1, 100.0)
    writer.outcome(1, 130.0, "failed")
    writer.attempt(2, 190.0)
    writer.log(2, 200.0, 0, event="started")
    ledger = run_ledger(lives_of(writer.run))
    assert ledger.spent_s == {"startup": 40.0}
    assert ledger.rank_s == {"startup": 40.0}


def test_a_node_agent_that_outlives_its_ranks_says_when_they_ended(writer):
    """A hang: the last line at 15, the agent ends the ranks at 60."""
    writer.attempt(1, 0.0, job="7")
    writer.log(1, 5.0, 0, event="started")
    writer.ledger(1, 5.0, 0, startup=5)
    writer.ledger(1, 15.0, 10, startup=5, compute=10)
    write_json(writer.run.path / "agents" / "7.0" / "report-0.json", {"node": 0, "host": "n1", "time": 60.0})
    (life,) = lives_of(writer.run)
    assert life.wall_s == 60
    assert life.ledger.spent_s == {"startup": 5, "lost": 55}
