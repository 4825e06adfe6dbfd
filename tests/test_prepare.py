"""`python -m asr_train.prepare`: what is refused and why, and what is kept."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from bad_rows import BAD_ROWS, bad_manifest, rejected
from conftest import write_jsonl, write_speech

from asr_train import prepare as prepare_module
from asr_train.data.corpus import Corpus
from asr_train.data.rows import SourceError
from asr_train.errors import CorpusError, RecipeError, run_main
from asr_train.prepare import is_prepared, main, prepare
from asr_train.recipe import load_recipe


@pytest.fixture
def bad_recipe(tiny_recipe, tmp_path):
    path = bad_manifest(tmp_path / "bad")
    source = {"kind": "jsonl", "path": path}

    def make(**changes):
        values = {"data.train": source, "eval.sets": {"dev": source}, "text.remove": "?!", "data.max_duration_s": 3.0}
        limits = {"data.max_rejected_percent": 95.0, "data.corpus_root": str(tmp_path / "corpora")}
        return tiny_recipe(**{**values, **limits, **changes})

    return make


@pytest.mark.parametrize("num_proc", [1, 2])
def test_every_bad_row_is_refused_with_its_reason(bad_recipe, num_proc):
    corpus = prepare(bad_recipe(**{"data.num_proc": num_proc, "data.shard_rows": 4}), progress=False)
    found = {(entry["set"], entry["id"]): entry["reason"] for entry in rejected(corpus.path)}
    for name, (_, _, training, evaluation) in BAD_ROWS.items():
        assert found.get(("train", name)) == training, name
        assert found.get(("dev", name)) == evaluation, name
    for position, name in enumerate(BAD_ROWS):
        for entry in rejected(corpus.path):
            if entry["id"] == name:
                assert entry["row"] == position
                assert entry["source"].endswith(f"m.jsonl:{position + 1}")
                assert entry["value"]
    kept = {name for name, (_, _, _, evaluation) in BAD_ROWS.items() if evaluation is None}
    dev = corpus.sets["dev"]
    assert {dev.id(row) for row in range(len(dev))} == kept
    assert dev.num_refused == len(BAD_ROWS) - len(kept)
    assert [corpus.train.id(row) for row in range(len(corpus.train))] == ["good"]


def test_the_summary_counts_every_reason_and_shows_texts(bad_recipe, capsys):
    corpus = prepare(bad_recipe())
    shown = capsys.readouterr().err
    summary = json.loads((corpus.path / "summary.json").read_text())
    for name, column in (("train", 2), ("dev", 3)):
        expected = Counter(row[column] for row in BAD_ROWS.values() if row[column])
        assert summary["sets"][name]["rejected"] == expected == corpus.info["sets"][name]["rejected"]
        assert summary["sets"][name]["rows"] == len(BAD_ROWS) - expected.total()
    text = (corpus.path / "summary.txt").read_text()
    for words in ("truncated audio", "unalignable", "12 frames, the text needs 32", "good text", "[PAD] [UNK] |"):
        assert words in text
        assert words in shown


def test_too_many_refused_rows_are_an_error_and_nothing_is_lost(bad_recipe, capsys):
    recipe = bad_recipe(**{"data.max_rejected_percent": 60.0})
    with pytest.raises(CorpusError) as caught:
        prepare(recipe, progress=False)
    message = str(caught.value)
    assert "set train: 13 of 14 rows (92.9 %)" in message
    assert "truncated audio 2" in message
    assert "set dev" not in message  # 9 of 14 are kept
    listed = Path(message.partition("every refused row is in ")[2].partition(",")[0])
    assert len(rejected(listed.parent)) == 13 + 8
    assert is_prepared(recipe) is None
    before = {path: path.stat().st_mtime_ns for path in shards(recipe)}
    corpus = prepare(bad_recipe(), progress=False)  # the limit raised: what was done is kept
    assert {path: path.stat().st_mtime_ns for path in shards(recipe)} == before
    with pytest.raises(CorpusError, match=r"92\.9 %"):  # and lowered again
        prepare(recipe, progress=False)
    assert Corpus.open(corpus.path)


def shards(recipe):
    return sorted(Path(recipe.data.corpus_root).rglob("*.arrow"))


def test_an_empty_set_is_an_error(bad_recipe, tmp_path):
    empty = write_jsonl(tmp_path / "bad" / "e.jsonl", [{"audio": "gone.wav", "text": "a"}])
    with pytest.raises(CorpusError, match="set dev: no rows are left: missing file 1"):
        prepare(
            bad_recipe(
                **{"eval.sets": {"dev": {"kind": "jsonl", "path": str(empty)}}, "data.max_rejected_percent": 100}
            ),
            progress=False,
        )


def test_bad_input_of_all_sets_is_listed_at_once(tiny_recipe, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"audio": "a.wav"}])
    sets = {"one": {"kind": "jsonl", "path": str(bad)}, "two": {"kind": "csv", "path": str(tmp_path / "none.csv")}}
    with pytest.raises(SourceError) as caught:
        prepare(tiny_recipe(**{"eval.sets": sets, "data.train.path": "/gone.jsonl"}), progress=False)
    assert len(caught.value.problems) == 3


def test_names_of_sets_that_a_corpus_has_already_are_refused(tiny_recipe):
    source = {"kind": "jsonl", "path": "/x.jsonl"}
    for name in ("train", "processor"):
        with pytest.raises(RecipeError, match=f"eval.sets.{name}"):
            prepare(tiny_recipe(**{"eval.sets": {name: source}}))


# --- the command ------------------------------------------------------------------------------------------------


def test_command_line(tiny_recipe_file, tmp_path, capsys):
    recipe = str(tiny_recipe_file(**{"data.corpus_root": str(tmp_path / "c")}))
    assert run_main(main, [recipe]) == 0
    first = capsys.readouterr().out
    assert "prepared: " in first
    assert "train 40 rows, dev 12 rows" in first
    assert run_main(main, [recipe]) == 0
    assert "already prepared: " in capsys.readouterr().out
    assert run_main(main, [recipe, "data.max_duration_s=2.9", "data.max_rejected_percent=99"]) == 0
    assert len(list((tmp_path / "c").iterdir())) == 2
    assert run_main(main, [recipe, "text.caze=upper"]) == 2
    assert "did you mean text.case?" in capsys.readouterr().err
    assert run_main(main, [recipe, "data.train.0.path=/gone.jsonl"]) == 4
    assert "/gone.jsonl: no such file" in capsys.readouterr().err


def test_a_second_prepare_opens_no_source(tiny_recipe, tiny_corpus, monkeypatch):
    monkeypatch.setattr(prepare_module, "open_sources", None)
    assert prepare(tiny_recipe()).hash == tiny_corpus.hash
    assert is_prepared(tiny_recipe()) == tiny_corpus.path


def test_a_model_of_other_convolutions_has_its_own_corpus(tiny_recipe, tiny_corpus):
    """Alignability depends on the frames; and transformers' config of three layers needs no count of them."""
    stack = {"conv_dim": [8, 8, 8], "conv_kernel": [10, 8, 4], "conv_stride": [5, 8, 4]}
    corpus = prepare(tiny_recipe(**{"model.config": stack}), progress=False)
    assert corpus.path != tiny_corpus.path
    assert (corpus.geometry.kernels, corpus.geometry.strides) == ((10, 8, 4), (5, 8, 4))


