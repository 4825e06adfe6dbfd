"""Bad input of every kind through the command lines: a message for a person, its exit code, and nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import RATE, merged, speech, write_jsonl, write_speech
from fault_inputs import (
    Trap,
    check_refused,
    command,
    command_in_rank,
    contents,
    on_small_disk,
    remount,
    set_trap_in_a_value,
    set_trap_in_metadata,
)
from test_prepare import BAD_ROWS, bad_manifest

from asr_train import checkpoints, evaluate, export, prepare, samples, train, transcribe
from asr_train.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_CHECKPOINT, EXIT_USAGE
from asr_train.files import append_jsonl, read_json, read_jsonl
from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir, read_metrics
from launch import cli
from launch.node import devices

STEPS = 4
WORK = ("checkpoints", "metrics.jsonl", "evaluations")  # what a run must never lose
RUN = {"max_steps": STEPS, "num_workers": 0, "checkpoint": {"every": "1", "keep_last": 9}, "log": {"every": 1}}


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


# --- recipes ----------------------------------------------------------------------------------------------------


def test_every_command_lists_all_errors_of_a_recipe_at_once(tiny_recipe, tmp_path, monkeypatch):
    """Unknown keys, wrong types, impossible values and overrides that are none, in one message; nothing is made."""
    monkeypatch.chdir(tmp_path)
    values = {"name": "../up", "max_steps": 2.5, "sed": 1, "optim": {"lr": "fast", "betas": [0.9]}, "eval": None}
    source = {"kind": "jsonl", "path": "m.jsonl", "txt_column": "words"}
    Path("bad.yaml").write_text(json.dumps(merged(values, {"data": {"train": source, "num_proc": 0}})))
    overrides = ("nonsense", "=3", "seed=[", "data.train.path.deep=1", "max_steps.deep=1", "unit_audio_s=.nan")
    wanted = (
        "14 errors",
        "'nonsense': expected key=value",
        "'=3': expected key=value",
        "seed: '[' is not a YAML value",
        "data.train.path.deep: data.train.path is a value, it has no keys",
        "max_steps.deep: max_steps is a value, it has no keys",
        "unit_audio_s: nan: should be a number greater than 0, or auto",
        "name: '../up': should match",
        "max_steps: 2.5: should be a valid integer",
        "sed: no such field; did you mean seed?",
        "optim.lr: 'fast': should be a valid number",
        "optim.betas",
        "eval: None",
        "data.train.0.txt_column: no such field; did you mean data.train.0.text_column?",
        "data.num_proc: 0: should be greater than or equal to 1",
    )
    for program, arguments in (
        (prepare.main, ()), (train.main, ()), (samples.main, ("--set", "train", "--out", "samples")),
        (cli.main, ("show",)), (cli.main, ("train",)),
    ):  # fmt: skip
        verb = arguments if program is cli.main else ()
        said = command(program, *verb, "bad.yaml", *overrides, *(() if verb else arguments))
        check_refused(said, EXIT_USAGE, *wanted)
    assert os.listdir() == ["bad.yaml"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file"),
        (b"", "expected `key: value` lines"),
        (b"- a\n- b\n", "found list"),
        (b"name: [\n", "is not YAML"),
        (b"name: \xe9t\xe9\n", "is not UTF-8 text"),
        (b"RIFF\x24\x90\x00\x00WAVE", "is not UTF-8 text"),
        (b"name: a\x00b\n", "is not YAML"),
        (b"name: a\nseed: 1\nseed: 2\n", "'seed' stands here twice"),
        (b"name: a\noptim: {lr: 1, lr: 2}\n", "'lr' stands here twice"),
        (b"1: 2\n", "Keys should be strings"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    check_refused(command(train.main, path), EXIT_USAGE, path, words)


def test_data_that_is_neither_recipe_nor_table(finished, clip):
    said = command_in_rank(evaluate.main, finished.path, "--data", clip)
    check_refused(said, EXIT_USAGE, clip, "is not UTF-8 text")


def test_values_that_contradict_each_other(recipe_file, tmp_path):
    changes = (
        "max_epochs=3", "order=grouped", "data.min_duration_s=40", "text.remove='!!'", "eval.best=test/wer",
        "eval.metrics=[mine]", "eval.early_stopping=2",
    )  # fmt: skip
    said = command(train.main, recipe_file, *changes, f"run_dir={tmp_path / 'run'}")
    check_refused(
        said, EXIT_USAGE, "7 errors", "max_steps, max_epochs: give exactly one", "order: 'grouped'", "min_duration_s",
        "text.remove", "eval.best: 'test/wer'", "set trust_remote_code: true", "eval.early_stopping: needs eval.every",
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_python_in_a_recipe_is_not_run(recipe_file, trap, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_file.read_text().replace("name: tiny", f"name: {trap.tagged()}"))
    check_refused(command(train.main, recipe), EXIT_USAGE, "could not determine a constructor")
    check_refused(command(train.main, recipe_file, f"seed={trap.tagged()}"), EXIT_USAGE, "is not a YAML value")
    assert not trap.was_sprung()


# --- data -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tiny_recipe, tmp_path):
    """A recipe of a few utterances of its own: `own(changes)` -> its file; manifest in speech/, corpora in corpora/."""
    manifest = write_speech(tmp_path / "speech", 8, seed=3, name="mine")

    def make(**changes):
        places = {"run_dir": str(tmp_path / "run"), "data.corpus_root": str(tmp_path / "corpora")}
        data = {"data.train": {"kind": "jsonl", "path": str(manifest)}, "eval.sets": {}}
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_recipe(tiny_recipe(**{**RUN, **places, **data, **changes})))
        return path

    return make


@pytest.fixture
def stopped(own, tmp_path):
    """A run of `own` cut to step 2, and the losses it had."""
    said = command_in_rank(train.main, own())
    assert said.code == EXIT_DONE, said.err
    run = RunDir(tmp_path / "run")
    before = losses(run)
    cut_to_step(run, 2)
    return run, before


def test_wrong_tables_are_listed_at_once_and_nothing_is_made(own, tmp_path):
    folder = tmp_path / "speech"
    good = {"audio": "mine-000.wav", "text": "tell", "id": "x"}
    write_jsonl(folder / "twice.jsonl", [good, good])
    write_jsonl(folder / "outside.jsonl", [{**good, "audio": "/etc/passwd"}, {**good, "audio": "../speech/../x.wav"}])
    write_jsonl(folder / "columns.jsonl", [{"audio": "mine-000.wav", "words": "tell"}])
    lines = ['{"audio": "a.wav", "text": "\\ud800"}', "[" * 100_000, "{", '{"audio": "a.wav", "text": 3}']
    (folder / "lines.jsonl").write_text("\n".join([json.dumps(good), *lines]))
    (folder / "latin.csv").write_bytes("audio,text\nmine-000.wav,é\n".encode("latin-1"))
    names = ("twice.jsonl", "outside.jsonl", "columns.jsonl", "lines.jsonl", "latin.csv", "gone.jsonl")
    sources = [{"kind": name.partition(".")[2], "path": str(folder / name)} for name in names]
    recipe = own(**{"data.train": sources[0], "eval.sets": {f"set{n}": source for n, source in enumerate(sources[1:])}})
    check_refused(
        command(prepare.main, recipe), EXIT_FAILED,
        f"{folder}/twice.jsonl:2: id 'x' again, first in {folder}/twice.jsonl:1",
        f"{folder}/outside.jsonl:1: '/etc/passwd' leaves {folder}; set audio_root",
        f"{folder}/outside.jsonl:2: '../speech/../x.wav' leaves",
        f"{folder}/columns.jsonl: no text column (set text_column); it has: audio, words",
        *(f"{folder}/lines.jsonl:{number}: {words}" for number, words in enumerate(
            ("not JSON", "not JSON", "not JSON", "text: expected text, found 3"), 2)),
        f"{folder}/latin.csv:1: not a CSV table",
        f"{folder}/gone.jsonl: no such file",
    )  # fmt: skip
    assert not list((tmp_path / "corpora").glob("*/train"))


def test_a_word_delimiter_in_a_transcript(own, tmp_path):
    write_jsonl(tmp_path / "speech" / "manifest.jsonl", [{"audio": "mine-000.wav", "text": "one | two"}])
    check_refused(command(prepare.main, own()), EXIT_FAILED, "'|' in 'one | two'", "text.remove")
    assert command(prepare.main, own(), "text.remove='|'").code == EXIT_DONE


def test_a_bad_row_costs_only_itself_and_too_many_are_an_error(own, tmp_path):
    source = {"kind": "jsonl", "path": bad_manifest(tmp_path / "bad")}
    with Path(source["path"]).open("a") as stream:
        stream.write(json.dumps({"id": "endless-name", "audio": "a" * 5_000 + ".wav", "text": "good"}) + "\n")
    limits = {"data.max_rejected_percent": 50.0, "data.max_duration_s": 3.0, "text.remove": "?!"}
    recipe = own(**{"data.train": source, **limits})
    refusal = command(prepare.main, recipe)
    check_refused(refusal, EXIT_FAILED, "data.max_rejected_percent=50", "set train: 14 of 15 rows (93.3 %)")
    assert command(prepare.main, recipe, "data.max_rejected_percent=95").code == EXIT_DONE
    rejected = {line["id"]: line["reason"] for line in read_jsonl(next(tmp_path.glob("corpora/*/rejected.jsonl")))}
    expected = {name: training for name, (_, _, training, _) in BAD_ROWS.items() if training}
    assert rejected == {**expected, "endless-name": "unreadable audio"}


def test_an_evaluation_set_keeps_what_can_be_heard_through_training_and_evaluate(own, tmp_path):
    """Silence, less than a frame, too long, unalignable, outside the vocabulary: transcribed and scored, each once."""
    source = {"kind": "jsonl", "path": bad_manifest(tmp_path / "bad")}
    recipe = own(**{"eval.sets": {"hard": source}, "data.max_rejected_percent": 60.0, "data.max_duration_s": 3.5,
                    "text.remove": "?!", "max_steps": 1})  # fmt: skip
    said = command_in_rank(train.main, recipe)
    assert said.code == EXIT_DONE, said.err
    kept = sorted(name for name, (*_, evaluation) in BAD_ROWS.items() if evaluation is None)
    run = RunDir(tmp_path / "run")
    (line,) = (line for line in read_metrics(run) if "set" in line)
    assert (line["num_rows"], line["num_refused"]) == (len(kept), len(BAD_ROWS) - len(kept))
    assert sorted(row["id"] for row in read_jsonl(run.evaluation(1, "hard"))) == kept
    again = command_in_rank(evaluate.main, run.path, "--json")
    assert json.loads(again.out)["hard"]["wer"] == line["wer"]


def test_other_rows_under_a_run_are_refused_and_it_goes_on_with_its_own(own, stopped, tmp_path):
    """The corpus was deleted; the manifest has the same audio with other texts, then fewer rows, then is gone."""
    run, before = stopped
    manifest = tmp_path / "speech" / "manifest.jsonl"
    original = manifest.read_text()
    rows = [json.loads(line) for line in original.splitlines()]
    work = contents(run.path, *WORK)
    for changed in ([{**row, "text": row["text"][::-1]} for row in rows], rows[:-1]):
        shutil.rmtree(tmp_path / "corpora")
        write_jsonl(manifest, changed)
        said = command_in_rank(train.main, own())
        check_refused(said, EXIT_NO_CHECKPOINT, "was written for another corpus", "repeat and leave out utterances")
        assert run.outcomes()[0]["exit_code"] == EXIT_NO_CHECKPOINT
    shutil.rmtree(tmp_path / "corpora")
    manifest.unlink()
    check_refused(command_in_rank(train.main, own()), EXIT_FAILED, f"{manifest}: no such file")
    assert contents(run.path, *WORK) == work
    manifest.write_text(original)
    assert command_in_rank(train.main, own()).code == EXIT_DONE
    assert losses(run) == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_corpus_is_named_and_prepared_anew_the_run_goes_on(own, stopped, tmp_path, num_workers):
    run, before = stopped
    work = contents(run.path, *WORK)
    shard = next((tmp_path / "corpora").glob("*/train/*.arrow"))
    shard.write_bytes(shard.read_bytes()[:20_000])
    said = command_in_rank(train.main, own(), f"num_workers={num_workers}")
    assert said.code == EXIT_FAILED
    assert f"{shard} cannot be read" in said.err
    assert "delete the corpus and prepare it again" in said.err
    info = shard.parent.parent / "corpus.json"
    info.write_text(info.read_text()[:200])
    check_refused(command_in_rank(train.main, own()), EXIT_FAILED, "corpus.json is damaged", "delete it")
    lines = {path: found for path, found in contents(run.path, *WORK).items() if path != "metrics.jsonl"}
    assert lines.items() <= work.items()
    info.unlink()
    assert command_in_rank(train.main, own()).code == EXIT_DONE
    assert losses(run) == before


# --- a full disk ------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_while_preparing(own, tmp_path):
    disk = tmp_path / "corpora"
    recipe = own(**{"data.shard_rows": 1})

    def story():
        said = command(prepare.main, recipe)
        kept = {path.name: path.stat().st_mtime_ns for path in disk.glob("*/train/*.arrow")}
        leftovers = [path.name for path in disk.glob("*/train/.*")]
        remount(disk, "size=10m")
        again = command(prepare.main, recipe)
        after = {path.name: path.stat().st_mtime_ns for path in disk.glob("*/train/*.arrow")}
        return said, kept, leftovers, again, after

    said, kept, leftovers, again, after = on_small_disk(disk, "300k", story)
    check_refused(said, EXIT_FAILED, f"corpus {disk}", "the disk is full", "what is done is kept")
    assert 0 < len(kept) < 8
    assert leftovers == []
    assert again.code == EXIT_DONE, again.err
    assert kept.items() <= after.items()
    assert len(after) == 8


def test_a_disk_that_fills_up_while_training(recipe_file, finished, tmp_path):
    """Some checkpoints fit; the next leaves no trace, those before it are whole, and with more room the run goes on."""
    disk = tmp_path / "disk"
    run = RunDir(disk / "run")

    def story():
        said = command_in_rank(train.main, recipe_file, f"run_dir={run.path}")
        steps = [found.step for found in checkpoints.whole(run.checkpoints)]
        names = sorted(path.name for path in run.checkpoints.iterdir())
        outcome = run.outcomes()[0]
        remount(disk, "size=20m")
        goes_on(recipe_file, run, finished)
        return said, steps, names, outcome

    size = sum(path.stat().st_size for path in (finished.checkpoints / "step-0000000001").rglob("*") if path.is_file())
    said, steps, names, outcome = on_small_disk(disk, f"{int(2.6 * size) // 1024}k", story)
    check_refused(said, EXIT_FAILED, "the checkpoint of step 4 could not be written", "No space left on device")
    assert "the checkpoint of step 3 failed, those before it are untouched" in said.err  # and training went on
    assert steps == [1, 2]
    assert names == ["step-0000000001", "step-0000000002"]
    assert outcome["exit_code"] == EXIT_FAILED
    assert "No space left" in outcome["message"]


def test_lines_that_a_full_disk_cut_short_are_an_error_and_cost_no_other_line(tmp_path):
    disk = tmp_path / "disk"

    def story():
        path, written = disk / "metrics.jsonl", 0
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            while True:
                append_jsonl(path, {"step": written, "text": "x" * 100})
                written += 1
        remount(disk, "size=1m")
        append_jsonl(path, {"step": written, "text": "after"})
        return written, [line["step"] for line in read_jsonl(path)]

    written, steps = on_small_disk(disk, "16k", story)
    assert written > 10
    assert steps == list(range(written + 1))


def test_a_disk_that_is_too_small_for_an_export_keeps_the_old_one(finished, tmp_path):
    disk = tmp_path / "disk"

    def story():
        out = disk / "model"
        first = command(export.main, finished.path, "--out", out)
        before = contents(out)
        return first, command(export.main, finished.path, "--out", out), before == contents(out), os.listdir(disk)

    size = sum(path.stat().st_size for path in (finished.path / "export").iterdir())
    first, second, is_same, left = on_small_disk(disk, f"{size // 1024 + 60}k", story)
    assert first.code == EXIT_DONE, first.err
    check_refused(second, EXIT_FAILED, "No space left on device")
    assert is_same
    assert left == ["model"]


# --- run directories --------------------------------------------------------------------------------------------


def test_a_file_where_the_run_directory_should_be(recipe_file, tmp_path):
    thesis = tmp_path / "thesis"
    thesis.write_text("years")
    for where in (thesis, thesis / "run"):
        for program, verb in ((train.main, ()), (cli.main, ("train",))):
            said = command(program, *verb, recipe_file, f"run_dir={where}")
            check_refused(said, EXIT_USAGE, f"run_dir: {where} cannot be made", "choose another")
    assert thesis.read_text() == "years"


def test_a_run_that_may_not_be_written(recipe_file, finished, tmp_path):
    """On a read-only disk, for root may write anywhere else: nothing is trained, what only reads works."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    run = RunDir(disk / "run")

    def story():
        shutil.copytree(finished.path, run.path)
        cut_to_step(run, 2)
        remount(disk, "ro")
        refused = [
            command_in_rank(train.main, recipe_file, f"run_dir={run.path}"),
            command(cli.main, "train", recipe_file, f"run_dir={run.path}"),
            command_in_rank(evaluate.main, run.path),
            command(export.main, run.path),
        ]
        taken = [
            command_in_rank(evaluate.main, run.path, "--out", out / "scores"),
            command(export.main, run.path, "--out", out / "model"),
        ]
        remount(disk, "rw")
        goes_on(recipe_file, run, finished)
        return refused, taken

    refused, taken = on_small_disk(disk, "20m", story)
    for said in refused:
        check_refused(said, EXIT_FAILED, "Read-only file system", run.path)
    assert [said.code for said in taken] == [EXIT_DONE] * 2


