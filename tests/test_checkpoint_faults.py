"""What a checkpoint must survive: processes killed at every point, disks that fail, files that are damaged.

Real gloo processes, real SIGKILL. `fault_points` says how a fault gets to its point.
"""

import errno
import importlib
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from damage import edit_manifest, flip_bit, truncate
from fault_inputs import Trap, contents
from fault_points import ANY, SAVES, START, Fault, Point, install, notes_of
from ranks import RankError, run_ranks
from test_elastic import WAYS
from test_train import losses, weights
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from asr_train import checkpoint, checkpoints
from asr_train.errors import run_main
from asr_train.files import file_hash, read_json, read_jsonl
from asr_train.run_dir import RunDir

NUM_STEPS = 16
EVERY = 2  # steps between checkpoints
COMMIT = ".staging -> step"
STAGING = Point("mkdir", ".staging")
SHARDS_AGAIN = Point("mkdir", ".staging/shards", 2)  # by who made .staging
MODEL = {
    "architecture": "wav2vec2",
    "config": {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "conv_dim": [4] * 3, "conv_kernel": [10, 8, 8], "conv_stride": [5, 8, 8], "feat_extract_norm": "layer",
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True,
        "hidden_dropout": 0.1,
    },
}  # fmt: skip


class Seed(NamedTuple):
    """An uninterrupted run with all its checkpoints, and what it did."""

    way: str
    run: RunDir
    recipe: object  # name, checkpoint settings -> Recipe
    losses: dict
    weights: dict


@pytest.fixture(scope="module")
def seed_of(tiny_recipe, tmp_path_factory):
    """way -> its uninterrupted run, made once."""
    folder = tmp_path_factory.mktemp("seeds")
    made = {}

    def recipe(name, **settings):
        return tiny_recipe(
            run_dir=str(folder / name), max_steps=NUM_STEPS, unit_audio_s=3, units_per_step=2, num_workers=0,
            model=MODEL, log={"every": 1}, eval={"sets": {}, "every": None},
            checkpoint={"every": str(EVERY), "keep_last": 1, "keep_best": 0, **settings},
        )  # fmt: skip

    def make(way):
        if way not in made:
            preload(way)
            whole = recipe(f"{way}-whole", keep_last=99)
            assert run_ranks(2, WAYS[way], whole) == [0, 0]
            run = RunDir(Path(whole.run_dir))
            assert len(losses(run)) == NUM_STEPS
            made[way] = Seed(way, run, recipe, losses(run), weights(run))
        return made[way]

    return make


def prepare(seed, recipe, *steps):
    """A run directory that stands where the uninterrupted run stood after these checkpoints."""
    run = RunDir(Path(recipe.run_dir))
    shutil.rmtree(run.path, ignore_errors=True)
    run.checkpoints.mkdir(parents=True)
    for step in steps:
        name = f"step-{step:010d}"
        shutil.copytree(seed.run.checkpoints / name, run.checkpoints / name)
    for name in ("run.json", "recipe.yaml"):
        shutil.copy(seed.run.path / name, run.path / name)
    return run


def preload(way):
    """What every rank would import by itself otherwise."""
    if way.startswith("zero"):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def attempt(way, recipe, *faults):
    """One life of a run on two ranks: what each returned, or None when a fault killed one, and so all, as launchers do.

    Raises:
        RankError: it failed by itself.
    """
    run = RunDir(Path(recipe.run_dir))
    (notes_of(run.checkpoints) / "fired").unlink(missing_ok=True)

    def live():
        recorder = install(run.checkpoints, *faults)
        return WAYS[way](recipe), recorder.points

    try:
        return run_ranks(2, live)
    except RankError:
        if not (notes_of(run.checkpoints) / "fired").exists():
            raise
        return None


def newest_step(run):
    """Step of the newest folder under a checkpoint's name; all of them must be whole."""
    found = checkpoints.found(run.checkpoints)
    for one in found:
        assert checkpoints.verify(one).problem is None, f"{one.name} is a mixture"
    return found[-1].step


def check_lines(seed, run):
    """Each attempt's first step, and that every loss it wrote is that of the uninterrupted run, bit for bit."""
    started = {}
    last = {}
    for line in read_jsonl(run.metrics):
        number = line["attempt"]
        if line.get("event") == "restored":
            started[number] = last[number] = line["step"]
        elif "loss" in line:
            last[number] += 1
            assert line["step"] == last[number]
            assert line["loss"] == seed.losses[line["step"]], f"step {line['step']} of attempt {number}"
    return started, last


def leftovers(run):
    return {path.name for path in run.checkpoints.iterdir() if path.name.startswith((".staging", ".trash"))}


# --- row 1: killed at every point -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def points_of(seed_of):
    """way -> for each rank, what it does in one save, in order."""
    made = {}

    def record(way):
        if way not in made:
            seed = seed_of(way)
            recipe = seed.recipe(f"{way}-recorded", asynchronous=False)
            prepare(seed, recipe, NUM_STEPS - EVERY)
            made[way] = [in_order(points) for _, points in attempt(way, recipe)]
        return made[way]

    return record


def in_order(points):
    """One rank's points of the first save; which rank makes the staging folder is a race, and is no rank's."""
    return [point for phase, point in points if phase == 1 and point not in (STAGING, SHARDS_AGAIN)]


def moments(points):
    """All (rank, point, moment): an operation has a before and an after, a write an inside as well."""
    for rank, own in ((ANY, [STAGING]), *enumerate(points)):
        for point in own:
            for moment in ("before", "inside", "after") if point.operation == "write" else ("before", "after"):
                yield rank, point, moment


def is_committed(own, point, moment):
    """Whether rank 0 has given the folder its name at a moment of its list of points."""
    here, there = own.index(point), own.index(Point("rename", COMMIT))
    return here > there or (here == there and moment == "after")


