"""The command `wavefleet`: verb -> module:function, nothing else; imports nothing heavy."""

import argparse
import difflib
import importlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from asr_train import __version__
from asr_train.errors import EXIT_DONE, RecipeError, run_main
from asr_train.verbosity import OPTIONS


class Verb(NamedTuple):
    """Where a verb lives, and what it does in one line. With --cluster, `on_cluster` runs in its place.

    Verbs of `asr_train` run in a child process, for most of them need torch; their command lines are in
    `asr_train.arguments`. Those of `launch` have theirs beside them: `_parser` for `main`, `_NAME_parser` for `NAME`.
    """

    target: str
    meaning: str
    on_cluster: str | None = None


VERBS = {
    "new": Verb("asr_train.new:main", "look at your data, and write a commented recipe for it"),
    "show": Verb("launch.show:main", "print a recipe, every field with its meaning"),
    "prepare": Verb(
        "asr_train.prepare:main",
        "make the corpus of a recipe: decoded, checked, indexed",
        "launch.jobs.prepare_array:main",
    ),
    "train": Verb("launch.local:main", "train on this machine; the same command again goes on where it stopped"),
    "submit": Verb("launch.jobs.submit:main", "train on a Slurm cluster; the same command again says which job does"),
    "plan": Verb(
        "launch.plan:main", "what a training, and its job, would be: steps, memory, time, cost; touches nothing"
    ),
    "doctor": Verb("launch.doctor:main", "what a Slurm cluster can do, and what that means for runs there"),
    "retry": Verb("launch.jobs.submit:retry", "another job for a run that failed, as it was submitted"),
    "sweep": Verb("launch.jobs.sweep:main", "a run for every combination of values, listed with their best WER"),
    "ls": Verb("launch.status:list_runs", "every run, and how it is"),
    "status": Verb("launch.status:status", "how a run is: job, step, loss, WER, time left"),
    "watch": Verb("launch.watch:main", "trainings as they go on, here or on a cluster, from their files"),
    "why": Verb("launch.status:why", "why the last attempt of a run ended, with the evidence"),
    "report": Verb("launch.report.verb:main", "what a run did, as one page that opens offline; several are compared"),
    "logs": Verb("launch.logs:main", "what the ranks of a run wrote, and which failed first"),
    "stop": Verb("launch.requests:stop", "have a training save and stop"),
    "save": Verb("launch.requests:save", "have a training save and go on"),
    "cancel": Verb("launch.status:cancel", "end a run's job without saving"),
    "reconcile": Verb("launch.jobs.reconcile:main", "look after runs whose jobs are gone; says what, --act does it"),
    "nodes": Verb("launch.site.nodes:main", "which nodes of a cluster jobs are kept off, why, until when; add, remove"),
    "checkpoints": Verb("launch.checkpoints:main", "a run's checkpoints: which are whole, which one it goes on from"),
    "evaluate": Verb(
        "asr_train.evaluate:main", "WER and CER of a run or a model on a data set", "launch.jobs.remote:evaluate"
    ),
    "export": Verb("asr_train.export:main", "make a model folder that transformers loads"),
    "transcribe": Verb(
        "asr_train.transcribe:main",
        "audio files in; text, word times or subtitles out",
        "launch.jobs.remote:transcribe",
    ),
    "completion": Verb("launch.completion:main", "completion of all this in bash, zsh or fish"),
}

HELP = (
    "usage: wavefleet VERB ...\n\n"
    "Trains Wav2Vec2-style CTC speech recognisers.\n\n"
    + "".join(f"  {name:<13}{verb.meaning}\n" for name, verb in VERBS.items())
    + "\nwith any verb:\n"
    + "".join(f"  {', '.join(names):<15}{meaning}\n" for names, meaning in OPTIONS.items())
    + "\n`wavefleet VERB --help` says more; --version, which versions this is. "
    "Exit codes: 0 done, 2 command line or recipe,\n3 stopped with a checkpoint, 4 failed, 5 no usable checkpoint; "
    "docs/runs.md has them all.\n"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how the line may go on
        from launch.completion import complete  # noqa: PLC0415

        complete(VERBS, find_parser)
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = ["--debug"] if "--debug" in arguments else []
    return run_main(lambda rest: _dispatch(rest, debug), arguments)


def _dispatch(arguments: Sequence[str], debug: Sequence[str]) -> int:
    """Run the verb that the first argument names; `debug` goes on to it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return EXIT_DONE if arguments else RecipeError.exit_code
    if arguments[0] == "--version":
        print(_versions())
        return EXIT_DONE
    name, *rest = arguments
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}"
        raise RecipeError(f"no verb {name!r}; {hint}")
    parser = find_parser(name, rest)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        return EXIT_DONE
    options, _ = parser.parse_known_intermixed_args(rest)  # mistakes end here
    exit_code = _run(_target(name, rest), rest, debug)
    from launch.next_steps import suggest  # noqa: PLC0415 - `--help` needs none of it

    suggest(name, options, rest, exit_code)
    return exit_code


def find_parser(name: str, rest: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of a verb, with the options of every verb.

    Args:
        name: the verb.
        rest: its arguments, among which --cluster may make it another one.
    """
    module, _, function = _target(name, rest).partition(":")
    if module.startswith("asr_train."):
        from asr_train.arguments import PARSERS  # noqa: PLC0415 - `--help` needs none of it

        parser = PARSERS[module]()
    else:
        own = "_parser" if function == "main" else f"_{function}_parser"
        parser = getattr(importlib.import_module(module), own)()
    everywhere = parser.add_argument_group("with any verb")
    for flags, meaning in OPTIONS.items():  # `run_main` has taken them out by now
        if not set(flags) & set(parser._option_string_actions):
            everywhere.add_argument(*flags, action="store_true", help=meaning)
    if VERBS[name].on_cluster and not _is_on_cluster(rest):
        parser.epilog = f"As a job: `wavefleet {name} --cluster P --help`"
    return parser


def _run(target: str, rest: Sequence[str], debug: Sequence[str]) -> int:
    """Run a verb's program, in a child process if it may need torch."""
    module, _, function = target.partition(":")
    if module.startswith("asr_train."):
        from launch.child import run_child  # noqa: PLC0415 - `--help` needs none of it

        return run_child([sys.executable, "-m", module, *rest, *debug]).exit_code
    program: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return program([*rest, *debug])


def _target(name: str, rest: Sequence[str]) -> str:
    """Module and function of a verb."""
    verb = VERBS[name]
    return verb.on_cluster if verb.on_cluster and _is_on_cluster(rest) else verb.target


def _is_on_cluster(rest: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == "--cluster" for word in rest)


def _versions() -> str:
    """This program, Python, and the libraries that a training depends on, none of them loaded."""
    from asr_train.run_dir import library_versions  # noqa: PLC0415 - `--help` needs none of it

    found = {"wavefleet": __version__, "python": platform.python_version()}
    found |= {name: text for name, text in library_versions().items() if name not in found}
    return "\n".join(f"{name:<13}{text}" for name, text in found.items())


if __name__ == "__main__":
    sys.exit(main())
