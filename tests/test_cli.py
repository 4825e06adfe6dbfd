"""The command `wavefleet`: its verbs, what it imports, its exit codes."""

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from asr_train.errors import EXIT_FAILED, run_main
from asr_train.stop import IMPATIENT_S
from launch import cli
from launch.child import run_child

HEAVY = ("torch", "transformers", "datasets", "accelerate", "submitit")


@pytest.mark.parametrize("arguments", [["--help"], ["show", "demo"], ["show", "demo", "--json"]])
def test_imports_nothing_heavy(arguments):
    program = (
        "import json, sys; from launch.cli import main; code = main(sys.argv[1:]); "
        f"print(json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]


def test_help_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in ("prepare", "train", "evaluate", "export", "transcribe", "show"))


def test_no_verb_prints_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: wavefleet VERB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("trian", "did you mean train?"),
        ("transcibe", "did you mean transcribe?"),
        ("fly", "known: new, show, prepare,"),
    ],
)
def test_unknown_verb_names_the_nearest(capsys, typed, answer):
    assert cli.main([typed, "demo"]) == 2
    assert answer in capsys.readouterr().err


def test_unknown_recipe_lists_the_shipped_ones(capsys):
    assert cli.main(["show", "dmeo"]) == 2
    error = capsys.readouterr().err
    assert "'dmeo'" in error and "demo" in error and "minds14" in error


def test_show_says_value_meaning_and_what_was_set(capsys):
    assert cli.main(["show", "demo", "optim.lr=0.003", "log.every=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "* optim.lr: 0.003  # peak learning rate" in lines
    assert "* log.every: 7  # steps between training lines (may change)" in lines
    assert "  tf32: false  # let fp32 matrix products round to tf32 on NVIDIA GPUs" in lines
    assert next(line for line in lines if line.startswith("* data.train: "))
    assert next(line for line in lines if line.startswith("run directory: ")).startswith("run directory: /")


def test_show_json_tells_identity_apart(capsys):
    def shown(*overrides):
        assert cli.main(["show", "demo", "--json", *overrides]) == 0
        return json.loads(capsys.readouterr().out)

    plain, logged, other = shown(), shown("log.every=7"), shown("seed=17")
    fields = {field["key"]: field for field in logged["fields"]}
    assert fields["log.every"] == {
        "key": "log.every", "value": 7, "meaning": "steps between training lines", "set": True, "defines_run": False,
    }  # fmt: skip
    assert plain["run_dir"] == logged["run_dir"] != other["run_dir"]


def test_show_yaml_is_a_recipe_again(capsys, tmp_path):
    assert cli.main(["show", "demo", "--yaml", "seed=5"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert cli.main(["show", str(again), "--yaml"]) == 0
    assert capsys.readouterr().out == again.read_text()


def test_show_lists_every_error_of_the_recipe(capsys):
    assert cli.main(["show", "demo", "optim.lrr=1", "seed=-1"]) == 2
    error = capsys.readouterr().err
    assert "did you mean optim.lr?" in error and "seed: -1" in error


@pytest.mark.parametrize("code", [0, 2, 3, 5])
def test_a_childs_exit_code_is_ours(code):
    assert run_child([sys.executable, "-c", f"raise SystemExit({code})"]).exit_code == code


def test_a_verb_of_the_training_program_runs_in_a_child(monkeypatch, capfd):
    monkeypatch.setitem(cli.VERBS, "probe", cli.Verb("asr_train.prepare:main", ""))
    assert cli.main(["probe", "--help"]) == 0
    assert "usage:" in capfd.readouterr().out
    assert cli.main(["probe", "no_such_recipe"]) == 2
    assert "no_such_recipe" in capfd.readouterr().err


TIDY = """
import signal, sys, time
def tidy(number, frame):
    time.sleep(0.3)
    print("saved after", signal.Signals(number).name, flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, tidy)
signal.signal(signal.SIGINT, tidy)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = (
    "import sys; from launch.child import run_child; sys.exit(run_child([sys.executable, '-c', sys.argv[1]]).exit_code)"
)


def start_parent(program, stdin=None):
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, program],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_reaches_the_child_once_and_it_may_finish(number):
    process = start_parent(TIDY)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert out == f"saved after {number.name}\n"
    assert process.returncode == 3


def test_a_second_ctrl_c_at_a_terminal_ends_a_child_that_does_not_stop():
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    keyboard, terminal = pty.openpty()
    process = start_parent(stubborn, stdin=terminal)
    process.send_signal(signal.SIGINT)
    time.sleep(2 * IMPATIENT_S)  # a busy machine may hear the first late
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=55) == 130
    os.close(keyboard)
    os.close(terminal)


def test_a_stop_signal_sent_twice_without_a_terminal_kills_nothing():
    process = start_parent(TIDY.replace("0.3", "3.0"), stdin=subprocess.DEVNULL)
    process.send_signal(signal.SIGINT)
    time.sleep(IMPATIENT_S + 0.2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert "saved after SIGINT" in out
    assert process.returncode == 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_killed_parent_does_not_leave_the_child_running():
    process = start_parent(TIDY)
    process.kill()
    assert process.stdout.read() == "saved after SIGTERM\n"
    process.communicate()


def test_a_reader_that_has_seen_enough_ends_a_verb_without_a_word():
    command = [sys.executable, "-c", "from launch.cli import main; import sys; sys.exit(main(['show', 'demo']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_any_other_pipe_that_breaks_is_a_failure(capsys):
    """To a worker, say, that was killed: a training is not done by that."""

    def program(_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert run_main(program, []) == EXIT_FAILED
    assert "Broken pipe" in capsys.readouterr().err
