"""What a rank shows of itself: where it is, how often it went on, and its stacks when its launcher asks."""

import os
import signal
import subprocess
import sys
import time

from ranks import run_ranks
from small_run import recipe  # noqa: F401  recipe is a fixture

from asr_train import phase
from asr_train.phase import FOLDER, STACKS_SIGNAL, PhaseFile, read_record, stacks_file
from asr_train.train import train


def test_a_rank_shows_phase_step_process_and_when_it_went_on(tmp_path):
    shown = PhaseFile(tmp_path, 3)
    before = time.time()
    shown.show("start")
    shown.show("step", 7)
    record = read_record(tmp_path, 3)
    assert (record["rank"], record["phase"], record["step"], record["pid"]) == (3, "step", 7, os.getpid())
    assert record["num_changes"] == 2
    assert before <= record["changed"] <= time.time()
    shown.show("step", 7)  # the next unit
    assert read_record(tmp_path, 3)["num_changes"] == 3


def test_the_usual_time_of_a_step_is_the_median_of_whole_steps_without_saves(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(phase.time, "monotonic", lambda: now[0])
    shown = PhaseFile(tmp_path, 0)
    shown.show("start")
    assert read_record(tmp_path, 0)["step_s"] is None
    for step, seconds in ((1, 9.0), (2, 2.0), (3, 2.0), (4, 3.0)):
        for _unit in range(2):
            shown.show("step", step)
            now[0] += seconds / 2
    shown.show("checkpoint", 4)
    now[0] += 500
    shown.show("step", 5)
    assert read_record(tmp_path, 0)["step_s"] == 2.5  # of 9, 2, 2, 3


def test_a_rank_that_nobody_watches_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = PhaseFile.from_environment({"RANK": "1"})
    shown.show("start")
    assert list(tmp_path.iterdir()) == []


def test_a_shorter_record_leaves_nothing_of_a_longer_one(tmp_path):
    shown = PhaseFile(tmp_path, 0)
    shown.show("evaluation", 1_000_000_000)
    shown.show("end")
    assert read_record(tmp_path, 0)["phase"] == "end"


def test_what_is_torn_or_not_there_is_no_record(tmp_path):
    assert read_record(tmp_path, 0) is None
    (tmp_path / "rank-0.json").write_bytes(b" " * 512)
    assert read_record(tmp_path, 0) is None


ASLEEP = """
import os, time
from asr_train.phase import PhaseFile
def wait_for_what_never_comes():
    time.sleep(600)
PhaseFile.from_environment(os.environ).show("start")
wait_for_what_never_comes()
"""


def test_stacks_are_written_on_request_and_the_rank_lives_on(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ASLEEP], env={**os.environ, FOLDER: str(tmp_path), "RANK": "2"})
    try:
        while read_record(tmp_path, 2) is None:
            time.sleep(0.02)
        for _time in range(2):
            process.send_signal(STACKS_SIGNAL)
        while "wait_for_what_never_comes" not in stacks_file(tmp_path, 2).read_text():
            time.sleep(0.02)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_training_goes_through_its_phases_alike_on_all_ranks(recipe, tmp_path):  # noqa: F811
    shown = recipe("shown", max_steps=4, units_per_step=3, eval__every="2", checkpoint__every="2")

    def training():
        os.environ[FOLDER] = str(tmp_path)
        phases = []
        show = PhaseFile.show

        def noted(self, name, step=None):
            show(self, name, step)
            if not phases or phases[-1] != [name, step]:
                phases.append([name, step])

        PhaseFile.show = noted
        train(shown)
        return phases

    first, second = run_ranks(2, training)
    assert first == second
    assert first == [
        ["start", None], ["prepare", None], ["start", None],
        ["step", 1], ["step", 2], ["evaluation", 2], ["checkpoint", 2],
        ["step", 3], ["step", 4], ["evaluation", 4], ["checkpoint", 4], ["end", 4],
    ]  # fmt: skip
    records = [read_record(tmp_path, rank) for rank in (0, 1)]
    assert records[0]["num_changes"] == records[1]["num_changes"]
    assert records[0]["step_s"] > 0
