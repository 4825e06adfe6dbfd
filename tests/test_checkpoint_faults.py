"""Disks that refuse, and checkpoints that are damaged: found by all ranks, and the run goes on from what is whole."""

import errno
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
from checkpoint_lives import (  # noqa: F401  fixtures
    COMMIT,
    EVERY,
    NUM_STEPS,
    STOP_HERE,
    attempt,
    check_lines,
    leftovers,
    newest_step,
    prepare,
    seed_of,
)
from damage import edit_manifest, flip_bit, truncate
from fault_inputs import Trap, contents
from fault_points import ANY, SAVES, Fault, Point, install
from ranks import run_ranks
from small_run import losses
from test_elastic import WAYS
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from asr_train import checkpoint, checkpoints
from asr_train.errors import run_main
from asr_train.files import file_hash, read_json, read_jsonl
from asr_train.run_dir import RunDir

# ruff: noqa: F811  their names as arguments

# --- row 2: a disk that refuses ---------------------------------------------------------------------------------


SHARD = ".staging/shards/__{}_0.distcp"
REFUSALS = [  # (rank, operation, name, moment)
    (0, "open", SHARD, "before"),
    (1, "open", SHARD, "before"),
    (0, "write", SHARD, "inside"),
    (1, "write", SHARD, "inside"),
    (0, "fsync", SHARD, "before"),
    (1, "fsync", SHARD, "before"),
    (ANY, "mkdir", ".staging", "before"),  # the ranks race for it, and who comes second does not care
    (ANY, "mkdir", ".staging/generators", "before"),
    (1, "write", ".staging/generators/rank-1.json", "inside"),
    (0, "fsync", ".staging/generators/rank-0.json", "before"),
    (0, "write", ".staging/shards/.metadata.tmp", "inside"),
    (0, "fsync", ".staging/shards/.metadata.tmp", "before"),
    (0, "rename", ".staging/shards/.metadata.tmp -> .staging/shards/.metadata", "before"),
    (0, "write", ".staging/state.json", "inside"),
    (0, "fsync", ".staging/state.json", "before"),
    (0, "open", ".staging/MANIFEST.json", "before"),
    (0, "write", ".staging/MANIFEST.json", "inside"),
    (0, "fsync", ".staging/MANIFEST.json", "before"),
    (0, "fsync", ".staging/shards", "before"),
    (0, "fsync", ".staging", "before"),
    (0, "rename", COMMIT, "before"),
]


def refusal(rank, operation, name, moment, *, error, phase):
    return Fault(rank, Point(operation, name.format(rank)), moment, phase, error=error)


def watched(way, recipe, *faults):
    """An attempt with faults; its exit code, and after each save what it said, its step and what was on disk."""
    run = RunDir(Path(recipe.run_dir))

    def live():
        install(run.checkpoints, *faults)
        seen = []
        take = checkpoint.Saver.take_result

        def looked(saver):
            result = take(saver)
            if result is not None:
                whole = [one.step for one in checkpoints.whole(run.checkpoints) if not checkpoints.verify(one).problem]
                seen.append((result.step, result.problem, whole, leftovers(run)))
            return result

        checkpoint.Saver.take_result = looked
        return run_main(lambda arguments: WAYS[way](recipe), []), seen

    return run_ranks(2, live)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_disk_that_refuses_costs_a_checkpoint_and_nothing_else(seed_of, way, asynchronous, capfd):
    """Every second save of a run fails, each for another reason."""
    seed = seed_of(way)
    refusals = REFUSALS if way == "ddp" else REFUSALS[:3] + REFUSALS[-4:]
    name = f"{way}-refused-{asynchronous}"
    size = NUM_STEPS // 2 - 1
    for number in range(0, len(refusals), size):
        recipe = seed.recipe(f"{name}-{number}", every="1", asynchronous=asynchronous, max_failed_saves=2)
        run = prepare(seed, recipe, EVERY)
        faults = {
            EVERY + phase: refusal(*one, error=errno.ENOSPC if phase % 4 == 1 else errno.EIO, phase=phase)
            for phase, one in zip(range(1, NUM_STEPS, 2), refusals[number : number + size], strict=False)
        }
        (code, seen), (other_code, other_seen) = watched(way, recipe, *faults.values())
        said = capfd.readouterr().err
        assert (code, other_code) == (0, 0)
        assert [one[:2] for one in seen] == [one[:2] for one in other_seen]  # all ranks know the same
        good = EVERY
        events = {line["step"]: line for line in read_jsonl(run.metrics) if line.get("event") == "save_failed"}
        assert events.keys() == faults.keys()
        for step, problem, whole, left in seen:
            fault = faults.get(step)
            good = good if fault else step
            assert whole == [good], fault
            assert not left, fault
            assert (problem is None) == (fault is None), (step, fault)
            if fault:
                assert os.strerror(fault.error) in problem
                assert problem.startswith("rank " if fault.rank == ANY else f"rank {fault.rank}: "), fault
                assert events[step]["problem"] == problem
                assert f"the checkpoint of step {step} failed, those before it are untouched: {problem}" in said
        assert losses(run) == {step: loss for step, loss in seed.losses.items() if step > EVERY}
        assert newest_step(run) == NUM_STEPS