def test_a_live_run_is_left_alone(recipe_file, run):
    work = contents(run.path)
    with run.lock():
        lock = (run.path / "lock.json").read_text()
        said = command(train.main, recipe_file, f"run_dir={run.path}")
        check_refused(said, EXIT_USAGE, f"pid {os.getpid()} on {os.uname().nodename}", "nothing was started")
        assert (run.path / "lock.json").read_text() == lock
    assert contents(run.path) == work


@pytest.mark.parametrize("content", ["", "[1]", "name: [", "\x00", "name: tiny\n", "TRAP"])
def test_a_recipe_file_of_a_run_that_is_damaged_or_a_program(recipe_file, run, trap, content):
    (run.path / "recipe.yaml").write_text(f"name: {trap.tagged()}" if content == "TRAP" else content)
    work = contents(run.path)
    for program, arguments in (
        (train.main, (recipe_file, f"run_dir={run.path}")), (cli.main, ("train", recipe_file, f"run_dir={run.path}")),
        (evaluate.main, (run.path,)), (export.main, (run.path,)),
    ):  # fmt: skip
        call = command_in_rank if program is evaluate.main else command
        check_refused(call(program, *arguments), EXIT_USAGE, run.path / "recipe.yaml")
    assert contents(run.path) == work
    assert not trap.was_sprung()


