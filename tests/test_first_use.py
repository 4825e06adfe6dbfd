"""What every verb has in common: quiet and verbose, colour, versions, help, completion, what to do next, exit codes."""

import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import datasets
import pytest
import transformers
from rich.console import Console

from asr_train import __version__, errors, verbosity
from asr_train.errors import run_main, say, warn
from asr_train.prepare import main as prepare_main
from asr_train.progress import TrainingProgress
from asr_train.recipe import dump_recipe
from launch import cli, next_steps
from launch.child import run_child

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def usual_environment(monkeypatch):
    for name in ("WAVEFLEET_VERBOSITY", "NO_COLOR", "FORCE_COLOR", next_steps.SILENCE):
        monkeypatch.delenv(name, raising=False)


# --- quiet and verbose ------------------------------------------------------------------------------------------


def talkative(arguments):
    print("a result")
    say("a note")
    warn("an error")
    return 0


@pytest.mark.parametrize(
    ("option", "told"),
    [("", "a note\nan error\n"), ("-q", "an error\n"), ("--quiet", "an error\n"), ("-v", "a note\nan error\n")],
)
def test_quiet_leaves_results_and_errors(option, told, capsys):
    run_main(talkative, [option] if option else [])
    assert capsys.readouterr() == ("a result\n", told)


def test_these_options_stand_anywhere_and_programs_do_not_see_them(capsys):
    seen = []
    run_main(lambda rest: seen.append(list(rest)) or 0, ["-q", "train", "--no-color", "demo", "--debug", "-v"])
    assert seen == [["train", "demo"]]


def test_the_last_of_quiet_and_verbose_counts_and_nothing_stays():
    seen = []
    run_main(lambda _: seen.append((verbosity.level(), os.environ.get("NO_COLOR"))) or 0, ["-q", "-v", "--no-color"])
    assert seen == [("verbose", "1")]
    assert (verbosity.level(), os.environ.get("NO_COLOR")) == ("normal", None)


def test_children_are_as_quiet(capfd):
    child = "import asr_train.errors as e; e.say('a note'); e.warn('an error')"
    run_main(lambda _: subprocess.run([sys.executable, "-c", child], check=True).returncode, ["-q"])
    assert capfd.readouterr().err == "an error\n"


def test_libraries_are_as_quiet_as_we_are_and_as_before_afterwards():
    def libraries(_):
        return transformers.logging.get_verbosity(), datasets.logging.get_verbosity()

    before = libraries(None)
    with verbosity.at("quiet"):
        quiet = libraries(None)
    with verbosity.at("verbose"):
        verbose = libraries(None)
    assert quiet > before > verbose
    assert libraries(None) == before


def test_python_warnings_are_notes_too():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with verbosity.at("quiet"):
            warnings.warn("a library's warning", stacklevel=1)
        assert seen == []
        warnings.warn("a library's warning", stacklevel=1)
        assert len(seen) == 1


def test_bars_of_libraries_are_for_terminals(capsys):
    def bar(_):
        list(transformers.logging.tqdm(range(3), desc="Loading weights"))
        return 0

    transformers.logging.enable_progress_bar()
    bar(None)
    assert "Loading weights" in capsys.readouterr().err
    run_main(bar, [])
    assert "Loading weights" not in capsys.readouterr().err
    assert transformers.logging.is_progress_bar_enabled()


