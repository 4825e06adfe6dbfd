"""Models and machines that cannot be used, through the command lines: a message for a person, and its exit code."""

import json
import shutil

import pytest
import torch
from conftest import write_jsonl
from fault_inputs import (
    check_refused,
    command,
    command_in_rank,
    contents,
)
from fault_run import clip, finished, model, recipe_file, run, trap  # noqa: F401  fixtures

from asr_train import evaluate, export, train, transcribe
from asr_train.errors import EXIT_FAILED, EXIT_NO_CHECKPOINT, EXIT_USAGE
from asr_train.run_dir import RunDir
from launch import cli
from launch.node import devices

# ruff: noqa: F811  their names as arguments

# --- models -----------------------------------------------------------------------------------------------------


def without_weights(model):
    (model / "model.safetensors").unlink()


def cut_weights(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def torn_config(model):
    (model / "config.json").write_text("{")


def config_of_another_kind(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "whisper", "architectures": None}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_weights, "no file named model.safetensors"),
        (cut_weights, "cannot be made: Error while deserializing"),
        (torn_config, "not a valid JSON file"),
        (config_of_another_kind, "'whisper' is no CTC model that takes raw audio; these model types are taken"),
        (shutil.rmtree, "cannot be made"),
    ],
)
def test_a_pretrained_folder_that_is_damaged(recipe_file, model, clip, tmp_path, damage, words):
    damage(model)
    said = command(transcribe.main, model, clip)
    check_refused(said, EXIT_FAILED, words)
    run = tmp_path / "run"
    said = command_in_rank(train.main, recipe_file, f"model.pretrained={model}", f"run_dir={run}")
    check_refused(said, EXIT_FAILED, words)
    assert not list(run.glob("checkpoints/*"))


def test_pickled_weights_are_taken_and_pickled_programs_are_not_run(recipe_file, model, clip, trap, tmp_path):
    written = command(transcribe.main, model, clip).out
    weights = transcribe.load_exported(model)[0].hf.state_dict()
    without_weights(model)
    torch.save(weights, model / "pytorch_model.bin")
    assert command(transcribe.main, model, clip).out == written != ""
    for program in (trap.saved(), trap.pickled()):
        (model / "pytorch_model.bin").write_bytes(program)
        calls = (
            (transcribe.main, (model, clip)), (evaluate.main, (model, "--data", clip.parent)),
            (train.main, (recipe_file, f"model.pretrained={model}", f"run_dir={tmp_path / 'run'}")),
        )  # fmt: skip
        for main, arguments in calls:
            check_refused(command_in_rank(main, *arguments), EXIT_FAILED, "it was not", "safetensors")
    assert not trap.was_sprung()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a"', "is not the folder of a saved CTC tokenizer"),
        ("[1]", "should be objects"),
        (None, "is not the folder of a saved CTC tokenizer"),
        ('{"[PAD]": 0, "[UNK]": 1, "|": 2}', "its vocabulary has 3 tokens"),
        ('{"[PAD]": 0, "[UNK]": 1, "|": 2, "a": 4}', "without holes"),
    ],
)
def test_a_vocabulary_that_is_not_the_models(model, clip, content, words):
    (model / "vocab.json").unlink()
    if content is not None:
        (model / "vocab.json").write_text(content)
    check_refused(command(transcribe.main, model, clip), EXIT_FAILED, model, words)


def test_a_recipe_in_a_model_folder_is_not_run(model, clip, trap):
    (model / "recipe.yaml").write_text(f"name: {trap.tagged()}\n")
    said = command_in_rank(evaluate.main, model, "--data", write_jsonl(clip.parent / "m.jsonl", [
        {"audio": clip.name, "text": "tell"}]))  # fmt: skip
    check_refused(said, EXIT_USAGE, model / "recipe.yaml")
    assert not trap.was_sprung()


# --- what cannot be trained, and where --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (["precision=fp16"], EXIT_USAGE, ["precision: 'fp16': needs a GPU"]),
        (["order=random", "unit_utterances=2", "model.config.feat_extract_norm=group",
          "model.config.do_stable_layer_norm=false"], EXIT_USAGE, ["order: 'random'", "does not bear"]),
        (["model.architecture=whisper"], EXIT_FAILED, ["'whisper' is no CTC model that takes raw audio", "hubert"]),
        (["model.config.hidden_sise=8"], EXIT_FAILED, ["no field hidden_sise (did you mean hidden_size?)"]),
        (["model.config.hidden_size=wide"], EXIT_FAILED, ["hidden_size", "wide"]),
        (["text.processor=/nothing/here"], EXIT_FAILED, ["text.processor", "/nothing/here"]),
        (["log.trackers=[tensorbord]"], EXIT_USAGE, ["log.trackers: tensorbord", "not installed"]),
        (["eval.sets.processor={kind: demo, split: train}"], EXIT_USAGE, ["eval.sets.processor"]),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_anything_is(recipe_file, tmp_path, changes, code, words):
    run = RunDir(tmp_path / "run")
    said = command_in_rank(train.main, recipe_file, f"run_dir={run.path}", *changes)
    check_refused(said, code, *words)
    assert run.outcomes()[0]["exit_code"] == code
    assert not run.checkpoints.exists()