# --- checkpoints ------------------------------------------------------------------------------------------------


def torn_manifest(folder):
    path = folder / "MANIFEST.json"
    path.write_text(path.read_text()[:50])


def manifest_of_something_else(folder):
    (folder / "MANIFEST.json").write_text("[1, 2]")


def cut_shard(folder):
    shard = next((folder / "shards").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])


def missing_state(folder):
    (folder / "state.json").unlink()


@pytest.mark.parametrize("damage", [torn_manifest, manifest_of_something_else, cut_shard, missing_state])
def test_a_broken_checkpoint_is_passed_over_and_the_run_ends_the_same(recipe_file, run, finished, damage):
    newest = run.checkpoints / "step-0000000002"
    damage(newest)
    said = command(export.main, run.path, "--checkpoint", newest)
    check_refused(said, EXIT_NO_CHECKPOINT, f"{newest} is damaged")
    goes_on(recipe_file, run, finished)


def test_none_whole_is_a_stop_and_nothing_is_lost(recipe_file, run):
    for found in checkpoints.whole(run.checkpoints):
        torn_manifest(found.path)
    work = contents(run.path, *WORK)
    for program, arguments in ((evaluate.main, (run.path,)), (export.main, (run.path,))):
        check_refused(command_in_rank(program, *arguments), EXIT_NO_CHECKPOINT, "holds no checkpoint that can be used")
        assert contents(run.path, *WORK) == work
    said = command_in_rank(train.main, recipe_file, f"run_dir={run.path}")
    assert said.code == EXIT_NO_CHECKPOINT
    assert "step-0000000001 is not whole, and was set aside" in said.err
    assert "Nothing was overwritten." in said.err
    for name in ("step-0000000001", "step-0000000002"):  # all of it is there, beside the reason
        (aside,) = (run.checkpoints / ".quarantine").glob(f"{name}-*")
        files = [path for path in work if path.startswith(f"checkpoints/{name}/")]
        assert files
        assert all((aside / path.removeprefix(f"checkpoints/{name}/")).is_file() for path in files)


