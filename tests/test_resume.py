"""Kill and go on, at every step; saves beside training; export from every strategy. Real ranks, real SIGKILL."""

import hashlib
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import pytest
import torch
import torch.distributed as dist
from damage import flip_bit
from ranks import RankError, run_ranks
from safetensors.torch import load_file
from small_run import losses, recipe, trained, weights  # noqa: F401  recipe is a fixture
from test_elastic import WAYS
from torch import nn
from transformers import AutoModelForCTC

from asr_train import checkpoint, checkpoints, loop
from asr_train.checkpoint import Ranks, Saver
from asr_train.checkpoints import Checkpoint
from asr_train.config import CheckpointSettings
from asr_train.errors import CheckpointError, RecipeError
from asr_train.export import export
from asr_train.files import read_jsonl
from asr_train.live_state import create_state
from asr_train.peer_wait import PeerWait
from asr_train.run_dir import RunDir, read_metrics
from asr_train.safe_load import load_tensors
from asr_train.state import TrainState
from asr_train.strategy import Parallel
from asr_train.train import train


def scores(run):
    return [(line["step"], line["wer"]) for line in read_metrics(run) if "set" in line]


def train_and_die(recipe, num_saves):  # noqa: F811
    """Train, and be killed right after so many saves of this attempt, at step 0 too."""
    save = loop._Saves.save
    count = 0

    def dying(self, **how):
        nonlocal count
        save(self, **how)
        self._job.saver.wait()
        count += 1
        if count == num_saves:
            os.kill(os.getpid(), signal.SIGKILL)

    loop._Saves.save = dying
    due = loop.due
    loop.due = lambda cadence, step, steps: step == 0 or due(cadence, step, steps)
    return train(recipe)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_killed_at_every_step_of_2_epochs_ends_with_the_same_bits(recipe, num_workers):  # noqa: F811
    """Dropout, layerdrop and SpecAugment on; the transformer thaws on the way; the first kill is at step 0."""
    changes = {
        "max_steps": None, "max_epochs": 2, "units_per_step": 3, "checkpoint__every": "1",
        "num_workers": num_workers, "model__freeze_transformer_steps": 4, "eval__every": "1 epoch",
    }  # fmt: skip
    whole = recipe("whole", **changes)
    assert run_ranks(1, train, whole) == [0]
    expected = RunDir(Path(whole.run_dir))
    max_steps = max(losses(expected))
    assert max_steps >= 8

    broken = recipe("broken", **changes)
    run = RunDir(Path(broken.run_dir))
    for step in range(max_steps):
        with pytest.raises(RankError, match="exit code -9"):
            # the first save of an attempt that goes on is of the step it began with, and skipped
            run_ranks(1, train_and_die, broken, 1 if step == 0 else 2)
        assert checkpoints.newest(run.checkpoints).step == step
    assert run_ranks(1, train, broken) == [0]
    assert losses(run) == losses(expected)
    assert trained(run) == trained(expected)
    scores = [
        [(line["step"], line["wer"]) for line in read_metrics(found) if "set" in line] for found in (run, expected)
    ]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 2
    found = weights(run)
    for name, tensor in weights(expected).items():
        assert torch.equal(found[name], tensor), name


