"""How fast a training gets on, as its metrics.jsonl has it; figures computed by hand."""

import re

import psutil
import pytest

from asr_train.errors import ModelError, RecipeError, RunError, TrainingError
from asr_train.estimate import ForwardFlops, frame_flops, quadratic_share
from asr_train.files import append_jsonl, read_jsonl
from asr_train.model_config import load_model_config
from asr_train.pace import assumed, of_run
from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir
from asr_train.train import plan_of, train
from launch.measure_pace import measured

PARTS = ("compute", "padding", "data_wait", "peer_wait", "checkpoint", "evaluation", "startup", "other")
FRAME_FLOPS = 1000.0


@pytest.fixture
def run(tiny_recipe, tmp_path):
    """A run directory with a recipe and nothing else."""
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe(run_dir=str(tmp_path))), encoding="utf-8")
    return RunDir(tmp_path)


def begin(run, attempt, step=0, **changes):
    facts = {"world_size": 1, "strategy": "single", "device": "cpu", "recipe_hash": "a", "frame_flops": FRAME_FLOPS}
    event = "restored" if step else "started"
    append_jsonl(run.metrics, {"attempt": attempt, "event": event, "step": step, **facts, **changes})


def ledger(run, attempt, step, *ranks):
    """A ledger line; of each rank its cost and seconds since its process began."""
    entries = [{"rank": number, **{f"{part}_s": 0.0 for part in PARTS}, **rank} for number, rank in enumerate(ranks)]
    append_jsonl(run.metrics, {"attempt": attempt, "event": "ledger", "step": step, "ranks": entries})


def test_flops_by_seconds_of_computing_and_what_a_step_takes_besides(run):
    begin(run, 1)
    ledger(run, 1, 0, {"cost": 0, "startup_s": 9.0})
    ledger(run, 1, 10, {"cost": 500, "compute_s": 40.0, "startup_s": 9.0})  # it warms up
    append_jsonl(run.metrics, {"attempt": 1, "step": 10, "loss": 1.0})
    ledger(run, 1, 20, {"cost": 1100, "compute_s": 47.0, "padding_s": 1.0, "data_wait_s": 1.0, "other_s": 1.0,
                        "checkpoint_s": 30.0, "evaluation_s": 60.0})  # fmt: skip
    ledger(run, 1, 25, {"cost": 1400, "compute_s": 52.0, "padding_s": 2.0, "data_wait_s": 1.5, "other_s": 2.0,
                        "checkpoint_s": 30.0, "evaluation_s": 60.0})  # fmt: skip
    found = of_run(run)
    # 600 frames in 7 + 1 s; 300 in 5 + 1 s; and (1 + 1) s of 10 steps, (0.5 + 1) s of 5
    assert found.flops_per_s == pytest.approx(FRAME_FLOPS * (600 / 8 + 300 / 6) / 2)
    assert found.step_s == pytest.approx((0.2 + 0.3) / 2)
    assert f"measured in {run.path}, 15 steps: 1 process, single, cpu" in found.source


def test_of_several_ranks_the_one_that_the_others_wait_for(run):
    begin(run, 1, world_size=3, strategy="ddp")
    fast, slow = {"cost": 100, "compute_s": 5.0, "peer_wait_s": 3.0}, {"cost": 80, "compute_s": 7.0, "peer_wait_s": 1.0}
    idle = {"cost": 0, "peer_wait_s": 8.0}
    for step in range(3):
        rows = [{key: step * value for key, value in rank.items()} for rank in (fast, slow, idle)]
        ledger(run, 1, 4 * step, *rows)
    found = of_run(run)
    assert found.flops_per_s == pytest.approx(FRAME_FLOPS * 80 / 7)
    assert found.step_s == pytest.approx(1 / 4)
    assert "3 processes, ddp" in found.source


def test_a_minute_in_which_the_machine_was_busy_does_not_count(run):
    begin(run, 1)
    for step, seconds in enumerate((0, 1, 2, 3, 63, 64, 65)):
        ledger(run, 1, step, {"cost": 10 * step, "compute_s": float(seconds), "data_wait_s": float(step)})
    assert of_run(run).flops_per_s == pytest.approx(10 * FRAME_FLOPS)


def test_a_resumed_run_warms_up_in_each_attempt_and_counts_those_that_ran_as_the_newest_did(run):
    def attempt(number, start, cost_a_step, **changes):
        begin(run, number, start, **changes)
        for step, cost in ((0, 0), (1, 1), (2, 1 + cost_a_step)):  # all take a second; the first one slow
            ledger(run, number, start + step, {"cost": cost, "compute_s": float(step)})

    attempt(1, 0, 10)
    attempt(2, 2, 90, world_size=2)  # more processes
    attempt(3, 4, 90, recipe_hash="b")  # --allow-change
    attempt(4, 6, 20)
    begin(run, 5, 8)  # ended before there was anything to measure
    ledger(run, 5, 8, {"cost": 0})
    ledger(run, 5, 9, {"cost": 7, "compute_s": 1.0})
    found = of_run(run)
    assert found.flops_per_s == pytest.approx(FRAME_FLOPS * (10 + 20) / 2)
    assert "2 steps" in found.source


