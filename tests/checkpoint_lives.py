"""Runs on two ranks that save often, and what became of them: for tests in which a save or a start goes wrong."""

import importlib
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from fault_points import SAVES, Fault, Point, install, notes_of
from ranks import RankError, run_ranks
from small_run import losses, weights
from test_elastic import WAYS

from asr_train import checkpoints
from asr_train.files import read_jsonl
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
            model=MODEL, log={"every": 1, "trackers": ()}, eval={"sets": {}, "every": None},
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


STOP_HERE = Fault(0, Point("mkdir", ".staging/shards"), "before", SAVES, 0)  # ends an attempt after EVERY steps
