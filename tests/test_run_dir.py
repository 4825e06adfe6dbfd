import pytest

from asr_train.errors import RunError
from asr_train.files import append_jsonl
from asr_train.recipe import decode_recipe, run_directory
from asr_train.run_dir import RunDir, environment, read_metrics
from asr_train.state import TrainState, due, higher_is_better


def make_recipe(**changes):
    data = {"train": {"kind": "demo", "split": "train"}}
    return decode_recipe({"name": "r", "max_steps": 10, "data": data} | changes)


def test_a_directory_belongs_to_one_recipe(tmp_path):
    run = RunDir(tmp_path)
    run.claim(make_recipe())
    run.claim(make_recipe(log={"every": 3}))  # does not define the run: taken
    assert run.recipe().log.every == 3
    with pytest.raises(RunError, match=r"max_steps: 10 -> 20[\s\S]*--allow-change"):
        run.claim(make_recipe(max_steps=20))
    assert run.recipe().max_steps == 10
    run.claim(make_recipe(max_steps=20), allow_change=True)
    assert run.recipe().max_steps == 20


def test_every_difference_is_listed(tmp_path):
    run = RunDir(tmp_path)
    run.claim(make_recipe())
    with pytest.raises(RunError) as caught:
        run.claim(make_recipe(seed=1, optim={"lr": 0.5}))
    assert "seed: 0 -> 1" in str(caught.value)
    assert "optim.lr: 0.0001 -> 0.5" in str(caught.value)


def test_checkpoints_without_identity_are_never_overwritten(tmp_path):
    (tmp_path / "checkpoints" / "step-0000000005").mkdir(parents=True)
    with pytest.raises(RunError, match=r"run\.json"):
        RunDir(tmp_path).claim(make_recipe())


def test_the_default_directory_names_the_recipe_and_follows_what_defines_it():
    base = run_directory(make_recipe())
    assert base.parent.name == "runs"
    assert base.name.startswith("r-")
    assert run_directory(make_recipe(log={"every": 3})) == base
    assert run_directory(make_recipe(seed=1)) != base


def test_readers_take_for_each_step_the_last_attempt_that_ran_it(tmp_path):
    run = RunDir(tmp_path)
    for attempt, steps in ((1, (1, 2, 3, 4)), (2, (3, 4, 5))):
        append_jsonl(run.metrics, {"attempt": attempt, "event": "started", "step": steps[0] - 1})
        for step in steps:
            append_jsonl(run.metrics, {"attempt": attempt, "step": step, "loss": 1.0})
    append_jsonl(run.metrics, {"attempt": 2, "step": 5, "set": "dev", "wer": 0.5})
    found = [(line["step"], line["attempt"], line.get("set")) for line in read_metrics(run)]
    assert found == [(1, 1, None), (2, 1, None), (3, 2, None), (4, 2, None), (5, 2, None), (5, 2, "dev")]
    append_jsonl(run.metrics, {"attempt": 3, "event": "restored", "step": 2})  # what came after is no part of the run
    assert [(line["step"], line["attempt"]) for line in read_metrics(run)] == [(1, 1), (2, 1)]


def test_attempts_are_numbered_and_outcomes_are_the_newest_attempts(tmp_path):
    run = RunDir(tmp_path)
    assert run.start_attempt({}) == 1
    run.write_outcome(1, 0, {"status": "failed"})
    assert run.start_attempt({}) == 2
    run.write_outcome(2, 0, {"status": "done"})
    run.write_outcome(2, 1, {"status": "done"})
    assert {rank: found["status"] for rank, found in run.outcomes().items()} == {0: "done", 1: "done"}


def test_no_environment_variable_is_recorded(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    assert "hf_very_secret" not in str(environment())


def test_better_is_lower_for_wer_and_higher_for_accuracy():
    state = TrainState()
    state.step = 1
    assert state.take_evaluation("dev/wer", 0.5, higher_is_better=False)
    state.step = 2
    assert not state.take_evaluation("dev/wer", 0.6, higher_is_better=False)
    assert state.num_evaluations_since_best == 1
    state.step = 3
    assert state.take_evaluation("dev/wer", 0.4, higher_is_better=False)
    assert (state.best_step, state.num_evaluations_since_best) == (3, 0)
    state = TrainState()
    assert state.take_evaluation("dev/accuracy", 0.5, higher_is_better=True)
    assert state.take_evaluation("dev/accuracy", 0.6, higher_is_better=True)
    assert not state.take_evaluation("dev/accuracy", 0.5, higher_is_better=True)
    assert (higher_is_better("wer"), higher_is_better("exact_match"), higher_is_better("my_score")) == (
        False,
        True,
        None,
    )


def test_state_survives_json():
    state = TrainState(step=7, best_metric="a/wer", best_value=0.25, best_step=5)
    assert TrainState.from_json(state.to_json() | {"of_a_later_version": 1}) == state


def test_cadences():
    assert [step for step in range(1, 13) if due((4, "steps"), step, 6)] == [4, 8, 12]
    assert [step for step in range(1, 13) if due((1, "epochs"), step, 6)] == [6, 12]
    assert not due(None, 5, 6)