@pytest.mark.parametrize(
    ("arguments", "config", "words"),
    [
        (["--processes", "3"], None, ["units_per_step=2 keeps 2 of 3 processes busy", "--processes 2"]),
        (["--accelerate", "gone"], None, ["--accelerate: no file 'gone'", "cpu, ddp"]),
        (["--accelerate", "CONFIG"], "a: [", ["is not YAML"]),
        (["--accelerate", "CONFIG"], "distributed_type: MULTI_GPU\nnum_machines: 2", ["several machines"]),
        (["--accelerate", "CONFIG"], "distributed_type: FSDP\nuse_cpu: true", ["FSDP needs GPUs"]),
        (["--accelerate", "CONFIG"], "TRAP", ["is not YAML"]),
    ],
)  # fmt: skip
def test_where_nothing_can_be_trained_no_run_is_begun(
    recipe_file, trap, tmp_path, monkeypatch, arguments, config, words
):
    monkeypatch.setattr(devices, "num_gpus", lambda: 0)
    if config is not None:
        text = f"distributed_type: {trap.tagged()}" if config == "TRAP" else config
        (tmp_path / "mine.yaml").write_text(text)
    given = [str(tmp_path / "mine.yaml") if argument == "CONFIG" else argument for argument in arguments]
    check_refused(command(cli.main, "train", recipe_file, f"run_dir={tmp_path / 'run'}", *given), EXIT_USAGE, *words)
    assert not (tmp_path / "run").exists()
    assert not trap.was_sprung()


# --- evaluate, export, transcribe, given something else ---------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "arguments", "code", "words"),
    [
        (evaluate.main, ["NONE"], EXIT_USAGE, "neither a run directory"),
        (evaluate.main, ["FILE"], EXIT_USAGE, "neither a run directory"),
        (evaluate.main, ["RUN", "--data", "EMPTY"], EXIT_FAILED, "no audio files"),
        (evaluate.main, ["RUN", "--data", "none.csv"], EXIT_FAILED, "no such file"),
        (evaluate.main, ["RUN", "--checkpoint", "FILE"], EXIT_NO_CHECKPOINT, "nor the path of a checkpoint"),
        (evaluate.main, ["RUN", "--out", "FILE"], EXIT_FAILED, "File exists"),
        (export.main, ["NONE"], EXIT_USAGE, "no run directory"),
        (export.main, ["EMPTY"], EXIT_USAGE, "no run directory"),
        (export.main, ["MODEL"], EXIT_NO_CHECKPOINT, "has no checkpoint yet"),
        (export.main, ["RUN", "--out", "FILE/model"], EXIT_FAILED, "Not a directory"),
        (transcribe.main, ["RUN", "CLIP"], EXIT_FAILED, "these model types are taken"),
        (transcribe.main, ["FILE", "CLIP"], EXIT_FAILED, "these model types are taken"),
        (transcribe.main, ["NONE", "CLIP"], EXIT_FAILED, "cannot be made"),
        (transcribe.main, ["MODEL", "FILE"], EXIT_FAILED, "unreadable audio"),
        (transcribe.main, ["MODEL", "/dev/null"], EXIT_FAILED, "missing file"),
        (transcribe.main, ["MODEL", "EMPTY"], EXIT_USAGE, "holds no audio files"),
        (transcribe.main, ["MODEL", "CLIP", "--out", "FILE"], EXIT_FAILED, "File exists"),
    ],
)
def test_verbs_given_something_else(finished, clip, tmp_path, program, arguments, code, words):
    (tmp_path / "thesis.txt").write_text("years")
    (tmp_path / "empty").mkdir()
    names = {"NONE": tmp_path / "none", "FILE": tmp_path / "thesis.txt", "EMPTY": tmp_path / "empty", "CLIP": clip,
             "RUN": finished.path, "MODEL": finished.path / "export", "FILE/model": tmp_path / "thesis.txt" / "model",
             "none.csv": tmp_path / "none.csv"}  # fmt: skip
    before = contents(finished.path), contents(tmp_path)
    call = command_in_rank if program is evaluate.main else command
    said = call(program, *(names.get(argument, argument) for argument in arguments))
    check_refused(said, code, words)
    assert said.out == ""
    assert (contents(finished.path), contents(tmp_path)) == before
