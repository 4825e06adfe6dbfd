"""Our exceptions, each with the exit code that its program ends with.

A subclass of `WavefleetError` carries a message written for the user: what is wrong, where, and what to do.
`run_main` turns it into that message on stderr and the exit code; `--debug` shows the traceback instead. So it does
with what the operating system refuses, an `OSError`.
"""

import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from asr_train.disk import is_full, no_room
from asr_train.verbosity import is_quiet, taken

EXIT_DONE = 0
EXIT_DEFECT = 1  # Python's, with a traceback
EXIT_USAGE = 2  # the command line or the recipe
EXIT_STOPPED = 3  # stopped on request, with a committed checkpoint
EXIT_FAILED = 4
EXIT_NO_CHECKPOINT = 5  # checkpoints exist, none can be used
EXIT_INTERRUPTED = 130  # as shells say it
EXIT_OUT_OF_MEMORY = 6  # a unit, or the update, does not fit into memory


class WavefleetError(Exception):
    """Something a user, a disk or a cluster did; its text is the whole message."""

    exit_code = EXIT_FAILED


class RecipeError(WavefleetError, ValueError):
    """The recipe or the command line is wrong; lists every error at once."""

    exit_code = EXIT_USAGE


class LibraryError(RecipeError):
    """The recipe, or the command line, asks for a library that is not installed."""


class CorpusError(WavefleetError, ValueError):
    """The data cannot be prepared or read."""


class ModelError(WavefleetError, ValueError):
    """The model cannot be loaded, built, or used for this."""


class CheckpointError(WavefleetError):
    """Checkpoints exist and none can be used."""

    exit_code = EXIT_NO_CHECKPOINT


class RunError(WavefleetError):
    """The run directory does not allow this: a live run, another recipe, a foreign folder."""

    exit_code = EXIT_USAGE


class TrainingError(WavefleetError):
    """Training cannot go on: too many skipped steps, a failed rank."""


class UnitMemoryError(TrainingError):
    """A unit, or the update, does not fit into memory; as often as it is tried."""

    exit_code = EXIT_OUT_OF_MEMORY


def say(text: str) -> None:
    """Tell the user something on stderr, unless only errors are wanted (`-q`)."""
    if not is_quiet():
        warn(text)


def warn(text: str) -> None:
    """Tell the user what went wrong, on stderr; a training goes on when nobody reads any more, `tee` gone say."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  open to the end


EXIT_MEANINGS = {  # of every verb, for its reference
    EXIT_DONE: "done",
    EXIT_DEFECT: "a defect of this program; it ends with a traceback, which belongs into a report",
    EXIT_USAGE: "the command line or the recipe is wrong, a library that the recipe asks for is not installed, or the"
    " run does not allow this: it is live, or of another recipe",
    EXIT_STOPPED: "stopped on request, with a committed checkpoint",
    EXIT_FAILED: "failed: data, model, disk, hub or Slurm; the message says which",
    EXIT_NO_CHECKPOINT: "there are checkpoints, and none can be used",
    EXIT_OUT_OF_MEMORY: "out of memory: a unit, or the update, does not fit",
    EXIT_INTERRUPTED: "Ctrl-C, where there was nothing to save",
}


def run_main(program: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's main function; a `WavefleetError` or an `OSError` becomes its message and its exit code.

    Args:
        program: takes the arguments without the program's name, returns the exit code.
        argv: the arguments; `sys.argv[1:]` when None. Those of every verb (`verbosity.OPTIONS`) may stand anywhere.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal has no character for is no reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    with taken(sys.argv[1:] if argv is None else argv) as arguments:
        return _run(program, arguments)


def _run(program: Callable[[Sequence[str]], int], arguments: list[str]) -> int:
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        return program(arguments)
    except WavefleetError as error:
        if debug:
            raise
        warn(f"error: {error}")
        return error.exit_code
    except OSError as error:  # a full disk, a file in the way, a folder without permission: not ours to mend
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # `head`, say, has seen enough
            sys.stderr.close()
            return EXIT_DONE
        if debug:
            raise
        warn(f"error: {no_room(error) if is_full(error) else error}; --debug shows what was being done")
        return EXIT_FAILED
    except ModuleNotFoundError as error:  # of ours it would be a defect, which is to be seen
        if debug or (error.name or "").partition(".")[0] in ("asr_train", "launch", "wavefleet"):
            raise
        warn(f"error: the library {error.name} is not installed; install Wavefleet again, with what it needs")
        return EXIT_FAILED
    except KeyboardInterrupt:
        warn("interrupted")
        return 130


def _nobody_reads() -> bool:
    """Whether the reader of what this process prints is gone; other pipes that break, to a worker say, are failures."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # it is no file, or is closed
            poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