def test_a_state_that_is_damaged_is_named_and_the_one_before_is_used(recipe_file, run, finished):
    path = run.checkpoints / "step-0000000002" / "state.json"
    path.write_text("{".ljust(path.stat().st_size))
    check_refused(command_in_rank(export.main, run.path), EXIT_NO_CHECKPOINT, "state.json is not what was written")
    goes_on(recipe_file, run, finished)


@pytest.mark.parametrize("set_trap", [set_trap_in_metadata, set_trap_in_a_value])
def test_a_checkpoint_that_is_a_program_is_not_run(recipe_file, run, trap, set_trap):
    """Torch itself would: it unpickles a checkpoint's metadata, and all values that are no tensors."""
    for found in checkpoints.whole(run.checkpoints):
        set_trap(found.path, trap)
    for program in (evaluate.main, export.main):
        assert command_in_rank(program, run.path).code == EXIT_NO_CHECKPOINT
    said = command_in_rank(train.main, recipe_file, f"run_dir={run.path}")
    assert said.code == EXIT_NO_CHECKPOINT
    assert "step-0000000002 is not whole, and was set aside" in said.err
    assert not trap.was_sprung()


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


# --- stop signals, and the real processes -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_stop_signals_save_and_the_same_command_goes_on(recipe_file, finished, tmp_path, number):
    """Twice in a row, as Ctrl-C reaches a process from the terminal and from its launcher."""
    run = RunDir(tmp_path / "run")

    def stopping():
        started = time.monotonic()

        def twice(*_):
            if losses(run):
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            elif time.monotonic() - started < 300:
                signal.setitimer(signal.ITIMER_REAL, 0.02)

        signal.signal(signal.SIGALRM, twice)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        return train.main([str(recipe_file), f"run_dir={run.path}", "max_steps=300", "checkpoint.every=null"])

    assert command_in_rank(lambda _: stopping()).code == EXIT_DONE
    outcome = run.outcomes()[0]
    assert (outcome["status"], outcome["exit_code"]) == ("stopped", 3)
    assert outcome["message"] == f"stopped by {number.name}"
    assert [found.step for found in checkpoints.whole(run.checkpoints)] == [outcome["step"]]
    last = outcome["step"] + 1
    arguments = (recipe_file, f"run_dir={run.path}", f"max_steps={last}", "--allow-change")
    assert command_in_rank(train.main, *arguments).code == EXIT_DONE
    assert sorted(losses(run)) == list(range(1, last + 1))


