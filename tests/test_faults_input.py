"""Bad recipes, bad data, a disk that fills up, through the command lines: a message for a person, its exit code."""

import json
import os
import shutil
from pathlib import Path

import pytest
from bad_rows import BAD_ROWS, bad_manifest
from conftest import merged, write_jsonl, write_speech
from fault_inputs import (
    check_refused,
    command,
    command_in_rank,
    contents,
    on_small_disk,
    remount,
)
from fault_run import RUN, WORK, clip, cut_to_step, finished, goes_on, losses, recipe_file, run, trap  # noqa: F401  fixtures

from asr_train import checkpoints, evaluate, export, prepare, samples, train
from asr_train.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_CHECKPOINT, EXIT_USAGE
from asr_train.files import append_jsonl, read_jsonl
from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir, read_metrics
from launch import cli

# ruff: noqa: F811  their names as arguments

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
