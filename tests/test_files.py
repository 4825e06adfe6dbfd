import json
import multiprocessing

import pytest

from asr_train.files import append_jsonl, atomic_file, hash_json, publish_dir, read_jsonl, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_torn_line_costs_only_itself(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_jsonl(path, {"n": 1})
    with path.open("a") as stream:
        stream.write('{"n": 2, "tor')
    append_jsonl(path, {"n": 3})
    assert list(read_jsonl(path)) == [{"n": 1}, {"n": 3}]
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_jsonl(path, {"loss": float("nan"), "norms": [float("inf"), 1.5]})
    assert path.read_text() == '{"loss": null, "norms": [null, 1.5]}\n'


def _append(path, writer):
    for number in range(200):
        append_jsonl(path, {"writer": writer, "number": number, "filler": "x" * 300})


def test_lines_of_several_processes_never_mix(tmp_path):
    path = tmp_path / "lines.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(path, writer)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    lines = list(read_jsonl(path))
    assert len(lines) == 800
    for writer in range(4):
        assert [line["number"] for line in lines if line["writer"] == writer] == list(range(200))


def test_a_published_directory_replaces_nothing(tmp_path):
    aside = tmp_path / "aside"
    (aside / "deep").mkdir(parents=True)
    (aside / "deep" / "file").write_text("x")
    publish_dir(aside, tmp_path / "final")
    assert (tmp_path / "final" / "deep" / "file").read_text() == "x"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("y")
    with pytest.raises(OSError):
        publish_dir(tmp_path / "other", tmp_path / "final")


def test_the_hash_does_not_depend_on_the_order_of_keys():
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 2})