def test_a_folder_that_could_not_be_flushed_after_its_rename_is_whole_or_absent(seed_of):
    """The rename happened; whether a power cut would undo it nobody knows: it counts as failed, and harms nothing."""
    seed = seed_of("ddp")
    recipe = seed.recipe("parent-fsync")
    run = prepare(seed, recipe, EVERY)
    (code, seen), _ = watched("ddp", recipe, Fault(0, Point("fsync", "."), "before", 1, error=errno.EIO))
    assert code == 0
    assert seen[0][1] is not None
    assert [problem for _, problem, _, _ in seen[1:]] == [None] * (len(seen) - 1)
    assert [one.step for one in checkpoints.found(run.checkpoints)] == [NUM_STEPS]
    assert newest_step(run) == NUM_STEPS


@pytest.mark.parametrize(
    "operation", [("rename", "step -> .trash"), ("unlink", ".trash/state.json"), ("rmdir", ".trash")]
)
def test_an_old_checkpoint_that_cannot_be_deleted_is_said_and_training_goes_on(seed_of, operation, capfd):
    seed = seed_of("ddp")
    recipe = seed.recipe(f"undeletable-{operation[0]}")
    run = prepare(seed, recipe, NUM_STEPS - 2 * EVERY)
    (code, seen), _ = watched("ddp", recipe, Fault(0, Point(*operation), "before", 1, error=errno.EIO))
    assert code == 0
    assert [problem for _, problem, _, _ in seen] == [None, None]
    assert "could not be deleted: [Errno 5] Input/output error" in capfd.readouterr().err
    assert newest_step(run) == NUM_STEPS


def test_a_disk_that_stays_full_ends_the_run_with_what_to_do(seed_of, capfd):
    seed = seed_of("ddp")
    recipe = seed.recipe("stays-full", every="1", max_failed_saves=3)
    run = prepare(seed, recipe, EVERY)
    fault = refusal(1, "write", SHARD, "inside", error=errno.ENOSPC, phase=SAVES)
    (code, seen), (other_code, _) = watched("ddp", recipe, fault)
    said = capfd.readouterr().err
    assert (code, other_code) == (4, 4)
    assert {found["exit_code"] for found in run.outcomes().values()} == {4}
    assert len(seen) == 3
    assert f"error: the checkpoint of step {EVERY + 3} could not be written to {run.checkpoints}: rank 1: " in said
    assert "No space left on device" in said
    assert "make room there, and the same command goes on from the newest" in said
    assert newest_step(run) == EVERY
    assert not leftovers(run)
    assert attempt("ddp", recipe) is not None  # with room again
    assert losses(run) == {step: loss for step, loss in seed.losses.items() if step > EVERY}


def test_a_last_checkpoint_that_fails_is_an_error_at_once(seed_of, capfd):
    seed = seed_of("ddp")
    recipe = seed.recipe("last", max_failed_saves=3)
    run = prepare(seed, recipe, NUM_STEPS - 2 * EVERY)
    fault = refusal(0, "write", ".staging/MANIFEST.json", "inside", error=errno.ENOSPC, phase=2)
    assert [code for code, _ in watched("ddp", recipe, fault)] == [4, 4]
    assert f"the checkpoint of step {NUM_STEPS} could not be written" in capfd.readouterr().err
    assert newest_step(run) == NUM_STEPS - EVERY
    assert not run.done.exists()


# --- row 3: what is on disk is damaged --------------------------------------------------------------------------


def swap_shards(folder):
    one, two = sorted((folder / "shards").glob("*.distcp"))
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def on_file(damage, name, folder):
    damage(folder / name)


def manifest_of_another_step(folder):
    older = sorted(folder.parent.glob("step-*"))[0]
    shutil.copy(older / "MANIFEST.json", folder / "MANIFEST.json")


def manifest_of_another_run(folder):
    """All names and sizes right, and the hash of itself too: the files are not those that it names."""
    files = read_json(folder / "MANIFEST.json")["files"]
    name = "shards/__0_0.distcp"
    files[name]["hash"] = files["shards/__1_0.distcp"]["hash"]
    edit_manifest(folder, files=files, run_id="of another run")


def poison(folder):
    """`.metadata` is a program, and the manifest agrees: only what unpickles it stands in the way."""
    path = folder / "shards" / ".metadata"
    path.write_bytes(pickle.dumps(Trap(folder.parent.parent / "sprung")))
    assert_consistent(folder, path)