def test_what_nobody_reads_and_what_the_terminal_has_no_letters_for_is_no_reason_to_fail(tiny_recipe_file, tmp_path):
    """Standard output is closed by its reader before the work is done, `| head` say, and nothing is UTF-8."""
    recipe = str(tiny_recipe_file(**{"data.corpus_root": str(tmp_path / "\u0642"), "name": "arabic"}))
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "asr_train.prepare", recipe]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ascii_only)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 0, said
    assert "rows kept" in said and "Traceback" not in said
    again = subprocess.run(command, capture_output=True, text=True, env=ascii_only, check=True)
    assert again.stdout.startswith(f"already prepared: {tmp_path}/\\u0642/arabic-")


def test_a_manifest_that_changed_since_is_said(tiny_recipe_file, tmp_path, capsys):
    manifest = write_speech(tmp_path / "s", 3)
    changes = {"data.train.path": str(manifest), "data.corpus_root": str(tmp_path / "c")}
    recipe = str(tiny_recipe_file(**changes))
    assert run_main(main, [recipe]) == 0
    write_speech(tmp_path / "s", 4)
    capsys.readouterr()
    assert run_main(main, [recipe]) == 4
    assert f"files that have changed since:\n  {manifest}" in capsys.readouterr().err
    assert len(prepare(load_recipe(recipe)).train) == 3  # a training goes on, and says so
    assert f"note: corpus {tmp_path}" in capsys.readouterr().err
