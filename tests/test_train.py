"""The promises of the loop: the same run on any number of processes, nothing lost, nothing twice, bit-equal resume."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from damage import edit_manifest
from ranks import run_ranks

from asr_train import checkpoints, loop
from asr_train.errors import CheckpointError, RecipeError, RunError, TrainingError
from asr_train.files import read_json, read_jsonl
from asr_train.ledger import PARTS
from asr_train.prepare import prepare
from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir, read_metrics
from asr_train.train import train

# Everything random is on: dropouts, SpecAugment, layerdrop. Layer norm in the feature encoder, so padding is harmless.
MODEL = {
    "architecture": "wav2vec2",
    "layerdrop": 0.2,
    "config": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": [8] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "feat_proj_dropout": 0.1,
        "final_dropout": 0.1,
    },
}
MASKS = {"time_prob": 0.3, "time_length": 3, "feature_prob": 0.1, "feature_length": 4}


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    """Recipe of a small run, as `recipe(name, key=value, ...)`; keys with dots as `optim__lr`."""

    def make(name, **changes):
        values = {
            "run_dir": str(tmp_path / name),
            "max_steps": 60,
            "unit_audio_s": 8,
            "units_per_step": 4,
            "num_workers": 0,
            "model": MODEL,
            "spec_augment": MASKS,
            "optim.lr": 2e-3,
            "log": {"every": 1, "trained_ids": True},
        }
        return tiny_recipe(**{key.replace("__", "."): value for key, value in {**values, **changes}.items()})

    return make


def run_on(world_size, recipe):
    assert run_ranks(world_size, train, recipe) == [0] * world_size
    return RunDir(Path(recipe.run_dir))


def losses(run):
    return {line["step"]: line["loss"] for line in read_metrics(run) if "set" not in line}


def audio(run):
    """What each step was made of, and the whole run."""
    names = ("num_utterances", "audio_s", "padded_audio_s")
    lines = {line["step"]: [line[name] for name in names] for line in read_metrics(run) if "set" not in line}
    done = read_json(run.done)
    return lines, [done[name] for name in names[:2]]


def trained(run):
    """step -> ids, sorted, of the last attempt that ran it, over all ranks."""
    lines = [line for path in sorted((run.path / "trained_ids").glob("*.jsonl")) for line in read_jsonl(path)]
    last = {}
    for line in lines:
        last[line["step"]] = max(last.get(line["step"], 0), line["attempt"])
    found = {}
    for line in lines:
        if line["attempt"] == last[line["step"]]:
            found.setdefault(line["step"], []).extend(line["ids"])
    return {step: sorted(ids) for step, ids in sorted(found.items())}


def weights(run, step=None):
    """Every tensor of the model in a checkpoint, the newest one unless a step is named."""
    found = checkpoints.newest(run.checkpoints).path if step is None else run.checkpoints / f"step-{step:010d}"
    metadata = dcp.FileSystemReader(found / "shards").read_metadata()
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith("model.")
    }
    dcp.load(state, checkpoint_id=found / "shards", no_dist=True)
    return state


def assert_close(found, expected, relative=1e-5):
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert abs(found[step] - loss) <= relative * abs(loss), f"step {step}: {found[step]} for {loss}"


def test_1_2_and_3_processes_make_the_same_run(recipe):
    one, two, three = (run_on(size, recipe(f"on{size}", units_per_step=5)) for size in (1, 2, 3))
    assert len(losses(one)) == 60
    assert_close(losses(two), losses(one))
    assert_close(losses(three), losses(one))
    assert trained(one) == trained(two) == trained(three)
    steps = read_json(one.path / "attempts" / "attempt-001.json")
    assert steps["world_size"] == 1
    everyone = Counter(ids_ for ids in trained(two).values() for ids_ in ids)
    per_epoch = next(line for line in read_jsonl(one.metrics) if line.get("event") == "started")["steps_per_epoch"]
    whole_epochs = 60 // per_epoch
    assert whole_epochs >= 2
    seen = Counter(ids_ for step, ids in trained(two).items() if step <= whole_epochs * per_epoch for ids_ in ids)
    assert set(seen.values()) == {whole_epochs}
    assert seen.keys() == everyone.keys()

    assert audio(one) == audio(two) == audio(three)  # exactly
    rows = prepare(recipe("on1", units_per_step=5)).train
    seconds = {rows.id(row): rows.num_samples[row] / 16_000 for row in range(len(rows))}
    lines, whole = audio(one)
    for step, ids in trained(one).items():
        num_utterances, audio_s, padded_audio_s = lines[step]
        assert num_utterances == len(ids)
        assert audio_s == pytest.approx(sum(seconds[name] for name in ids))
        assert audio_s < padded_audio_s < 1.5 * audio_s
    assert whole == [sum(everyone.values()), pytest.approx(sum(line[1] for line in lines.values()))]


def test_a_step_with_fewer_units_than_ranks(recipe):
    one = run_on(1, recipe("on1", units_per_step=2, max_steps=20))
    three = run_on(3, recipe("on3", units_per_step=2, max_steps=20, allow_idle_ranks=True))
    assert_close(losses(three), losses(one))
    assert trained(three) == trained(one)
    assert audio(three) == audio(one)


def test_more_processes_than_units_are_refused_with_the_sums(recipe):
    def refused():
        with pytest.raises(RecipeError) as caught:
            train(recipe("on3", units_per_step=2))
        return str(caught.value)

    message = run_ranks(3, refused)[0]
    assert "units_per_step=2 keeps 2 of 3 processes busy" in message
    assert "--processes 2" in message


def test_accelerate_launch_makes_the_same_run_too(recipe, tmp_path):
    alone = run_on(1, recipe("alone", max_steps=50))
    launched = recipe("launched", max_steps=50)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(launched))
    config = Path(__file__).parent.parent / "accelerate_configs" / "cpu.yaml"
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2",
            "--main_process_port", "0", "-m", "asr_train", str(path),
        ],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = RunDir(Path(launched.run_dir))
    assert_close(losses(run), losses(alone))
    assert {rank: found["status"] for rank, found in run.outcomes().items()} == {0: "done", 1: "done"}


def start(recipe, own_group=False):
    """Train in a forked process, in a process group of its own if asked; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if own_group:
                os.setsid()
            code = train(recipe)
        finally:
            os._exit(code)
    return pid