def a_value_that_is_no_tensor(folder):
    """Torch would unpickle it."""
    path = folder / "shards" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata[next(iter(metadata.state_dict_metadata))] = BytesStorageMetadata()
    path.write_bytes(pickle.dumps(metadata))
    assert_consistent(folder, path)


def state_of_nothing(folder):
    (folder / "state.json").write_text("[]")
    assert_consistent(folder, folder / "state.json")


def assert_consistent(folder, path):
    """Have the manifest agree with a file that was changed."""
    files = read_json(folder / "MANIFEST.json")["files"]
    entry = {"size": path.stat().st_size, "hash": file_hash(path, "xxh3_128")}
    edit_manifest(folder, files={**files, str(path.relative_to(folder)): entry})
    assert checkpoints.verify(checkpoints.open_checkpoint(folder)).problem is None


KINDS = (
    "shards/__0_0.distcp", "shards/__1_0.distcp", "shards/.metadata", "state.json", "generators/rank-0.json",
    "generators/rank-1.json", "MANIFEST.json",
)  # fmt: skip
DAMAGES = {
    **{f"bit in {name}": (partial(on_file, flip_bit, name), name) for name in KINDS},
    **{f"end of {name}": (partial(on_file, truncate, name), name) for name in KINDS},
    **{f"no {name}": (partial(on_file, Path.unlink, name), name) for name in KINDS},
    "shards swapped": (swap_shards, "shards/__0_0.distcp"),
    "manifest of another step": (manifest_of_another_step, f"MANIFEST.json is that of step {EVERY}"),
    "manifest of another run": (manifest_of_another_run, "shards/__0_0.distcp is not what was written"),
    "poisoned": (poison, "has no place in a checkpoint; it was not called"),
    "no tensor": (a_value_that_is_no_tensor, "is no tensor; it was not loaded"),
    "state of nothing": (state_of_nothing, "state.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_all_ranks_fall_back_together(seed_of, damage, capfd):
    check_fall_back(seed_of("ddp"), damage, capfd)


@pytest.mark.parametrize("damage", ["bit in shards/__1_0.distcp", "shards swapped", "poisoned"])
@pytest.mark.parametrize("way", ["fsdp2", "zero2"])
def test_damage_is_found_under_other_strategies_too(seed_of, way, damage, capfd):
    check_fall_back(seed_of(way), damage, capfd)


def check_fall_back(seed, damage, capfd):
    recipe = seed.recipe(f"{seed.way}-damaged")
    run = prepare(seed, recipe, EVERY, 2 * EVERY)
    newest = run.checkpoints / f"step-{2 * EVERY:010d}"
    make, words = DAMAGES[damage]
    make(newest)
    there = contents(newest)
    capfd.readouterr()
    assert attempt(seed.way, recipe, STOP_HERE) is None
    started, last = check_lines(seed, run)
    assert (started[1], last[1]) == (EVERY, 2 * EVERY)
    assert newest_step(run) == EVERY
    [aside] = (run.checkpoints / ".quarantine").iterdir()
    assert words in checkpoints.reason(aside)
    kept = contents(aside)
    del kept["REASON.json"]
    assert kept == there  # nothing of it was touched
    assert f"{newest.name} is not whole, and was set aside in .quarantine/: " in capfd.readouterr().err
    assert not (run.path / "sprung").exists()


# --- row 4: nothing that can be used ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_where_every_checkpoint_is_bad_nothing_is_trained_and_nothing_overwritten(seed_of, way, capfd):
    seed = seed_of(way)
    recipe = seed.recipe(f"{way}-all-bad")
    run = prepare(seed, recipe, *range(EVERY, 5 * EVERY, EVERY))
    for folder, damage in zip(sorted(run.checkpoints.iterdir()), ("poisoned", *DAMAGES), strict=False):
        DAMAGES[damage][0](folder)
    before = sorted(contents(run.checkpoints).values())
    for _ in range(2):  # not even when the folder looks empty
        capfd.readouterr()
        assert [code for code, _ in watched(way, recipe)] == [5, 5]
        said = capfd.readouterr().err
        assert f"error: {run.checkpoints} holds no checkpoint that can be used:" in said
        assert "Nothing was overwritten. Bring a whole one back, or move this folder away to start from step 0." in said
        for step in range(EVERY, 5 * EVERY, EVERY):
            assert f".quarantine/step-{step:010d}-" in said
        assert {found["exit_code"] for found in run.outcomes().values()} == {5}
        left = {path: hash for path, hash in contents(run.checkpoints).items() if not path.endswith("REASON.json")}
        assert sorted(left.values()) == before
        assert not losses(run)
