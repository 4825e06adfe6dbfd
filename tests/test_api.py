"""The functions for notebooks: what they take, what they return, that they are quiet, that importing them is cheap."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import encoded, speech

import wavefleet
from asr_train import verbosity
from asr_train.recipe import dump_recipe, to_values
from asr_train.run_dir import RunDir
from asr_train.score import SetScore
from launch import cli
from wavefleet import training

ROOT = Path(__file__).resolve().parent.parent
VERBS = ("prepare", "plan", "train", "evaluate", "transcribe", "export")


@pytest.fixture(autouse=True)
def usual_environment(monkeypatch):
    monkeypatch.delenv("WAVEFLEET_VERBOSITY", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_importing_it_loads_nothing_slow_and_its_names_are_there():
    program = (
        "import sys, json, wavefleet; before = sorted(sys.modules); "
        f"made = [getattr(wavefleet, name) for name in {(*VERBS, 'Recipe', 'WavefleetError', 'Trained')}]; "
        "print(json.dumps([before, sorted(sys.modules), dir(wavefleet)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after, names = json.loads(done.stdout)
    slow = {"torch", "transformers", "datasets", "accelerate", "pyarrow", "numpy", "pydantic", "yaml", "rich"}
    assert set(before) & slow == set()
    assert set(after) & {"torch", "transformers", "datasets", "accelerate"} == set()
    assert set(VERBS) <= set(names)


def test_every_name_that_is_promised_is_there_and_no_other():
    for name in wavefleet.__all__:
        assert getattr(wavefleet, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        wavefleet.trian  # noqa: B018


@pytest.mark.parametrize("name", [*VERBS])
def test_functions_are_typed_and_documented(name):
    function = getattr(wavefleet, name)
    signature = inspect.signature(function)
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    assert signature.return_annotation is not inspect.Signature.empty
    described = function.__doc__.partition("Args:")[2].partition("Raises:")[0]
    assert [key for key in signature.parameters if f"{key}:" not in described] == []
    assert "Raises:" in function.__doc__
    assert signature.parameters["verbose"].default is False


def test_results_are_frozen():
    for name in ("Prepared", "PreparedSet", "Planned", "Trained", "Transcribed", "Exported", "Transcript", "SetScore"):
        kind = getattr(wavefleet, name)
        assert kind.__dataclass_params__.frozen, name


@pytest.mark.parametrize("package", ["wavefleet", "asr_train", "launch"])
def test_type_checkers_are_told_that_there_are_types(package):
    assert (ROOT / package / "py.typed").exists()


# --- what a recipe may be ---------------------------------------------------------------------------------------


def test_a_recipe_is_a_name_a_file_plain_values_or_a_recipe(tiny_recipe, tmp_path):
    made = tiny_recipe()
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_recipe(made))
    before = to_values(made)
    for given in (made, before, file, str(file)):
        assert wavefleet.load_recipe(given) == made
        changed = wavefleet.load_recipe(given, {"optim.lr": 1e-5, "eval.every": "1 epoch", "seed": 3})
        assert (changed.optim.lr, changed.eval.every, changed.seed) == (1e-5, "1 epoch", 3)
        assert wavefleet.load_recipe(given, ["optim.lr=1e-5", "eval.every=1 epoch", "seed=3"]) == changed
    assert before == to_values(made)
    assert wavefleet.load_recipe("demo").name == "demo"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text.remove", '.,!?:"'),
        ("model.config", {"hidden_dropout": 1e-05, "conv_dim": [16, 32]}),
        ("model.pretrained", None),
        ("eval.sets", {"dev": {"kind": "jsonl", "path": Path("/data/dev: 1.jsonl")}}),
        ("log.trackers", ("tensorboard",)),
        ("optim.betas", (0.9, 0.999)),
        ("run_dir", Path("/data/runs/# 1")),
    ],
)
def test_changes_arrive_as_they_were_given(tiny_recipe, key, value):
    changed = to_values(wavefleet.load_recipe(tiny_recipe(), {key: value}))
    for name in key.split("."):
        changed = changed[name]
    expected = json.loads(json.dumps(value, default=str))
    if key == "eval.sets":
        assert changed["dev"][0]["path"] == expected["dev"]["path"]
    else:
        assert changed == expected


def test_mistakes_in_a_recipe_are_raised_all_at_once(capfd):
    with pytest.raises(wavefleet.RecipeError, match=r"2 errors\n.*max_steps: -1.*\n.*did you mean optim.lr\?"):
        wavefleet.prepare("demo", {"optim.lrr": 1, "max_steps": -1})
    with pytest.raises(wavefleet.RecipeError, match="no shipped one"):
        wavefleet.train("dmeo")
    assert capfd.readouterr() == ("", "")


# --- a whole training -------------------------------------------------------------------------------------------


def cells(file):
    """Sources of the code cells of a script in percent format, each with its title line."""
    parts = re.split(r"^(# %%.*)\n", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [(title, text) for title, text in zip(parts[::2], parts[1::2], strict=True) if "[markdown]" not in title]


def test_a_plan_is_that_of_the_verb(tiny_recipe, tmp_path, capsys):
    changes = {"run_dir": str(tmp_path / "run"), "units_per_step": 2}
    found = wavefleet.plan(tiny_recipe(), changes, processes=2, gpu="A100-80GB")
    assert (found.forecast.world_size, found.forecast.gpu) == (2, "A100-80GB")
    assert capsys.readouterr() == ("", "")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(tiny_recipe(**changes)))
    assert cli.main(["plan", str(file), "--processes", "2", "--gpu", "A100-80GB", "--json", "-q"]) == 0
    said = json.loads(capsys.readouterr().out)["training"]
    ours = json.loads(json.dumps(found.forecast.to_json()))
    assert ours == {key: said[key] for key in ours}
    assert list(found.warnings) == [warning["text"] for warning in said["warnings"]]
    assert found.forecast.max_steps == found.max_steps == 4


def test_the_example_notebook_runs_from_its_first_cell_to_its_last(tiny_recipe, tmp_path, capfd, monkeypatch):
    """With a tiny recipe in the place of its own, and nothing printed but what its cells print."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    tiny = {"recipe": tiny_recipe(run_dir=str(tmp_path / "run")), "changes": {"max_steps": 2, "num_workers": 0}}
    for title, text in cells(ROOT / "examples" / "notebook.py"):
        exec(compile(text, "notebook.py", "exec"), names)
        if 'tags=["parameters"]' in title:
            names |= tiny
    shown, complaints = capfd.readouterr()
    assert complaints == ""
    assert "train: 40 utterances" in shown
    assert "2 steps" in shown

    run = names["run"]
    assert (run.ended, run.step, run.run) == ("done", 2, tmp_path / "run")
    assert f"done after step 2, loss {run.loss:.3f}" in shown
    assert (run.best_metric, run.best_step) == ("dev/wer", 2)
    assert run.best_value == run.scores["dev"]["wer"]
    assert names["planned"].steps_per_epoch == first_line(run)["steps_per_epoch"]
    score = names["score"]
    assert isinstance(score, SetScore)
    assert score.wer == pytest.approx(run.best_value)
    assert names["model"].folder == tmp_path / "run" / "export"
    assert names["transcript"].duration_s == pytest.approx(len(names["waveform"]) / 16_000)

    again = wavefleet.train(tiny["recipe"], tiny["changes"])  # done already
    assert again == run
    bad(names["model"], tmp_path)


