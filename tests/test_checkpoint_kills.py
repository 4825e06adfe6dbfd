"""Killed at any point of a save, or of a start: the run goes on from a whole checkpoint, with the same bits."""

import pytest
import torch
from checkpoint_lives import (  # noqa: F401  fixtures
    COMMIT,
    EVERY,
    NUM_STEPS,
    SHARDS_AGAIN,
    STAGING,
    STOP_HERE,
    attempt,
    check_lines,
    leftovers,
    newest_step,
    prepare,
    seed_of,
)
from damage import flip_bit
from fault_points import ANY, SAVES, START, Fault, Point
from small_run import losses, weights
from test_elastic import WAYS

from asr_train import checkpoints

# ruff: noqa: F811  their names as arguments


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