def wait_for_step(recipe, step):
    run = RunDir(Path(recipe.run_dir))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_metrics(run)):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(recipe, number, num_workers):
    def slowed(name):
        return recipe(name, max_steps=40, num_workers=num_workers, checkpoint__every="7")

    whole = run_on(1, slowed("whole"))
    broken = slowed("broken")
    pid = start(broken)
    wait_for_step(broken, 17)
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    if number == signal.SIGTERM:
        assert os.waitstatus_to_exitcode(status) == 0
        assert RunDir(Path(broken.run_dir)).outcomes()[0]["status"] == "stopped"
        assert RunDir(Path(broken.run_dir)).outcomes()[0]["exit_code"] == 3
    else:
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    resumed = run_on(1, broken)
    assert max(line["attempt"] for line in read_metrics(resumed)) == 2
    assert losses(resumed) == losses(whole)
    assert trained(resumed) == trained(whole)
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_stop_on_2_processes_resume_on_3_then_on_1(recipe):
    one = run_on(1, recipe("one", max_steps=30))
    moving = recipe("moving", max_steps=30)

    def stopping():
        if os.environ["RANK"] == "1":  # one rank is told; all stop after the same step
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            signal.setitimer(signal.ITIMER_REAL, 1.0)
        return train(moving)

    run = RunDir(Path(moving.run_dir))
    assert run_ranks(2, stopping) == [0, 0]
    first = checkpoints.newest(run.checkpoints).step
    assert {found["status"] for found in run.outcomes().values()} == {"stopped"} or first == 30
    run_on(3, moving)
    assert_close(losses(run), losses(one))
    assert trained(run) == trained(one)