def test_steps_that_train_the_head_alone_do_not_count(tiny_recipe, tmp_path):
    values = {"run_dir": str(tmp_path), "model.freeze_transformer_steps": 2}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe(**values)), encoding="utf-8")
    run = RunDir(tmp_path)
    begin(run, 1)
    for step, cost in enumerate((0, 100, 200, 210, 220)):
        ledger(run, 1, step, {"cost": cost, "compute_s": float(step)})
    assert of_run(run).flops_per_s == pytest.approx(10 * FRAME_FLOPS)


@pytest.mark.parametrize("num_lines", range(3))
def test_a_run_with_too_few_lines_was_not_measured(run, num_lines):
    begin(run, 1)
    for step in range(num_lines):
        ledger(run, 1, step, {"cost": 10 * step, "compute_s": float(step)})
    assert of_run(run) is None


def test_a_run_of_a_version_that_did_not_count_was_not_measured(run):
    append_jsonl(run.metrics, {"attempt": 1, "event": "started", "step": 0, "world_size": 1})
    for step in range(4):
        ledger(run, 1, step, {"cost": 10 * step, "compute_s": float(step)})
    assert of_run(run) is None


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(RunError, match="no run directory"):
        of_run(RunDir(tmp_path))


def test_a_real_training_gives_back_the_time_of_its_steps(tiny_recipe, tiny_corpus, tmp_path):
    """One pair of lines counts, steps 4 to 6: their FLOPs, by the plan, and their time, by the ledger."""
    recipe = tiny_recipe(run_dir=str(tmp_path / "run"), max_steps=6, **{"log.every": 3, "num_workers": 0})
    assert train(recipe) == 0
    run = RunDir(tmp_path / "run")
    config = load_model_config(recipe.model, vocabulary=tiny_corpus.vocabulary).to_dict()
    plan = plan_of(recipe, tiny_corpus)
    flops = 0.0
    for step in range(3, 6):
        for unit in plan.step_units(*divmod(step, plan.steps_per_epoch)):
            frames = int(tiny_corpus.geometry.num_frames(unit.padded_samples))
            forward = ForwardFlops.of(config)
            a_frame = forward.feature_encoder + forward.transformer + frames * forward.attention
            flops += len(unit.ids) * frames * 3 * a_frame  # the backward pass takes twice the forward pass
    before, after = [
        sum(line["ranks"][0][f"{part}_s"] for part in ("compute", "padding", "data_wait", "peer_wait", "other"))
        for line in read_jsonl(run.metrics)
        if line.get("event") == "ledger" and line["step"] in (3, 6)
    ][:2]
    found = of_run(run)
    assert flops / found.flops_per_s + 3 * found.step_s == pytest.approx(after - before)


def test_an_assumed_pace_is_a_share_of_the_peak():
    found = assumed("H100", 989e12)
    assert found.flops_per_s == pytest.approx(0.3 * 989e12)
    assert found.step_s == 0
    assert found.source == "assumed: 30% of the peak of H100, 989 TFLOP/s"


@pytest.mark.parametrize("count", [quadratic_share, lambda config: frame_flops(config, feature_encoder_frozen=False)])
def test_a_model_whose_flops_cannot_be_counted_is_named(count):
    with pytest.raises(
        ModelError, match="FLOPs of 'mamba' cannot be counted, for its config has no 'intermediate_size'"
    ):
        count({"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 2})


def test_a_trial_counts_its_steps_and_leaves_nothing_behind(tiny_recipe, tiny_corpus, tmp_path, monkeypatch, capfd):
    """On two processes; evaluations, checkpoints and trackers of the recipe would take their time, and are not made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    corpus = sorted(path for path in tiny_corpus.path.rglob("*"))
    recipe = tiny_recipe(
        max_steps=3,
        **{"log.trackers": ["tensorboard"], "log.prometheus": "figures.prom", "eval.every": 1, "checkpoint.every": 1},
    )
    before = psutil.Process().children()  # of other tests: multiprocessing's tracker, say
    found = measured(recipe, processes=2)
    told = re.fullmatch(r"measured in a trial on this machine, (\d+) steps: 2 processes, ddp, cpu", found.source)
    assert int(told[1]) >= 20  # some more were made before it was seen that they are enough
    assert found.flops_per_s > 0
    assert found.step_s > 0
    assert list(tmp_path.iterdir()) == []
    assert sorted(path for path in tiny_corpus.path.rglob("*")) == corpus
    assert set(psutil.Process().children()) <= set(before)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "measuring: 25 of 25 steps" in printed.err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_trial_that_fails_is_one_error_with_its_message(tiny_recipe, tmp_path, monkeypatch, processes):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    recipe = tiny_recipe(**{"model.init_from": str(tmp_path / "nothing")})
    with pytest.raises(TrainingError, match=r"measuring on this machine failed: .*nothing"):
        measured(recipe, processes=processes)
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_this_machine_cannot_do_is_refused_before_it_starts(tiny_recipe):
    with pytest.raises(RecipeError, match="keeps 2 of 3 processes busy"):
        measured(tiny_recipe(), processes=3)
