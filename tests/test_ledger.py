"""The ledger: every moment of a rank lies in one part."""

import time
from pathlib import Path

import pytest
from ranks import run_ranks
from small_run import recipe  # noqa: F401  a fixture

from asr_train import ledger as module
from asr_train import training_log
from asr_train.files import read_jsonl
from asr_train.ledger import PARTS, Ledger, stragglers
from asr_train.run_dir import RunDir
from asr_train.train import train
from asr_train.training_log import TrainingLog


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""

    class Clock:
        now_s = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now_s)
    return Clock


def test_every_moment_is_in_one_part(clock):
    ledger = Ledger(quadratic=0.0, age_s=7.0)
    clock.now_s += 3
    ledger.enter("other")
    clock.now_s += 1
    with ledger.within("checkpoint"):
        clock.now_s += 5
    clock.now_s += 2
    found = ledger.read()
    assert {part: seconds for part, seconds in found.items() if seconds} == {
        "startup": 10.0,
        "other": 3.0,
        "checkpoint": 5.0,
    }
    assert sum(found.values()) == ledger.wall_s == 18.0


def test_a_step_is_divided_by_cost(clock):
    """Two utterances of 10 and 8 frames, padded to 10, q = 0.1: cost 20 + 20, of it 2 + 3.6 padding."""
    ledger = Ledger(quadratic=0.1, age_s=0.0)
    ledger.begin_step()
    with ledger.within("data_wait"):
        clock.now_s += 1
    ledger.add_unit([10, 8], 10, is_idle=False)
    clock.now_s += 60
    ledger.end_step(peer_wait_s=20)
    found = ledger.read()
    assert found["data_wait"] == 1
    assert found["peer_wait"] == 20
    assert found["padding"] == pytest.approx(40 * (2 + 3.6) / 40)
    assert found["compute"] == pytest.approx(40 - found["padding"])
    assert ledger.cost == pytest.approx(40)


def test_an_idle_turn_is_waiting_for_others(clock):
    ledger = Ledger(quadratic=0.0, age_s=0.0)
    ledger.begin_step()
    ledger.add_unit([10], 10, is_idle=False)
    ledger.add_unit([5], 10, is_idle=True)
    clock.now_s += 8
    ledger.end_step(peer_wait_s=0)
    found = ledger.read()
    assert (found["compute"], found["padding"], found["peer_wait"]) == (4, 0, 4)
    assert ledger.cost == 10


def test_a_straggler_is_who_works_longer_on_the_same():
    def rank(compute_s, cost):
        return {"compute_s": compute_s, "padding_s": 0.0, "data_wait_s": 0.0, "cost": cost}

    assert stragglers([rank(10, 5), rank(20, 10), rank(30, 10), rank(0, 0)]) == pytest.approx([0.0, 0.0, 0.5, 0.0])


def ledgers(run):
    return [line for line in read_jsonl(run.metrics) if line.get("event") == "ledger"]


def test_of_many_ranks_a_line_is_written_now_and_then_and_where_something_else_took_time(recipe, monkeypatch):  # noqa: F811
    """Two that count as many here; the ledger's sums go on all the same."""
    monkeypatch.setattr(training_log, "_FEW_RANKS", -1000)
    many = recipe("many", max_steps=6, log__every=1, eval__every="4")
    assert run_ranks(2, train, many) == [0, 0]
    lines = ledgers(RunDir(Path(many.run_dir)))
    assert [line["step"] for line in lines] == [0, 4, 6]
    assert all(
        sum(rank[f"{part}_s"] for part in PARTS) == pytest.approx(rank["wall_s"], rel=0.01)
        for line in lines for rank in line["ranks"]
    )  # fmt: skip


def test_every_ranks_parts_add_up_to_its_life_and_a_slow_rank_is_waited_for(recipe):  # noqa: F811
    slowed = recipe("slowed", max_steps=6, units_per_step=2, log__every=2)

    def slow_rank_1():
        begun = time.time()
        next_turn = TrainingLog.next_turn

        def late(self, turns):
            found = next_turn(self, turns)
            if self._job.parallel.rank == 1:
                time.sleep(0.5)
            return found

        TrainingLog.next_turn = late
        train(slowed)
        return time.time() - begun

    lives_s = run_ranks(2, slow_rank_1)
    lines = ledgers(RunDir(Path(slowed.run_dir)))
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 6], "the last one after evaluation and checkpoint"
    for rank, life_s in zip(lines[-1]["ranks"], lives_s, strict=True):
        assert sum(rank[f"{part}_s"] for part in PARTS) == pytest.approx(rank["wall_s"], rel=0.01)
        assert rank["wall_s"] == pytest.approx(life_s, rel=0.1)
        assert rank["host"]
        assert rank["memory_bytes"] > 1e8
    fast, slow = lines[-1]["ranks"]
    assert fast["peer_wait_s"] > slow["peer_wait_s"] + 6 * 0.5 * 0.5
    assert slow["straggler"] > 0 > fast["straggler"]