def bad(model, tmp_path):
    """Files that cannot be read: told, where others can; an error, where none can."""
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(wavefleet.CorpusError, match=r"text\.wav: unreadable audio"):
        wavefleet.transcribe(model, tmp_path / "text.wav")
    (tmp_path / "good.wav").write_bytes(encoded(speech("one", 0.5)))
    found = wavefleet.transcribe(model, [tmp_path / "good.wav", tmp_path / "text.wav"])
    assert [item.file.name for item in (*found.transcripts, *found.bad)] == ["good.wav", "text.wav"]


def first_line(run):
    return json.loads((run.run / "metrics.jsonl").read_text().splitlines()[0])


# --- trainings that end otherwise -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [(2, wavefleet.RecipeError), (4, wavefleet.TrainingError), (5, wavefleet.CheckpointError),
     (130, wavefleet.TrainingError)],
)  # fmt: skip
def test_a_failed_training_is_an_error_with_what_it_said(code, kind, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_follow", lambda command: (code, ["error: loss of a-1 is infinite", "failed: why"]))
    with pytest.raises(kind, match=r"^loss of a-1 is infinite\nfailed: why$"):
        wavefleet.train(tiny_recipe(run_dir=str(tmp_path / "run")))


def test_a_live_run_and_a_run_of_another_recipe_are_refused(tiny_recipe, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(training, "_follow", lambda command: pytest.fail("started"))
    recipe = tiny_recipe(run_dir=str(tmp_path / "run"))
    run = RunDir(tmp_path / "run")
    run.make()
    run.claim(recipe)
    with pytest.raises(wavefleet.RunError, match="seed: 0 -> 1"):
        wavefleet.train(recipe, {"seed": 1})
    with run.lock(), pytest.raises(wavefleet.RunError, match="is being trained by pid"):
        wavefleet.train(recipe)
    with pytest.raises(wavefleet.RecipeError, match="no file 'nothing'"):
        wavefleet.train(recipe, accelerate="nothing")
    assert capfd.readouterr() == ("", "")


CHILD = """
import signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(3)
signal.signal(signal.SIGINT, stop)
print("step 1", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("level", "shown"), [("quiet", ""), ("normal", "step 1\nsaved\n")])
def test_ctrl_c_stops_a_training_which_saves(level, shown, monkeypatch, capfd):
    """The child gets the signal from us, not from the terminal, and is waited for."""

    def press_when_told(text):
        if text == "step 1":
            signal.raise_signal(signal.SIGINT)

    lines = []
    say = training.say
    monkeypatch.setattr(training, "say", lambda text: (lines.append(text), say(text), press_when_told(text)))
    with verbosity.at(level):
        assert training._follow([sys.executable, "-c", CHILD]) == (3, ["step 1", "saved"])
    assert capfd.readouterr().err == shown


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_training_is_asked_to_stop_when_its_notebook_is_gone(tmp_path):
    """The notebook is killed; what it had started hears SIGTERM, which has a training save and stop."""
    word = tmp_path / "word"
    verb = f"""
import pathlib, signal, sys, time, launch.cli
def trained():
    def stop(number, frame):
        pathlib.Path({str(word)!r}).write_text(signal.Signals(number).name)
        sys.exit(3)
    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    time.sleep(60)
launch.cli.main = trained
import runpy; runpy.run_module("wavefleet.child", run_name="__main__")
"""
    notebook = "import sys; from wavefleet import training; training._follow([sys.executable, '-c', sys.argv[1]])"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", notebook, verb], env=environ, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "ready\n"
    process.kill()
    process.wait()
    until = time.monotonic() + 120
    while not word.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert word.read_text() == "SIGTERM"