def test_a_finished_run_says_so_and_trains_nothing(recipe, capfd):
    small = recipe("small", max_steps=3)
    run = run_on(1, small)
    before = run.metrics.read_text()
    assert run_ranks(1, train, small) == [0]
    assert "done already" in capfd.readouterr().err
    assert run.metrics.read_text() == before


def test_a_live_run_is_refused_with_host_and_pid(recipe):
    small = recipe("small", max_steps=3)
    with RunDir(Path(small.run_dir)).lock(), pytest.raises(RunError) as caught:
        train(small)
    assert f"pid {os.getpid()} on {os.uname().nodename}" in str(caught.value)


def test_another_recipe_is_refused_and_lists_what_differs(recipe):
    run_on(1, recipe("small", max_steps=3))
    with pytest.raises(RunError, match="max_steps: 3 -> 4"):
        train(recipe("small", max_steps=4))


def test_steps_that_are_not_finite_are_skipped_named_and_bounded(recipe):
    wild = recipe("wild", optim__lr=1e30, optim__max_grad_norm=None, limits__max_skipped_steps=3)

    def failing():
        with pytest.raises(TrainingError) as caught:
            train(wild)
        return str(caught.value)

    message = run_ranks(2, failing)[0]
    assert "3 steps in a row were not finite" in message
    run = RunDir(Path(wild.run_dir))
    skipped = [line for line in read_jsonl(run.metrics) if line.get("event") == "skipped"]
    assert len(skipped) == 3
    assert skipped[-1]["ids"] == trained(run).get(skipped[-1]["step"], skipped[-1]["ids"]) != []
    assert {found["exit_code"] for found in run.outcomes().values()} == {4}


def test_fp16_without_a_gpu_is_refused(recipe):
    def refused():
        with pytest.raises(RecipeError, match="fp16"):
            train(recipe("half", precision="fp16"))

    run_ranks(1, refused)


def test_bf16_trains(recipe):
    run = run_on(1, recipe("half", precision="bf16", max_steps=4))
    assert len(losses(run)) == 4


