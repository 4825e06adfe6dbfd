"""The command `wavefleet`: verb -> module:function, nothing else; imports nothing heavy."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from asr_train import __version__
from asr_train.errors import EXIT_DONE, RecipeError, run_main


class Verb(NamedTuple):
    """Where a verb lives, and what it does in one line. Verbs of `asr_train` need torch and run in a child process.

    With --cluster, `on_cluster` runs in its place.
    """

    target: str
    meaning: str
    on_cluster: str | None = None


VERBS = {
    "show": Verb("launch.show:main", "print a recipe, every field with its meaning"),
    "prepare": Verb(
        "asr_train.prepare:main", "make the corpus of a recipe: decoded, checked, indexed", "launch.prepare_array:main"
    ),
    "train": Verb("launch.local:main", "train on this machine; the same command again goes on where it stopped"),
    "submit": Verb("launch.submit:main", "train on a Slurm cluster; the same command again says which job does"),
    "plan": Verb("launch.plan:main", "what a job would be, cost, and when it would start; touches nothing"),
    "doctor": Verb("launch.doctor:main", "what a Slurm cluster can do, and what that means for runs there"),
    "retry": Verb("launch.submit:retry", "another job for a run that failed, as it was submitted"),
    "sweep": Verb("launch.sweep:main", "a run for every combination of values, listed with their best WER"),
    "ls": Verb("launch.status:list_runs", "every run, and how it is"),
    "status": Verb("launch.status:status", "how a run is: job, step, loss, WER, time left"),
    "why": Verb("launch.status:why", "why the last attempt of a run ended, with the evidence"),
    "report": Verb("launch.report.verb:main", "what a run did, as one page that opens offline; several are compared"),
    "logs": Verb("launch.logs:main", "what the ranks of a run wrote, and which failed first"),
    "stop": Verb("launch.requests:stop", "have a training save and stop"),
    "save": Verb("launch.requests:save", "have a training save and go on"),
    "cancel": Verb("launch.status:cancel", "end a run's job without saving"),
    "reconcile": Verb("launch.reconcile:main", "look after runs whose jobs are gone; says what, --act does it"),
    "nodes": Verb("launch.nodes:main", "which nodes of a cluster jobs are kept off, why, until when; add, remove"),
    "checkpoints": Verb("launch.checkpoints:main", "a run's checkpoints: which are whole, which one it goes on from"),
    "evaluate": Verb(
        "asr_train.evaluate:main", "WER and CER of a run or a model on a data set", "launch.remote:evaluate"
    ),
    "export": Verb("asr_train.export:main", "make a model folder that transformers loads"),
    "transcribe": Verb(
        "asr_train.transcribe:main", "audio files in; text, word times or subtitles out", "launch.remote:transcribe"
    ),
}

HELP = (
    "usage: wavefleet VERB ...\n\n"
    "Trains Wav2Vec2-style CTC speech recognisers.\n\n"
    + "".join(f"  {name:<13}{verb.meaning}\n" for name, verb in VERBS.items())
    + "\n`wavefleet VERB --help` says more. --debug, with any verb, shows tracebacks. --version prints the version.\n"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = ["--debug"] if "--debug" in arguments else []
    return run_main(lambda rest: _dispatch(rest, debug), arguments)


def _dispatch(arguments: Sequence[str], debug: Sequence[str]) -> int:
    """Run the verb that the first argument names; `debug` goes on to it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return EXIT_DONE if arguments else RecipeError.exit_code
    if arguments[0] == "--version":
        print(f"wavefleet {__version__}")
        return EXIT_DONE
    name, *rest = arguments
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}"
        raise RecipeError(f"no verb {name!r}; {hint}")
    verb = VERBS[name]
    is_on_cluster = any(word.partition("=")[0] == "--cluster" for word in rest)
    module, _, function = ((is_on_cluster and verb.on_cluster) or verb.target).partition(":")
    if module.startswith("asr_train."):
        from launch.child import run_child  # noqa: PLC0415 - `--help` needs none of it

        exit_code = run_child([sys.executable, "-m", module, *rest, *debug]).exit_code
        if verb.on_cluster and {"-h", "--help"} & set(rest):
            print(f"\nAs a job: `wavefleet {name} --cluster P --help`")
        return exit_code
    program: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return program([*rest, *debug])


if __name__ == "__main__":
    sys.exit(main())
