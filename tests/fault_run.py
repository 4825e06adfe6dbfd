"""A small finished run, its export, and copies for tests that damage them; fixtures for those who import them."""

import shutil

import pytest
import soundfile
from conftest import RATE, speech
from fault_inputs import Trap, command, command_in_rank

from asr_train import checkpoints, export, train
from asr_train.errors import EXIT_DONE
from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir, read_metrics

STEPS = 4
WORK = ("checkpoints", "metrics.jsonl", "evaluations")  # what a run must never lose
RUN = {
    "max_steps": STEPS,
    "num_workers": 0,
    "checkpoint": {"every": "1", "keep_last": 9},
    "log": {"every": 1, "trackers": []},
}


@pytest.fixture(scope="module")
def recipe_file(tiny_recipe, tiny_corpus, tmp_path_factory):
    """A good recipe, its corpus prepared; command lines change it with key=value."""
    path = tmp_path_factory.mktemp("recipes") / "good.yaml"
    path.write_text(dump_recipe(tiny_recipe(**RUN)))
    return path


@pytest.fixture(scope="module")
def finished(recipe_file, tmp_path_factory):
    """A finished run with a checkpoint at every step, and its export. Tests take copies."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    said = command_in_rank(train.main, recipe_file, f"run_dir={folder}")
    assert said.code == EXIT_DONE, said.err
    said = command(export.main, folder, "--checkpoint", "newest")
    assert said.code == EXIT_DONE, said.err
    return RunDir(folder)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run as a crash after step 2 would have left it."""
    copy = RunDir(shutil.copytree(finished.path, tmp_path / "run"))
    cut_to_step(copy, 2)
    return copy


@pytest.fixture
def model(finished, tmp_path):
    """A copy of the exported model."""
    return shutil.copytree(finished.path / "export", tmp_path / "model")


@pytest.fixture
def trap(tmp_path):
    return Trap(tmp_path / "sprung")


@pytest.fixture
def clip(tmp_path):
    soundfile.write(tmp_path / "clip.wav", speech("tell", 1.0), RATE)
    return tmp_path / "clip.wav"


def cut_to_step(run, step):
    run.done.unlink()
    for found in checkpoints.whole(run.checkpoints):
        if found.step > step:
            shutil.rmtree(found.path)


def losses(run):
    return {line["step"]: line["loss"] for line in read_metrics(run) if "set" not in line}


def goes_on(recipe_file, run, finished, *arguments):
    """The same command goes on to the end, with the losses of the run that nothing happened to."""
    said = command_in_rank(train.main, recipe_file, f"run_dir={run.path}", *arguments)
    assert said.code == EXIT_DONE, said.err
    assert run.done.exists()
    assert losses(run) == losses(finished)