def test_an_accelerate_config_that_says_otherwise_is_refused_with_both_values(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")

    def refused():
        with pytest.raises(RecipeError) as caught:
            train(recipe("x"))
        return str(caught.value)

    message = run_ranks(1, refused)[0]
    assert "mixed_precision: bf16" in message
    assert "precision: fp32" in message
    assert "gradient_accumulation_steps: 4" in message


def test_evaluations_lines_best_checkpoint_and_early_stopping(recipe):
    run = run_on(
        2,
        recipe("stale", max_steps=40, optim__lr=1e-9, eval__every="4", eval__early_stopping=2, checkpoint__keep_last=1),
    )
    lines = [line for line in read_metrics(run) if "set" in line]
    steps = [line["step"] for line in lines]
    assert steps == [4, 8, 12]  # the first is the best, two without a better one end the run
    for line in lines:
        assert line["num_rows"] > 0
        assert line["wer"] >= 0
        rows = list(read_jsonl(run.evaluation(line["step"], line["set"])))
        assert len(rows) == line["num_rows"]
    kept = [found.step for found in checkpoints.whole(run.checkpoints)]
    assert kept == [4, 12]  # the best and the last
    assert checkpoints.best(run.checkpoints).step == 4
    assert read_json(run.done)["best_step"] == 4


def test_training_lines_have_every_field(recipe):
    run = run_on(1, recipe("fields", max_steps=3))
    line = next(line for line in read_metrics(run) if "set" not in line)
    names = "attempt step epoch loss grad_norm lr num_utterances audio_s padded_audio_s step_time_s data_wait_s"
    assert {*names.split(), "audio_s_per_s"} <= line.keys()
    assert 0 < line["audio_s"] <= line["padded_audio_s"]
    assert line["num_utterances"] == len(trained(run)[line["step"]])


def test_a_frozen_transformer_thaws_at_its_step_wherever_the_run_was_stopped(recipe):
    def frozen(name, **changes):
        return recipe(name, max_steps=12, model__freeze_transformer_steps=6, checkpoint__every="1",
                      checkpoint__keep_last=20, **changes)  # fmt: skip

    whole = run_on(1, frozen("whole"))
    start_weights = weights(whole, 1)
    before_thaw, after_thaw = weights(whole, 6), weights(whole, 7)
    moved = {key for key in start_weights if not torch.equal(start_weights[key], before_thaw[key])}
    assert moved == {key for key in start_weights if ".lm_head." in key}
    assert any(not torch.equal(before_thaw[key], after_thaw[key]) for key in before_thaw if ".encoder." in key)
    two = run_on(2, frozen("two"))
    assert_close(losses(two), losses(whole))
    for stop_at in (5, 6, 7):
        resumed = frozen(f"stop{stop_at}")
        _copy_run_until(whole, RunDir(Path(resumed.run_dir)), stop_at)
        run = run_on(1, resumed)
        for key, tensor in weights(whole, 12).items():
            assert torch.equal(weights(run, 12)[key], tensor), (stop_at, key)


def _copy_run_until(source, target, step):
    for found in checkpoints.whole(source.checkpoints):
        if found.step <= step:
            shutil.copytree(found.path, target.checkpoints / found.path.name)
    for name in ("run.json", "recipe.yaml"):
        shutil.copy(source.path / name, target.path / name)


def test_a_torn_checkpoint_is_set_aside_and_none_whole_is_a_hard_stop(recipe):
    run = run_on(1, recipe("torn", max_steps=6, checkpoint__every="2", checkpoint__keep_last=9))
    shard = next((run.checkpoints / "step-0000000006" / "shards").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert checkpoints.newest(run.checkpoints).step == 4
    for found in checkpoints.whole(run.checkpoints):
        (found.path / "MANIFEST.json").unlink()
    run.done.unlink()

    def refused():
        with pytest.raises(CheckpointError, match="no checkpoint that can be used"):
            train(run.recipe())

    for _ in range(2):  # not even when the folder looks empty does it start from nothing
        run_ranks(1, refused)
        assert run.outcomes()[0]["exit_code"] == 5
    assert len(list((run.checkpoints / ".quarantine").iterdir())) == 3


def test_another_kind_of_device_on_resume_is_said(recipe, capfd):
    small = recipe("small", max_steps=2)
    run = run_on(1, small)
    edit_manifest(checkpoints.newest(run.checkpoints).path, device="NVIDIA H200")
    run.done.unlink()
    assert run_ranks(1, train, small) == [0]
    assert "was written on NVIDIA H200, this is cpu" in capfd.readouterr().err


def test_best_by_a_metric_that_cannot_be_scored_is_refused_before_anything_starts(recipe):
    with pytest.raises(RecipeError, match=r"eval\.best: 'dev/werr': expected SET/METRIC with a metric of: wer, cer"):
        recipe("x", eval__best="dev/werr")
    with pytest.raises(RecipeError, match=r"eval\.best: 'test/wer': expected SET/METRIC with a set of: dev"):
        recipe("x", eval__best="test/wer")
    extra = {"trust_remote_code": True, "eval__metrics": ["mine"], "eval__best": "dev/my_score"}
    with pytest.raises(RecipeError, match=r"eval\.higher_is_better: missing"):
        recipe("x", **extra)
    assert recipe("x", eval__higher_is_better=True, **extra).eval.best == "dev/my_score"


def test_a_metric_that_cannot_be_loaded_is_refused_before_a_step_is_paid_for(recipe, tmp_path):
    metric = tmp_path / "broken.py"
    metric.write_text("import datasets\nraise ValueError('broken')\n")
    broken = recipe("x", trust_remote_code=True, eval__metrics=[str(metric)])

    def refused():
        with pytest.raises(RecipeError, match=r"eval\.metrics: .*broken"):
            train(broken)

    run_ranks(1, refused)
    assert not losses(RunDir(Path(broken.run_dir)))


def test_extra_metrics_pick_the_best_in_their_own_direction(recipe, tmp_path):
    metric = tmp_path / "word_accuracy.py"
    metric.write_text(EXTRA_METRIC)
    changes = {"trust_remote_code": True, "eval__metrics": [str(metric)], "eval__best": "dev/word_accuracy"}
    run = run_on(1, recipe("extra", max_steps=4, eval__every="2", **changes))
    assert [line["word_accuracy"] for line in read_metrics(run) if "set" in line] == [0.25, 0.75]
    assert read_json(run.done)["best_step"] == 4


def test_a_signal_to_the_whole_process_group_stops_a_run_with_data_workers(recipe):
    """Launchers stop a worker by its process group; the data workers in it must not take the training down."""
    slow = recipe("slow", max_steps=400, num_workers=2)

    pid = start(slow, own_group=True)
    wait_for_step(slow, 5)
    os.killpg(pid, signal.SIGTERM)
    os.killpg(pid, signal.SIGTERM)  # and once more, as torchrun does
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    run = RunDir(Path(slow.run_dir))
    assert run.outcomes()[0]["status"] == "stopped"
    assert checkpoints.newest(run.checkpoints).step == run.outcomes()[0]["step"]
    with pytest.raises(ProcessLookupError):  # no data worker is left behind
        os.killpg(pid, 0)


def test_an_evaluation_that_a_stop_came_before_is_made_up_for(recipe):
    whole = run_on(1, recipe("whole", max_steps=6, eval__every="3"))
    stopped = recipe("stopped", max_steps=6, eval__every="3")

    def stopping():
        loop._forward = stop_in_forward(3)
        return train(stopped)

    assert run_ranks(1, stopping) == [0]
    run = RunDir(Path(stopped.run_dir))
    assert checkpoints.newest(run.checkpoints).step == 3
    assert not [line for line in read_metrics(run) if "set" in line]
    run_on(1, stopped)
    scores = [[(line["step"], line["wer"]) for line in read_metrics(found) if "set" in line] for found in (whole, run)]
    assert scores[0] == scores[1]
    assert [step for step, _ in scores[0]] == [3, 6]
    assert read_json(run.done)["best_step"] == read_json(whole.done)["best_step"]


def stop_in_forward(step):
    """The loop's forward, with a stop signal to this process in the unit that ends `step` updates."""
    forward = loop._forward
    turns = []

    def signalling(job, turn, *rest):
        turns.append(turn)
        if turn.is_last and sum(found.is_last for found in turns) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(job, turn, *rest)

    return signalling


def test_a_torn_last_checkpoint_is_written_anew_and_said(recipe, capfd):
    run = run_on(1, recipe("torn", max_steps=6, checkpoint__every="2", checkpoint__keep_last=9))
    shard = next((run.checkpoints / "step-0000000006" / "shards").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    run.done.unlink()
    assert run_ranks(1, train, run.recipe()) == [0]
    assert "step-0000000006 is not whole, and was set aside" in capfd.readouterr().err
    assert checkpoints.newest(run.checkpoints).step == 6


EXTRA_METRIC = """
import os
import datasets
import evaluate

class WordAccuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        assert len(predictions) == len(references) > 0
        is_first = "SECOND_CALL" not in os.environ
        os.environ["SECOND_CALL"] = "yes"
        return {"word_accuracy": 0.25 if is_first else 0.75}
"""


def test_where_the_time_went_is_counted_over_all_attempts(recipe, capfd):
    def spent(max_steps):
        before = time.monotonic()
        again = recipe("run", max_steps=max_steps, eval__every="2", checkpoint__every="2")
        assert run_ranks(1, lambda: train(again, allow_change=True)) == [0]
        return read_json(Path(again.run_dir) / "done.json")["spent_s"], time.monotonic() - before

    first, wall_s = spent(4)
    assert set(first) == set(PARTS)
    assert 0.8 * wall_s < sum(first.values()) < wall_s
    assert all(first[part] > 0 for part in ("compute", "padding", "data_wait", "checkpoint", "evaluation", "startup"))
    assert first["peer_wait"] < 0.01 * wall_s  # one process waits for nobody
    both, _ = spent(8)
    assert all(both[part] > first[part] for part in ("compute", "evaluation", "startup"))  # a save is not in itself
    said = capfd.readouterr().err
    assert len(re.findall(r"in all: compute [\d.]+%, padding [\d.]+%, data wait [\d.]+%, ", said)) == 2
