"""How early a run must be warned: from what it was measured to need, and said with both figures."""

import pytest
from ranks import run_ranks

from asr_train.files import append_jsonl, read_jsonl
from asr_train.run_dir import RunDir
from asr_train.train import train
from launch.jobs import submit
from launch.site.signal_lead import Times, measured, problem


@pytest.fixture
def run(tmp_path):
    """A run whose metrics.jsonl has the given lines, as (attempt, fields)."""

    def run(*lines):
        found = RunDir(tmp_path)
        for step, (attempt, fields) in enumerate(lines, 1):
            append_jsonl(found.metrics, {"attempt": attempt, "step": step, **fields})
        return found

    return run


@pytest.fixture(scope="module")
def trained_run(tiny_recipe, tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe(run_dir=str(folder), max_steps=3, num_workers=0, **{"log.every": 1})
    assert run_ranks(1, train, recipe) == [0]
    return RunDir(folder)


def step(seconds, attempt=1):
    return attempt, {"loss": 1.0, "step_time_s": seconds}


def saved(seconds, attempt=1):
    return attempt, {"event": "saved", "seconds": seconds, "blocked_s": 0.1}


def test_worst_case_is_an_evaluation_two_steps_two_saves_and_slurms_minute():
    assert Times(step_s=3.0, save_s=20.0, evaluation_s=100.0).needed_s == 60 + 100 + 2 * 3 + 2 * 20
    assert Times(step_s=0.01, save_s=0.01).needed_s == 61


def test_the_slowest_of_each_counts(run):
    evaluation = [
        (1, {"step": 4, "set": name, "seconds": seconds}) for name, seconds in (("dev", 30.0), ("test", 40.0))
    ]
    found = measured(run(step(1.0), step(5.0), step(2.0), *evaluation, saved(7.0), saved(4.0), step(2.0)))
    assert found == Times(5.0, 7.0, 70.0)  # all sets of one step are one evaluation


def test_what_starting_costs_is_no_step(run):
    assert measured(run(step(90.0), step(2.0), saved(1.0))) == Times(2.0, 1.0)


def test_only_one_line_is_better_than_none(run):
    assert measured(run(step(90.0), saved(1.0))) == Times(90.0, 1.0)


def test_another_attempt_may_have_had_other_nodes(run):
    found = measured(run(step(9.0), step(9.0), saved(50.0), step(3.0, 2), step(3.5, 2)))
    assert found == Times(3.5, 50.0)  # nothing was saved since
    assert measured(run(saved(6.0, 2))) == Times(3.5, 6.0)


@pytest.mark.parametrize("lines", [[], [step(1.0)], [saved(1.0)]])
def test_nothing_is_said_before_a_step_and_a_save_were_timed(lines, run):
    assert measured(run(*lines)) is None


def test_a_save_that_failed_is_no_measure(run):
    assert measured(run(step(1.0), (1, {"event": "save_failed", "seconds": 900.0, "blocked_s": 1.0}))) is None


def test_a_lead_that_is_too_short_is_told_with_both_figures_and_what_to_set():
    times = Times(step_s=2.5, save_s=41.0, evaluation_s=120.0)
    assert problem(times, 267) is None
    text = problem(times, 266)
    for part in (
        "signal_lead_s is 266", "up to 267 s are needed", "a step takes up to 2.5 s", "a save 41 s",
        "an evaluation 120 s", "60 s off", "cluster.signal_lead_s=270",
    ):  # fmt: skip
        assert part in text
    assert "evaluation" not in problem(Times(1.0, 1.0), 1)


def test_a_training_writes_what_is_measured_here(trained_run):
    """Steps, saves and evaluations of a real training."""
    found = measured(trained_run)
    wall_s = sum(line["step_time_s"] for line in read_jsonl(trained_run.metrics) if "step_time_s" in line)
    assert 0 < found.step_s <= wall_s
    assert found.save_s > 0
    assert found.evaluation_s > 0
    assert found.needed_s >= 60


def test_submit_warns_of_a_lead_that_is_too_short_for_its_run(run, tiny_recipe_file, capsys):
    found = run(step(2.0), saved(200.0))
    command = [str(tiny_recipe_file()), f"run_dir={found.path}", "--cluster", "test", "cluster.processes_per_node=1"]
    assert submit.main([*command, "--dry-run"]) == 0
    assert "warning: signal_lead_s is 60, and up to 464 s are needed" in capsys.readouterr().err
    assert submit.main([*command, "cluster.signal_lead_s=464", "--dry-run"]) == 0
    assert "signal_lead_s" not in capsys.readouterr().err
