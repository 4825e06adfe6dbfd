"""Whole runs in forked ranks: epochs, best and early stopping over a stop, what cannot be aligned, a rank that dies."""

import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks

from asr_train import loop
from asr_train import train as program
from asr_train.files import read_json, read_jsonl
from asr_train.metrics import EditCounts
from asr_train.run_dir import RunDir, read_metrics
from asr_train.train import train
from asr_train.trained import load_trained

NOTHING_EVALUATED = {"eval.sets": {}}


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    """Recipe of a run of 12 steps or so an epoch, as `recipe(name, {"dotted.key": value})`; dropouts and masks on."""

    def make(name, changes=()):
        values = {
            "run_dir": str(tmp_path / name),
            "max_steps": 12,
            "unit_audio_s": 3,
            "units_per_step": 2,
            "num_workers": 0,
            "model.layerdrop": 0.2,
            "spec_augment": {"time_prob": 0.3, "time_length": 3},
            "optim.lr": 2e-3,
            "log": {"every": 1, "trained_ids": True, "trackers": []},
        }
        return tiny_recipe(**{**values, **dict(changes)})

    return make


def run_on(world_size, recipe, function=train):
    assert run_ranks(world_size, function, recipe) == [0] * world_size
    return RunDir(Path(recipe.run_dir))


def training_lines(run):
    return [line for line in read_metrics(run) if "set" not in line]


def losses(run):
    return {line["step"]: line["loss"] for line in training_lines(run)}


def first_line(run, attempt=1):
    return next(line for line in read_jsonl(run.metrics) if line["attempt"] == attempt)


def trained_ids(run):
    """step -> ids, sorted, of the last attempt that made it, over all ranks."""
    lines = [line for path in (run.path / "trained_ids").glob("*.jsonl") for line in read_jsonl(path)]
    last = {step: max(line["attempt"] for line in lines if line["step"] == step) for step in losses(run)}
    return {
        step: sorted(ids for line in lines if (line["step"], line["attempt"]) == (step, attempt) for ids in line["ids"])
        for step, attempt in last.items()
    }


def weights(run, which="newest"):
    return load_trained(run.path, which).model.state_dict()


