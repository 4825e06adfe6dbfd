"""Curves in trackers: TensorBoard where it is installed, and in each the run's own place over all attempts.

W&B, MLflow and trackio are not installed here: stand-ins take their place and write down what accelerate's own tracker
classes ask of them.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from ranks import RankError, run_ranks
from test_runs import first_line, losses, recipe, signal_in_step  # noqa: F401  recipe is a fixture

from asr_train import trackers
from asr_train.errors import LibraryError, RecipeError
from asr_train.files import append_jsonl, read_jsonl
from asr_train.ledger import PARTS
from asr_train.recipe import decode_recipe, dump_recipe, recipe_hash, to_values
from asr_train.run_dir import RunDir
from asr_train.trackers import tracker_names
from asr_train.train import train


def tracking_with(recipe, names):  # noqa: F811
    return replace(recipe, log=replace(recipe.log, trackers=names))


@pytest.fixture
def installed(monkeypatch):
    """A function: what accelerate finds installed."""

    def install(*names):
        monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType(name) for name in names])

    return install


def test_tensorboard_is_the_default_where_it_is_installed(installed, tiny_recipe):
    values = to_values(tiny_recipe())
    del values["log"]
    default = decode_recipe(values)
    installed("tensorboard", "aim")
    assert tracker_names(default) == ["tensorboard"]
    assert tracker_names(tracking_with(default, ("aim",))) == ["aim"]
    assert tracker_names(tracking_with(default, ())) == []
    with_it = dump_recipe(default), recipe_hash(default)
    installed("aim")
    assert tracker_names(default) == [], "and nobody is told, for nobody asked"
    assert (dump_recipe(default), recipe_hash(default)) == with_it


def test_a_broken_tensorboard_that_nobody_asked_for_ends_nothing(installed, tiny_recipe, monkeypatch):
    installed("tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import of it fails
    assert tracker_names(tracking_with(tiny_recipe(), None)) == []
    assert tracker_names(tracking_with(tiny_recipe(), ("tensorboard",))) == ["tensorboard"]


def test_a_tracker_that_was_asked_for_and_is_not_there_is_refused_with_the_remedy(installed, tiny_recipe):
    installed("tensorboard")
    with pytest.raises(RecipeError, match=r"log\.trackers: tensorbord: not installed.*here: tensorboard"):
        tracker_names(tiny_recipe(**{"log.trackers": ["tensorbord"]}))
    with pytest.raises(LibraryError, match=r"log\.trackers: mlflow: needs mlflow, .*: pip install mlflow"):
        tracker_names(tiny_recipe(**{"log.trackers": ["mlflow"]}))


def test_curves_of_a_killed_and_resumed_run_have_every_step_once(recipe):  # noqa: F811
    """Killed in step 6, on from step 3: of steps 4 and 5 TensorBoard shows what the second attempt made."""
    changes = {"max_steps": 8, "eval.every": "2", "checkpoint": {"every": "3", "save_best": False}}
    tracked = recipe("tracked", {**changes, "log.trackers": None})
    run = RunDir(Path(tracked.run_dir))

    def killed():
        signal_in_step(9, 6)
        return train(tracked)

    with pytest.raises(RankError):
        run_ranks(1, killed)
    assert sorted(losses(run)) == [1, 2, 3, 4, 5]
    time.sleep(1.1)  # the files are read in the order of their names, which count seconds
    assert run_ranks(1, train, tracked) == [0]
    assert first_line(run, 2)["step"] == 3
    (curves,) = run_ranks(1, read_curves, run.path / "trackers" / "tiny")
    assert [step for step, _ in curves["loss"]] == list(range(1, 9))
    assert [step for step, _ in curves["dev/wer"]] == [2, 4, 6, 8]
    assert dict(curves["loss"]) == pytest.approx(losses(run), rel=1e-6)
    assert {tag for tag in curves if tag.startswith("ledger/")} == {f"ledger/{part}" for part in PARTS}
    expected = dict(ledger_shares(run))
    for part in PARTS:
        curve = curves[f"ledger/{part}"]
        assert [step for step, _ in curve] == list(range(1, 9))
        assert dict(curve) == pytest.approx({step: shares[part] for step, shares in expected.items()}, rel=1e-5)


def read_curves(folder):
    """Tag -> (step, value) as TensorBoard shows them. In a process of its own: after reading here, later ranks hung."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    shown = EventAccumulator(str(folder)).Reload()
    return {tag: [(point.step, point.value) for point in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def ledger_shares(run):
    """(step, part -> share) of the one rank, by the first ledger line after each training line."""
    last = None
    for line in read_jsonl(run.metrics):
        if "loss" in line:
            last = line["step"]
        elif line.get("event") == "ledger" and line["step"] == last:
            (rank,) = line["ranks"]
            yield last, {part: rank[f"{part}_s"] / rank["wall_s"] for part in PARTS}
            last = None


def test_an_attempt_that_goes_on_continues_the_run_in_wandb_mlflow_and_trackio(recipe, tmp_path):  # noqa: F811
    names = ("wandb", "mlflow", "trackio")
    calls = tmp_path / "calls.jsonl"

    def attempt(**limits):
        stand_in(calls)
        tracking._available_trackers.extend(LoggerType(name) for name in names)
        return train(recipe("tracked", {"max_steps": 3, "log.trackers": list(names), **limits}))

    run = RunDir(tmp_path / "tracked")
    assert run_ranks(1, lambda: attempt(**{"limits.max_time_s": 1e-3})) == [0]
    assert run_ranks(1, attempt) == [0]
    assert [first_line(run, number)["step"] for number in (1, 2)] == [0, 1]
    asked = list(read_jsonl(calls))
    begun = [line for line in asked if line["call"] in ("init", "start_run")]
    wandb = {"project": "tiny", "id": run.run_id, "name": "tracked", "resume": "allow"}
    trackio = {"project": "tiny", "name": "tracked", "resume": "allow"}
    for which, first, second in (
        ("wandb", wandb, wandb),
        ("trackio", trackio, trackio),
        ("mlflow", {"run_id": None, "run_name": "tracked"}, {"run_id": "made-by-mlflow", "run_name": "tracked"}),
    ):
        given = [line["given"] for line in begun if line["library"] == which]
        assert len(given) == 2
        for found, expected in zip(given, (first, second), strict=True):
            assert {key: found[key] for key in expected} == expected
        steps = [line["step"] for line in asked if line["library"] == which and "loss" in line.get("values", ())]
        assert steps == [1, 2, 3], which
        shown = [line["values"] for line in asked if line["library"] == which and "loss" in line.get("values", ())]
        assert all(f"ledger/{part}" in values for part in PARTS for values in shown)


def stand_in(calls):
    """Modules in place of the three libraries, which write down what is asked of them."""

    def note(library, call, **facts):
        append_jsonl(calls, {"library": library, "call": call, **facts})

    def make(name, **functions):
        module = ModuleType(name)
        module.__spec__ = SimpleNamespace(name=name)  # so that it counts as installed
        vars(module).update(functions)
        sys.modules[name] = module

    def begin(library):
        def init(**given):
            note(library, "init", given=given)
            return SimpleNamespace(
                log=lambda values, step=None, **_: note(library, "log", values=values, step=step), finish=lambda: None
            )

        return init

    def start_run(**given):
        note("mlflow", "start_run", given=given)
        return SimpleNamespace(info=SimpleNamespace(run_id=given["run_id"] or "made-by-mlflow"))

    make("wandb", init=begin("wandb"))
    make("trackio", init=begin("trackio"))
    make(
        "mlflow",
        search_experiments=lambda **_: [],
        create_experiment=lambda **_: "1",
        start_run=start_run,
        log_metrics=lambda values, step=None: note("mlflow", "log", values=values, step=step),
        end_run=lambda: None,
    )
