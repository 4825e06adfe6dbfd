"""`wavefleet watch` reads files only; what it prints is what they say."""

import io

import pytest
from rich.console import Console

from asr_train.files import append_jsonl, write_json
from asr_train.ledger import PARTS
from asr_train.run_dir import RunDir
from launch import status, watch
from launch.site import slurm


def rank(number, host, straggler, **parts):
    seconds = {f"{part}_s": float(parts.get(part, 0)) for part in PARTS}
    return {"rank": number, "host": host, "straggler": straggler, "wall_s": sum(seconds.values()), **seconds}


@pytest.fixture
def run(tmp_path):
    """Half of a training on two nodes, of which one is slow."""
    found = RunDir(tmp_path / "runs" / "minds14-1234abcd")
    write_json(found.path / "run.json", {"run_id": "0"})
    write_json(found.path / "attempts" / "attempt-001.json", {"attempt": 1, "started": 1000.0})
    append_jsonl(found.metrics, {"attempt": 1, "event": "started", "step": 0, "max_steps": 40, "time": 1010.0})
    line = {"step": 20, "loss": 1.5, "audio_s_per_s": 1234.0, "step_time_s": 183.0, "memory_bytes": 12.3e9}
    append_jsonl(found.metrics, {"attempt": 1, **line, "time": 1100.0})
    ranks = [rank(0, "n1", 0.0, compute=60, peer_wait=30, startup=10), rank(1, "n2", 0.4, compute=90, startup=10)]
    append_jsonl(found.metrics, {"attempt": 1, "event": "ledger", "step": 20, "ranks": ranks, "time": 1100.0})
    append_jsonl(found.metrics, {"attempt": 1, "event": "saved", "step": 20, "time": 1100.0})
    append_jsonl(found.metrics, {"attempt": 1, "step": 20, "set": "dev", "wer": 0.125, "cer": 0.05, "time": 1100.0})
    return found


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    """Slurm is never asked."""
    monkeypatch.setattr(slurm, "job_state", lambda *_: pytest.fail("asked Slurm"))


def test_a_run_is_one_line_where_there_is_no_terminal(run, capsys):
    assert watch.main([str(run.path), "--once"]) == 0
    line = capsys.readouterr().out
    for part in (
        "minds14-1234abcd  ended",
        "step 20/40",
        "loss 1.5",
        "WER dev 12.50%",
        "audio-s/s 1,234",
        "memory 12.3 GB",
        "time: compute 75%, peer wait 15%, startup 10%, rank 1 (n2) is 40% slower",
    ):
        assert part in line
    assert line.count("\n") == 1


def test_status_and_ls_say_it_in_the_same_words(run, capsys):
    assert status.status([str(run.path)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["step"], lines["wer"], lines["memory"]) == ("20/40", "dev 12.50%", "12.3 GB")
    assert lines["ledger"].startswith("compute 75%")
    assert not set(lines) & {"left", "max", "stragglers"}  # the run is over; the others stand in those above
    assert status.list_runs([str(run.path.parent)]) == 0
    assert "dev 12.50%" in capsys.readouterr().out


def test_it_ends_when_the_run_is_over_and_prints_what_changed(run, capsys, monkeypatch):
    states = iter(["running", "running", "done"])
    describe = watch.describe
    monkeypatch.setattr(watch, "describe", lambda found, **how: {**describe(found, **how), "state": next(states)})
    assert watch.main([str(run.path), "--interval", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["running", "done"]


def test_all_runs_of_a_folder_are_a_table_with_bars(run):
    found = [watch.describe(run, ask_slurm=False)]
    console = Console(width=160, file=io.StringIO())
    console.print(watch.table(found))
    text = console.file.getvalue()
    assert "minds14-1234abcd" in text
    assert "━" in text
    assert "20/40" in text


def test_a_run_without_an_attempt_is_shown_as_new(tmp_path, capsys):
    write_json(tmp_path / "runs" / "young" / "run.json", {"run_id": "0"})
    assert watch.main(["--folder", str(tmp_path / "runs"), "--once"]) == 0
    assert capsys.readouterr().out == "young  new  step 0\n"