def test_exit_codes_of_the_real_command(recipe_file, run, tmp_path):
    """A config that contradicts the recipe, steps that are not finite, no whole checkpoint: 2, 4, 5."""
    config = tmp_path / "mine.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 1\n"
        "mixed_precision: bf16\n"
    )
    for found in checkpoints.whole(run.checkpoints):
        torn_manifest(found.path)
    wild = ["optim.lr=1e30", "optim.max_grad_norm=null", "limits.max_skipped_steps=1", "max_steps=50"]
    cases = {
        EXIT_USAGE: ([f"run_dir={tmp_path / 'new'}", "--accelerate", config], ["mixed_precision: bf16", "fp32 here"]),
        EXIT_FAILED: ([f"run_dir={tmp_path / 'wild'}", *wild], ["A step was not finite: step "]),
        EXIT_NO_CHECKPOINT: ([f"run_dir={run.path}"], ["no checkpoint that can be used"]),
    }
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    line = [sys.executable, "-m", "launch.cli", "train", str(recipe_file), "--processes", "1"]
    started = {
        code: subprocess.Popen([*line, *map(str, arguments)], env=environ, stderr=subprocess.PIPE, text=True)
        for code, (arguments, _) in cases.items()
    }
    for code, (_, words) in cases.items():
        _, errors = started[code].communicate(timeout=300)
        assert started[code].returncode == code, errors
        assert all(word in errors for word in [*words, "Rank 0 on "]), errors
    assert read_json(tmp_path / "wild" / "outcome" / "attempt-001" / "rank-0.json")["exit_code"] == EXIT_FAILED
