"""`wavefleet watch` reads files only; what it prints is what they say."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

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


def test_a_screen_of_80_columns_has_room_for_all_that_is_known_of_a_run(run):
    row = watch.describe(run, ask_slurm=False)
    console = Console(width=80, file=io.StringIO())
    console.print(watch.screen([{**row, "name": "over", "state": "done"}, {**row, "state": "running"}]))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert re.fullmatch(r"minds14-1234abcd  running  ━+ *20/40  1:01:00 left", lines[0])
    assert lines[1:3] == [
        "  loss 1.5  WER dev 12.50%  audio-s/s 1,234  memory 12.3 GB",
        "  compute 75%, peer wait 15%, startup 10%, rank 1 (n2) is 40% slower",
    ]
    assert lines[3].startswith("over "), "what goes on comes first"
    assert len(lines) == 6


def test_a_run_without_an_attempt_is_shown_as_new(tmp_path, capsys):
    write_json(tmp_path / "runs" / "young" / "run.json", {"run_id": "0"})
    assert watch.main(["--folder", str(tmp_path / "runs"), "--once"]) == 0
    assert capsys.readouterr().out == "young  new  step 0\n"


# --- a real terminal --------------------------------------------------------------------------------------------


class Terminal:
    """`wavefleet watch` on a terminal of 24 lines of 80 columns, and what it shows there."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "launch.cli", "watch", *map(str, arguments), "--interval", "0.1"]
        self.pid, self.keyboard = pty.fork()
        if self.pid == 0:
            termios.tcsetwinsize(1, (24, 80))
            os.execve(command[0], command, {**os.environ, "TERM": "xterm", "NO_COLOR": "1"})
        self.shown = ""

    def wait_for(self, text):
        """Until it has shown this; what it has shown since the last wait."""
        start = len(self.shown)
        until = time.monotonic() + 60
        while text not in self.shown[start:]:
            assert self.read(until - time.monotonic()), self.shown
        return self.shown[start:]

    def read(self, timeout_s):
        """Take what it shows; False when it is over, or too late."""
        if not select.select([self.keyboard], [], [], max(0, timeout_s))[0]:
            return False
        try:
            self.shown += os.read(self.keyboard, 65536).decode(errors="replace")
        except OSError:  # nobody writes there any more
            return False
        return True

    def end(self):
        """Its exit code, once it has ended."""
        while self.read(60):
            pass
        os.close(self.keyboard)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def text_of(shown):
    """What stands there without the words to the terminal."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown)


HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def test_on_a_terminal_runs_are_renewed_in_place_until_they_are_over(run, tmp_path):
    other = RunDir(tmp_path / "runs" / "telephone-0000abcd")
    write_json(other.path / "run.json", {"run_id": "1"})
    write_json(other.path / "attempts" / "attempt-001.json", {"attempt": 1, "started": 1000.0})
    write_json(other.done, {"step": 40})
    with run.lock():
        terminal = Terminal(run.path, other.path)
        first = terminal.wait_for("telephone-0000abcd")
        assert "minds14-1234abcd  running" in text_of(first) and "rank 1 (n2) is 40% slower" in first
        assert first.count(HIDE) == 1 and SHOW not in first
        append_jsonl(run.metrics, {"attempt": 1, "step": 30, "loss": 1.25, "step_time_s": 1.0, "time": 1200.0,
                                   "audio_s_per_s": 1.0, "memory_bytes": 1e9})  # fmt: skip
        renewed = terminal.wait_for("30/40")
        assert "\x1b[1A\x1b[2K" in renewed, "lines are written over"
        write_json(run.done, {"step": 40})
        assert terminal.end() == 0
    assert "minds14-1234abcd  done" in text_of(terminal.shown)
    assert terminal.shown.count(HIDE) == terminal.shown.count(SHOW) == 1
    assert max(len(line) for line in re.split(r"[\r\n]+", text_of(terminal.shown))) <= 80


def test_ctrl_c_ends_it_and_leaves_the_terminal_as_it_was(run):
    with run.lock():
        terminal = Terminal("--folder", run.path.parent)
        terminal.wait_for("slower")
        os.write(terminal.keyboard, b"\x03")
        assert terminal.end() == 0
    assert "Traceback" not in terminal.shown
    assert terminal.shown.count(HIDE) == terminal.shown.count(SHOW) == 1


def test_ctrl_c_ends_the_plain_lines_too(run):
    command = [sys.executable, "-m", "launch.cli", "watch", "--folder", str(run.path.parent), "--interval", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "\x1b" not in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