def small_parallel():
    """Two layers under plain data parallelism by hand; what `Saver` needs of a `Parallel`, and no more."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(module.parameters())
    accelerator = SimpleNamespace(
        scaler=None, process_index=dist.get_rank(), num_processes=dist.get_world_size(), device=torch.device("cpu")
    )
    parallel = Parallel(
        accelerator=accelerator,
        model=module,
        module=module,
        optimizer=optimizer,
        stepper=optimizer,
        peer_wait=PeerWait(accelerator.device),
    )
    create_state(parallel)
    return parallel


def read_back(path, names):
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in names.items()}
    load_tensors(found, path / "shards", group=None, no_dist=True)
    return found


def test_100_saves_beside_collectives_hold_what_was_there_when_they_began(tmp_path):
    """The weights are changed as soon as `save` returns, while the loop's group sums over ranks all the time."""

    def saving():
        dist.init_process_group("gloo")
        parallel = small_parallel()
        settings = CheckpointSettings(keep_last=2)
        saver = Saver(tmp_path, parallel, Ranks(parallel), settings, {"attempt": 1})
        first = parallel.module[0].weight
        for step in range(1, 101):
            with torch.no_grad():
                for parameter in parallel.module.parameters():
                    parameter.fill_(step)
                    parallel.optimizer.state[parameter]["exp_avg"].fill_(-step)
            saver.save(TrainState(step=step))
            with torch.no_grad():
                first.fill_(0.5)
            for _ in range(3):
                total = torch.ones(1000)
                dist.all_reduce(total)
                assert total[0] == 2
            dist.barrier()
            saver.wait()
            result = saver.take_result()
            assert (result.step, result.problem) == (step, None)
            found = read_back(result.path, {"model.0.weight": ((256, 64), torch.float32),
                                            "optimizer.1.bias.exp_avg": ((8,), torch.float32)})  # fmt: skip
            assert (found["model.0.weight"] == step).all()
            assert (found["optimizer.1.bias.exp_avg"] == -step).all()
        saver.close()
        return [found.step for found in checkpoints.whole(tmp_path)]

    assert run_ranks(2, saving, timeout_s=240) == [[99, 100], [99, 100]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000099", "step-0000000100"]


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """`save` returns before anything is on disk; the next one waits for it; nothing is given out twice."""
    write = checkpoint.Saver._write

    may_write = threading.Event()

    def slowly(self, *rest):
        assert may_write.wait(300)
        return write(self, *rest)

    def saving():
        monkeypatch.setattr(checkpoint.Saver, "_write", slowly)
        dist.init_process_group("gloo")
        parallel = small_parallel()
        saver = Saver(tmp_path, parallel, Ranks(parallel), CheckpointSettings(), {"attempt": 1})
        saver.save(TrainState(step=1))
        assert saver.take_result() is None
        assert not checkpoints.found(tmp_path)
        threading.Timer(0.5, may_write.set).start()
        saver.save(TrainState(step=2))
        assert may_write.is_set()
        saver.close()
        assert saver.take_result().step == 2
        assert saver.take_result() is None

    run_ranks(1, saving)
    assert [found.step for found in checkpoints.whole(tmp_path)] == [1, 2]


@pytest.mark.parametrize("way", list(WAYS))
def test_an_export_from_every_strategy_has_the_very_weights(recipe, way, tmp_path):  # noqa: F811
    small = recipe("run", max_steps=3)
    assert run_ranks(2, WAYS[way], small) == [0, 0]
    run = RunDir(Path(small.run_dir))
    folder = export(run.path, tmp_path / "model").folder
    loaded = AutoModelForCTC.from_pretrained(folder).state_dict()
    expected = {name.removeprefix("model.hf."): tensor for name, tensor in weights(run).items()}
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_weights_of_a_run_a_checkpoint_or_an_export_start_another_run(recipe, tmp_path, capfd):  # noqa: F811
    """pretrained < init_from < the run's own checkpoint."""
    first = recipe("first", max_steps=3)
    assert run_ranks(1, train, first) == [0]
    source = RunDir(Path(first.run_dir))
    folder = export(source.path, tmp_path / "model").folder
    exported = load_file(folder / "model.safetensors")
    starts = [source.path, checkpoints.newest(source.checkpoints).path, folder]
    for number, start in enumerate(starts):
        second = recipe(f"second-{number}", max_steps=2, seed=5, model__init_from=str(start), optim__lr=1e-12)
        assert run_ranks(1, train, second) == [0]
        assert "weights from" in capfd.readouterr().err
        found = weights(RunDir(Path(second.run_dir)))
        for name, tensor in exported.items():
            torch.testing.assert_close(found[f"model.hf.{name}"], tensor, rtol=1e-4, atol=1e-6)

    def refused():
        with pytest.raises(RecipeError, match=r"model\.init_from: .*nowhere.*no run, no checkpoint, and no exported"):
            train(recipe("third", model__init_from=str(tmp_path / "nowhere")))
        other = recipe("other", model__init_from=str(folder), **{"model__config.hidden_size": 32})
        with pytest.raises(CheckpointError, match="is of another model"):
            train(other)

    run_ranks(1, refused)


@pytest.mark.parametrize(
    ("last", "best", "every", "expected"),
    [
        (1, 0, None, [60]),
        (2, 1, None, [20, 50, 60]),
        (1, 2, None, [20, 40, 60]),
        (1, 0, 20, [20, 40, 60]),
        (9, 0, None, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_which_checkpoints_are_kept(last, best, every, expected):
    wer = {10: 0.9, 20: 0.1, 30: None, 40: 0.2, 50: 0.3, 60: None}
    candidates = [
        Checkpoint(Path(f"step-{step:010d}"), {"score": value and {"metric": "dev/wer", "value": value,
                                                                   "higher_is_better": False}})
        for step, value in wer.items()
    ]  # fmt: skip
    assert [found.step for found in checkpoints.kept(candidates, last=last, best=best, every=every)] == expected


def test_a_save_is_reported_with_the_time_that_training_stood_still(recipe):  # noqa: F811
    small = recipe("small", max_steps=4, checkpoint__every="2")
    assert run_ranks(2, train, small) == [0, 0]
    saved = [line for line in read_jsonl(RunDir(Path(small.run_dir)).metrics) if line.get("event") == "saved"]
    assert [line["step"] for line in saved] == [2, 4]
    assert all(0 < line["blocked_s"] <= line["seconds"] for line in saved)


def test_sha256_verifies_too(recipe):  # noqa: F811
    small = recipe("small", max_steps=2, checkpoint__hash="sha256")
    assert run_ranks(1, train, small) == [0]
    newest = checkpoints.newest(RunDir(Path(small.run_dir)).checkpoints)
    for name, entry in newest.files.items():
        assert entry["hash"] == hashlib.sha256((newest.path / name).read_bytes()).hexdigest()
    flip_bit(newest.path / "state.json")
    assert "state.json is not what was written: its sha256 differs" in checkpoints.verify(newest).problem


def test_a_checkpoint_of_another_run_is_refused(recipe):  # noqa: F811
    """Whole, and of the same recipe: put there by hand, or by a copy that went wrong."""
    one, two = recipe("one", max_steps=3), recipe("two", max_steps=3)
    assert run_ranks(1, train, one) == run_ranks(1, train, two) == [0]
    first, second = (RunDir(Path(made.run_dir)) for made in (one, two))
    shutil.rmtree(second.checkpoints)
    shutil.copytree(first.checkpoints, second.checkpoints)
    second.done.unlink()

    def refused():
        with pytest.raises(CheckpointError, match="is a checkpoint of another run"):
            train(two)

    run_ranks(1, refused)
    assert second.outcomes()[0]["exit_code"] == 5