def test_a_child_is_told_of_bars_in_its_environment(capsys):
    """It loads the libraries later than we could tell them."""
    seen = []
    run_main(lambda _: seen.append(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")) or 0, [])
    assert seen == ["1"]
    assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None


def test_verbose_shows_the_commands_that_are_started(capfd):
    def start(_):
        return run_child([sys.executable, "-c", "print('a result')"]).exit_code

    assert run_main(start, []) == 0
    assert capfd.readouterr() == ("a result\n", "")
    assert run_main(start, ["-v"]) == 0
    shown, said = capfd.readouterr()
    assert shown == "a result\n"
    assert shlex.split(said) == ["$", sys.executable, "-c", "print('a result')"]


def test_a_training_shows_no_bar_and_no_lines_when_quiet(capsys):
    def shown(_):
        with TrainingProgress(start_step=0, max_steps=2, is_shown=True) as progress:
            progress.log({"step": 1, "loss": 2.5, "audio_s_per_s": 10.0, "memory_bytes": 1e9}, {"compute": 0.9})
        return 0

    run_main(shown, [])
    assert "loss 2.500" in capsys.readouterr().err
    run_main(shown, ["-q"])
    assert capsys.readouterr().err == ""


def test_a_preparation_shows_its_result_alone_when_quiet(tiny_recipe, tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    for number, options in enumerate(([], ["-q"])):
        file.write_text(dump_recipe(tiny_recipe(**{"data.corpus_root": str(tmp_path / f"corpora-{number}")})))
        assert run_main(prepare_main, [str(file), *options]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[-1].startswith(f"prepared: {tmp_path}")
        assert len(out.splitlines()) == 1
        assert err == "" if options else "rows kept" in err


# --- colour -----------------------------------------------------------------------------------------------------


def coloured():
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="standard").print("[red]text[/]")
    return re.findall(r"\x1b\[3\dm", stream.getvalue())


def test_no_colour_where_it_is_not_wanted(monkeypatch):
    shown = []
    run_main(lambda _: shown.append(coloured()) or 0, [])
    run_main(lambda _: shown.append(coloured()) or 0, ["--no-color"])
    monkeypatch.setenv("NO_COLOR", "1")
    run_main(lambda _: shown.append(coloured()) or 0, [])
    assert shown == [["\x1b[31m"], [], []]


# --- versions and help ------------------------------------------------------------------------------------------


def test_version_names_what_a_report_of_a_fault_needs(capsys):
    assert cli.main(["--version"]) == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert lines["wavefleet"] == __version__
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "transformers", "accelerate"):
        assert lines[name] == metadata.version(name)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb_is_of_wavefleet_and_names_the_common_options(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: wavefleet {verb} ")
    assert all(option in text for names in verbosity.OPTIONS for option in names)


@pytest.mark.parametrize("verb", ["prepare", "evaluate", "transcribe"])
def test_help_of_a_verb_that_may_be_a_job_says_how(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert f"As a job: `wavefleet {verb} --cluster P --help`" in " ".join(capsys.readouterr().out.split())


def test_a_mistake_in_a_command_line_is_found_before_a_child_is_started(monkeypatch, capsys):
    monkeypatch.setattr("launch.child.run_child", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["transcribe", "model", "a.wav", "--format", "doc"])
    assert ended.value.code == errors.EXIT_USAGE
    assert "choose from text, jsonl, srt, vtt" in capsys.readouterr().err.replace("'", "")


# --- completion -------------------------------------------------------------------------------------------------


def completions(line, folder, tmp_path):
    """What a shell is answered that asks how a line may go on."""
    answer = tmp_path / "answer"
    environ = {
        **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    report = "import atexit, sys; from launch.cli import main; import os; ended = os._exit\n"
    report += "os._exit = lambda code: (print('torch' in sys.modules, flush=True), ended(code)); main([])"
    command = [sys.executable, "-c", report]
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", done.stderr  # torch is not loaded
    return [word.strip() for word in answer.read_text().split("\n")]


@pytest.fixture
def folder(tmp_path):
    """A working directory with a run and a recipe."""
    here = tmp_path / "here"
    (here / "runs" / "mine-12345678").mkdir(parents=True)
    (here / "runs" / "mine-12345678" / "run.json").write_text("{}")
    (here / "mine.yaml").touch()
    return here


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("wavefleet tra", {"train", "transcribe"}),
        ("wavefleet train m", {"minds14", "mine.yaml"}),
        ("wavefleet train demo --acc", {"--accelerate"}),
        ("wavefleet train demo --accelerate z", {"zero2", "zero3"}),
        ("wavefleet train demo optim.warm", {"optim.warmup_steps="}),
        ("wavefleet train demo precision=b", {"precision=bf16"}),
        ("wavefleet status runs/m", {"runs/mine-12345678", "runs/mine-12345678/"}),
        ("wavefleet evaluate runs/m", {"runs/mine-12345678", "runs/mine-12345678/"}),
        ("wavefleet submit demo --cluster ge", {"generic"}),
        ("wavefleet transcribe model a.wav --format s", {"srt"}),
        ("wavefleet --ver", {"--version"}),
    ],
)
def test_a_shell_completes(line, expected, folder, tmp_path):
    assert set(completions(line, folder, tmp_path)) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_what_the_shell_is_to_evaluate(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    out, err = capsys.readouterr()
    assert "_ARGCOMPLETE" in out and "wavefleet" in out
    assert f"wavefleet completion {shell}" in err


def test_bash_takes_it_and_completes(folder, tmp_path, capsys):
    """A real bash sources it and calls the function that it registered."""
    cli.main(["completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "wavefleet"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m launch.cli "$@"\n')
    command.chmod(0o755)
    ask = (
        f"PATH={shlex.quote(str(command.parent))}:$PATH; source {shlex.quote(str(script))}; "
        "COMP_WORDS=(wavefleet expo); COMP_CWORD=1; COMP_LINE='wavefleet expo'; COMP_POINT=14; COMP_TYPE=9; "
        '$(complete -p wavefleet | grep -o "_python_argcomplete[a-z_]*") wavefleet expo wavefleet; '
        'echo "${COMPREPLY[@]}"'
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", ask], cwd=folder, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["export"], done.stderr


# --- what to do next --------------------------------------------------------------------------------------------

LINES = {
    "new": "mine data",
    "show": "demo seed=3",
    "prepare": "demo seed=3",
    "train": "demo seed=3 --processes 2",
    "submit": "demo --cluster generic",
    "plan": "demo --cluster generic",
    "doctor": "--cluster generic",
    "retry": "runs/mine",
    "sweep": "demo seed=3,4 --cluster generic",
    "ls": "",
    "status": "mine",
    "why": "mine",
    "logs": "mine",
    "stop": "mine",
    "save": "mine",
    "cancel": "mine",
    "reconcile": "",
    "nodes": "--cluster generic",
    "checkpoints": "runs/mine",
    "evaluate": "runs/mine",
    "export": "runs/mine",
    "transcribe": "runs/mine/export a.wav",
    "completion": "bash",
    "watch": "runs/mine --once",
    "report": "runs/mine",
}


@pytest.mark.parametrize("verb", cli.VERBS)
@pytest.mark.parametrize("exit_code", [0, 3, 4, 5])
def test_every_verb_says_what_may_follow_and_that_is_a_command(verb, exit_code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rest = LINES[verb].split()
    options, _ = cli.find_parser(verb, rest).parse_known_intermixed_args(rest)
    next_steps.suggest(verb, options, rest, exit_code)
    lines = capsys.readouterr().err.splitlines()
    if exit_code == 0 and verb not in ("completion", "watch"):
        assert lines and lines[0].startswith("next: wavefleet ")
    for line in lines:
        program, following, *arguments = shlex.split(line.removeprefix("next: ").strip().split("   ")[0])
        assert program == "wavefleet"
        following_options = cli.find_parser(following, arguments).parse_intermixed_args(arguments)
        assert following_options is not None


def test_after_a_training_the_run_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.local.main", lambda rest: 0)
    assert cli.main(["train", "demo", "run_dir=my runs/a"]) == 0
    assert "next: wavefleet evaluate 'my runs/a'" in capsys.readouterr().err


def test_after_status_nothing_is_named_that_would_be_refused(tmp_path, monkeypatch, capsys):
    """A single process on this machine leaves no logs; a run that is done is read in its report."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    options, _ = cli.find_parser("status", ["mine"]).parse_known_intermixed_args(["mine"])

    def said():
        next_steps.suggest("status", options, ["mine"], 0)
        lines = capsys.readouterr().err.splitlines()
        return [line.removeprefix("next:").split()[1] for line in lines]

    assert said() == ["why"]
    (run / "done.json").write_text("{}")
    (run / "logs").mkdir()
    assert said() == ["report", "logs"]


@pytest.mark.parametrize("how", ["-q", "variable"])
def test_steps_can_be_left_out(how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if how == "variable":
        monkeypatch.setenv(next_steps.SILENCE, "off")
    assert cli.main(["ls", *(["-q"] if how == "-q" else [])]) == 0
    assert capsys.readouterr().err == ""


def test_a_wrong_command_is_not_followed_by_suggestions(monkeypatch, capsys):
    assert cli.main(["show", "dmeo"]) == errors.EXIT_USAGE
    assert "next:" not in capsys.readouterr().err


# --- exit codes -------------------------------------------------------------------------------------------------


def every_error(kind=errors.WavefleetError):
    yield kind
    for below in kind.__subclasses__():
        yield from every_error(below)


def test_exit_codes_are_documented_and_every_error_has_one():
    for module in ("asr_train.data.rows", "launch.site.slurm", "asr_train.checkpoint"):
        importlib.import_module(module)
    page = (ROOT / "docs" / "reference" / "verbs.md").read_text(encoding="utf-8")
    table = page.partition("## Exit codes")[2].partition("\n## ")[0]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert documented == set(errors.EXIT_MEANINGS)
    assert {kind.exit_code for kind in every_error()} <= documented


@pytest.mark.parametrize(
    "kind", [kind for kind in every_error() if kind.__module__ == errors.__name__], ids=lambda kind: kind.__name__
)
def test_an_error_is_a_message_and_its_exit_code(kind, capsys):
    def fail(_):
        raise kind("what was wrong")

    assert run_main(fail, []) == kind.exit_code
    assert capsys.readouterr().err == "error: what was wrong\n"


def test_ctrl_c_is_130(capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    assert run_main(interrupted, []) == 130