def saved_steps(run):
    return sorted(int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*"))


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def assert_close(found, expected, relative=1e-5):
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert abs(found[step] - loss) <= relative * abs(loss), f"step {step}: {found[step]} for {loss}"


def signal_in_step(number, step, rank=0):
    """Make this process, if it is that rank, signal itself in the last unit of a step, counted from its start."""
    forward, num_begun = loop._forward, 0

    def signalling(job, turn, *rest):
        nonlocal num_begun
        num_begun += turn.is_last
        if turn.is_last and num_begun == step and job.parallel.rank == rank:
            os.kill(os.getpid(), number)
        return forward(job, turn, *rest)

    loop._forward = signalling


# --- epochs -----------------------------------------------------------------------------------------------------


def test_epochs_as_length_and_as_cadence_also_after_a_stop_in_the_middle_of_one(recipe):
    epochs = {"max_steps": None, "max_epochs": 3, "unit_audio_s": 8, "eval.every": "1 epoch",
              "checkpoint": {"every": "1 epoch", "keep_last": 9, "save_best": False}}  # fmt: skip
    whole = run_on(2, recipe("whole", epochs))
    length = first_line(whole)["steps_per_epoch"]
    ends = [length, 2 * length, 3 * length]
    assert length >= 3
    assert [line["epoch"] for line in training_lines(whole)] == [0] * length + [1] * length + [2] * length
    assert [line["step"] for line in read_metrics(whole) if "set" in line] == ends
    assert saved_steps(whole) == ends
    assert read_json(whole.done)["step"] == ends[-1]
    for epoch in range(3):
        steps = range(epoch * length + 1, (epoch + 1) * length + 1)
        seen = Counter(ids for step in steps for ids in trained_ids(whole)[step])
        assert len(seen) == 40
        assert set(seen.values()) == {1}

    def stopped(again):
        signal_in_step(signal.SIGTERM, length + 2)
        return train(again)

    broken = recipe("broken", epochs)
    assert saved_steps(run_on(2, broken, stopped)) == [length, length + 2]
    resumed = run_on(2, broken)
    assert saved_steps(resumed) == sorted([*ends, length + 2])
    assert [line["step"] for line in read_metrics(resumed) if "set" in line] == ends
    assert losses(resumed) == losses(whole)
    assert trained_ids(resumed) == trained_ids(whole)


# --- the best, and early stopping -------------------------------------------------------------------------------

# character error rates: by `easy` the best would be step 2, and 6 would be the first of many without a better one
SCORES = {
    "easy": {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.4, 10: 0.5, 12: 0.6},
    "hard": {2: 0.9, 4: 0.8, 6: 0.7, 8: 0.7, 10: 0.8, 12: 0.9},
}


def train_with_scores(recipe):
    """Train where the evaluations, which do take place, come out as in SCORES; words all wrong."""
    evaluate_set = loop.evaluate_set

    def scored(*args, out, **options):
        score = evaluate_set(*args, out=out, **options)
        rate = SCORES[out.stem][int(out.parent.name.removeprefix("step-"))]
        errors = round(rate * 1000)
        characters = EditCounts(hits=1000 - errors, substitutions=errors, deletions=0, insertions=0)
        words = EditCounts(hits=0, substitutions=10, deletions=0, insertions=0)
        return replace(score, words=words, characters=characters)

    loop.evaluate_set = scored
    return train(recipe)


@pytest.mark.parametrize("stop_after", [8, 9])
def test_the_named_set_picks_the_best_and_patience_outlives_a_stop(recipe, tiny_speech, stop_after):
    """Stopped where an evaluation is due, or between two: the run still ends at step 10, and 6 is the best."""
    source = {"kind": "jsonl", "path": str(tiny_speech / "dev" / "manifest.jsonl")}
    changes = {"max_steps": 12, "eval.sets": {"easy": source, "hard": source}, "eval.every": "2",
               "eval.best": "hard/cer", "eval.early_stopping": 2, "checkpoint.keep_last": 1}  # fmt: skip

    def stopped(again):
        signal_in_step(signal.SIGTERM, stop_after)
        return train_with_scores(again)

    two_sets = recipe("two-sets", changes)
    run = run_on(1, two_sets, stopped)
    assert run.outcomes()[0]["status"] == "stopped"
    assert max(losses(run)) == stop_after
    run_on(1, two_sets, train_with_scores)
    lines = [(line["set"], line["step"]) for line in read_jsonl(run.metrics) if "set" in line]
    assert lines == [(name, step) for step in (2, 4, 6, 8, 10) for name in ("easy", "hard")]
    done = read_json(run.done)
    assert (done["step"], done["best_step"], done["best_metric"], done["best_value"]) == (10, 6, "hard/cer", 0.7)
    assert saved_steps(run) == [6, 10]
    assert load_trained(run.path).checkpoint.step == 6
    assert load_trained(run.path, "newest").checkpoint.step == 10


# --- utterances that cannot be aligned --------------------------------------------------------------------------


def train_with_unalignable(recipe):
    """Train where the first utterance of the first unit of the 2nd and the 4th step has more labels than frames.

    Idle turns, which repeat it on another rank, have them too. Returns the exit code and the losses of such units.
    """
    forward, found = loop._forward, []

    def with_too_many_labels(job, turn, batch, *rest):
        if turn.step not in (1, 3) or turn.unit not in (0, None):
            return forward(job, turn, batch, *rest)
        first, *others = batch.labels.split(batch.num_labels.tolist())
        labels = torch.full((int(batch.num_frames[0]) + 1,), int(first[0]))
        num_labels = torch.tensor([len(labels), *map(len, others)])
        losses = forward(job, turn, replace(batch, labels=torch.cat([labels, *others]), num_labels=num_labels), *rest)
        found.append((turn.unit, losses.tolist()))
        return losses

    loop._forward = with_too_many_labels
    return train(recipe), found


def test_infinite_losses_are_counted_and_cost_nothing_else_on_1_rank_and_on_2(recipe):
    changes = {**NOTHING_EVALUATED, "max_steps": 4, "units_per_step": 3, "unit_audio_s": 2}
    runs = []
    for world_size in (1, 2):  # on 2 ranks, 3 units: one turn of each step is idle
        again = recipe(f"on{world_size}", changes)
        results = run_ranks(world_size, train_with_unalignable, again)
        assert {code for code, _ in results} == {0}
        units = [unit for _, found in results for unit in found]
        assert [losses[0] for unit, losses in units if unit == 0] == [0.0, 0.0]
        assert all(loss > 0 for unit, losses in units if unit == 0 for loss in losses[1:])
        assert sum(unit is None for unit, _ in units) == 2 * (world_size - 1)
        runs.append(RunDir(Path(again.run_dir)))
    one, two = runs
    for run in runs:
        assert [line["num_infinite_losses"] for line in training_lines(run)] == [0, 1, 1, 2]
        assert [line["num_skipped_steps"] for line in training_lines(run)] == [0] * 4
        assert read_json(run.done)["num_infinite_losses"] == 2
    assert_close(losses(two), losses(one))
    plain = losses(run_on(1, recipe("plain", changes)))
    assert losses(one)[1] == plain[1]
    assert losses(one)[2] < plain[2]  # one utterance less in the sum, the same number it is divided by


# --- arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_on", [False, True])
def test_tf32_and_deterministic_are_set_and_stand_in_the_attempts_first_line(recipe, is_on):
    asked = recipe("run", {**NOTHING_EVALUATED, "max_steps": 1, "tf32": is_on, "deterministic": is_on})

    def settings():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not is_on
        torch.use_deterministic_algorithms(not is_on)
        assert train(asked) == 0
        allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return *allowed, torch.are_deterministic_algorithms_enabled()

    assert run_ranks(1, settings) == [(is_on, is_on, is_on)]
    line = first_line(RunDir(Path(asked.run_dir)))
    assert (line["event"], line["tf32"], line["deterministic"]) == ("started", is_on, is_on)


# --- a corpus that is not there yet -----------------------------------------------------------------------------


def test_one_rank_prepares_the_other_waits_for_its_file_and_both_train(recipe, tmp_path):
    fresh = recipe("fresh", {**NOTHING_EVALUATED, "max_steps": 3, "data.corpus_root": str(tmp_path / "corpora")})
    prepare, wait, waits = program.prepare, program.wait_for_corpus, tmp_path / "waits"
    seen = []

    def slow_prepare(*args):
        assert not dist.is_initialized()
        while not waits.exists():
            time.sleep(0.05)
        seen.append("prepared")
        return prepare(*args)

    def noted_wait(waited_for):
        assert not dist.is_initialized()  # a collective would run out of time on a large corpus
        seen.append("waited" if not list(tmp_path.glob("corpora/*/corpus.json")) else "came late")
        waits.touch()
        return wait(waited_for, poll_s=0.1)

    def start():
        program.prepare, program.wait_for_corpus = slow_prepare, noted_wait
        return train(fresh), seen

    assert run_ranks(2, start) == [(0, ["prepared"]), (0, ["waited"])]
    run = RunDir(Path(fresh.run_dir))
    assert len(list(tmp_path.glob("corpora/*/corpus.json"))) == 1
    assert sorted(losses(run)) == [1, 2, 3]
    assert {line["rank"] for path in (run.path / "trained_ids").iterdir() for line in read_jsonl(path)} == {0, 1}


# --- a rank that dies -------------------------------------------------------------------------------------------


def test_a_rank_of_two_is_killed_in_a_step_and_the_run_ends_with_the_same_bits(recipe):
    """First the one that only computes, then, in the run's second life, the one that writes."""
    # not in the background: a kill in the next steps would come before the commit, and nothing be wrong
    saving = {"every": "3", "asynchronous": False}
    changes = {**NOTHING_EVALUATED, "max_steps": 8, "checkpoint": saving}
    whole = run_on(2, recipe("whole", changes))
    broken = recipe("broken", changes)
    run = RunDir(Path(broken.run_dir))

    def killed(step, rank):
        signal_in_step(signal.SIGKILL, step, rank)
        return train(broken)

    for step, rank in ((5, 1), (4, 0)):  # step 5; then, from step 3 on, step 7
        with pytest.raises(RankError):
            run_ranks(2, killed, step, rank)
    assert saved_steps(run) == [3, 6]
    assert not run.done.exists()
    run_on(2, broken)
    assert [first_line(run, attempt)["step"] for attempt in (1, 2, 3)] == [0, 3, 6]
    assert losses(run) == losses(whole)
    assert trained_ids(run) == trained_ids(whole)
    assert_same_bits(weights(run), weights(whole))