def kill_at_each(seed, points, cases, name):
    """Kill a run at one point, start it again, kill that at the next point, and so on; then let it end.

    Every start must load the newest checkpoint there is, the one before the kill or the new one, whole, clear away
    what the kill left, and make the steps of the uninterrupted run.
    """
    run = None
    for number, (rank, point, moment, victim) in enumerate(cases):
        recipe = seed.recipe(name, asynchronous=bool(number % 2))
        if run is None or newest_step(run) > NUM_STEPS - 3 * EVERY:
            if run is not None:
                check_lines(seed, run)
            run = prepare(seed, recipe, EVERY)
        before, rubbish = newest_step(run), leftovers(run)
        fault = Fault(rank, point, moment, SAVES, victim)
        ended = attempt(seed.way, recipe, fault)
        assert ended is None, f"never came to: {fault}"
        started, last = check_lines(seed, run)
        mine = max(started)
        assert started[mine] == before, fault
        assert last[mine] >= before + EVERY, fault
        assert not leftovers(run) & rubbish, f"left after a restart: {fault}"
        after = newest_step(run)
        assert after in (before, before + EVERY), fault
        if rank == victim == 0:
            assert (after > before) == is_committed(points[0], point, moment), fault
    assert attempt(seed.way, recipe) is not None
    assert not leftovers(run)
    assert losses(run) == {step: loss for step, loss in seed.losses.items() if step > EVERY}
    for key, tensor in weights(run).items():
        assert torch.equal(tensor, seed.weights[key]), key


def cases_of(points, moment, *, is_all=False):
    """(rank at the point, point, moment, rank killed): that alternates, or all combinations."""
    few = points if is_all else [[point for point in own if not is_inner_deletion(point)] for own in points]
    found = [case for case in moments(few) if case[2] == moment]
    for number, (rank, point, when) in enumerate(found):
        for victim in (0, 1) if is_all else ((rank + number) % 2,):
            yield rank, point, when, ANY if rank == ANY else victim


def is_inner_deletion(point):
    """A deletion that is neither the first nor the last of a folder; the middle one stays."""
    return point.operation in ("unlink", "rmdir") and point.name not in (".trash/state.json", ".trash")


@pytest.mark.parametrize("moment", ["before", "inside", "after"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_killed_at_any_point_of_a_save(seed_of, points_of, way, moment):
    points = points_of(way)
    cases = cases_of(points, moment)
    if (way, moment) == ("fsdp2", "after"):  # of what is just before a rank's next point the most important ones
        begins = points[0].index(Point("fsync", ".staging/MANIFEST.json"))
        cases = (case for case in cases if case[0] == 0 and points[0].index(case[1]) >= begins)
    kill_at_each(seed_of(way), points, cases, f"{way}-{moment}")


@pytest.mark.parametrize("way", ["zero1", "zero2", "zero3"])
def test_killed_at_six_points_of_a_save_under_zero(seed_of, points_of, way):
    shard = ".staging/shards/__1_0.distcp"
    cases = [
        (1, Point("write", shard), "inside", 1),
        (1, Point("fsync", shard), "before", 0),
        (0, Point("rename", ".staging/shards/.metadata.tmp -> .staging/shards/.metadata"), "after", 1),
        (0, Point("write", ".staging/MANIFEST.json"), "inside", 0),
        (0, Point("rename", COMMIT), "after", 0),
        (0, Point("unlink", ".trash/state.json"), "after", 0),
    ]
    kill_at_each(seed_of(way), points_of(way), cases, f"{way}-six")


@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", ["before", "inside", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_point_of_a_save_any_rank(seed_of, points_of, way, moment):
    cases = list(cases_of(points_of(way), moment, is_all=True))
    kill_at_each(seed_of(way), points_of(way), cases, f"{way}-{moment}-all")


STOP_HERE = Fault(0, Point("mkdir", ".staging/shards"), "before", SAVES, 0)  # ends an attempt after EVERY steps


@pytest.mark.parametrize("moment", ["before", "inside"])
def test_killed_while_a_start_clears_away(seed_of, moment):
    """A damaged checkpoint is set aside, and what earlier attempts left is deleted: killed there, the next one does."""
    seed = seed_of("ddp")
    recipe = seed.recipe(f"start-{moment}")

    def littered():
        run = prepare(seed, recipe, EVERY, 2 * EVERY)
        flip_bit(run.checkpoints / f"step-{2 * EVERY:010d}" / "state.json")
        for name in (".staging-000-01234567", ".trash-step-0000000002-01234567"):
            (run.checkpoints / name).mkdir()
            for number in (1, 2):
                (run.checkpoints / name / f"file-{number}").touch()
        return run

    littered()
    [(_, points), _] = attempt("ddp", seed.recipe(f"start-{moment}", every=None))
    points = [[point for phase, point in points if phase == START], []]
    assert len(points[0]) > 15
    for _, point, _ in (case for case in moments(points) if case[2] == moment and case[0] == 0):
        run = littered()
        fault = Fault(0, point, moment, START, 0)
        assert attempt("ddp", recipe, fault) is None, f"never came to: {fault}"
        assert attempt("ddp", recipe, STOP_HERE) is None
        started, last = check_lines(seed, run)
        assert (started[2], last[2]) == (EVERY, 2 * EVERY), fault
        assert [one.step for one in checkpoints.found(run.checkpoints)] == [EVERY], fault
        assert not [name for name in leftovers(run) if not name.startswith(".staging-002-")], fault
        [aside] = (run.checkpoints / ".quarantine").iterdir()
        assert aside.name.startswith(f"step-{2 * EVERY:010d}-")


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
