"""How much is said, by this process and by those that it starts: one meaning of -q and -v for every verb.

|                                                       | -q  |     | -v  |
|-------------------------------------------------------|-----|-----|-----|
| results (stdout), errors (stderr)                     | yes | yes | yes |
| notes, progress, reports, what to do next (stderr)    |     | yes | yes |
| commands that are started, what libraries tell        |     |     | yes |

Kept in the environment, so that children agree. `--no-color` sets NO_COLOR, which rich and others know
(https://no-color.org).
"""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, Literal

Level = Literal["quiet", "normal", "verbose"]

OPTIONS: Final = {
    ("-q", "--quiet"): "results and errors only: no notes, no progress, no report",
    ("-v", "--verbose"): "also the commands that are started, and what libraries tell",
    ("--no-color",): "no colour; nor is there any with NO_COLOR set, or where no terminal is",
    ("--debug",): "show tracebacks",
}
"""Options of every verb, and what they mean; `run_main` takes them out of the arguments."""

VARIABLE: Final = "WAVEFLEET_VERBOSITY"
"""Environment variable that holds it."""

_LEVELS: Final[dict[str, Level]] = {"-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose"}
# what the Hugging Face libraries read when they are loaded, and what sets the same once they are
_LOG_VARIABLES: Final = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")
_LOG_MODULES: Final = ("transformers.utils.logging", "datasets.utils.logging", "huggingface_hub.utils.logging")
_BAR_VARIABLES: Final = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
_BAR_MODULES: Final = ("datasets.utils", "huggingface_hub.utils")


def level() -> Level:
    """How much is said now."""
    found = os.environ.get(VARIABLE)
    return "quiet" if found == "quiet" else "verbose" if found == "verbose" else "normal"


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return level() == "quiet"


def is_verbose() -> bool:
    """Whether everything is wanted."""
    return level() == "verbose"


@contextmanager
def taken(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Do as -q, -v and --no-color among the arguments ask, here and in children; gives the other arguments."""
    wanted = [_LEVELS[word] for word in arguments if word in _LEVELS]
    rest = [word for word in arguments if word not in _LEVELS and word != "--no-color"]
    with at(wanted[-1] if wanted else level(), no_color="--no-color" in arguments):
        yield rest


@contextmanager
def at(wanted: Level, *, no_color: bool = False) -> Iterator[None]:
    """Say so much for a while, in this process, its children, and in the Hugging Face libraries.

    Their bars are shown on a terminal only: in a file each update of a bar is a line.
    """
    variables: dict[str, str] = {VARIABLE: wanted}
    if no_color:
        variables["NO_COLOR"] = "1"
    if wanted != "normal":
        variables.update((name, "error" if wanted == "quiet" else "info") for name in _LOG_VARIABLES)
    is_without_bars = wanted == "quiet" or not sys.stderr.isatty()
    if is_without_bars:
        variables.update((name, "1") for name in _BAR_VARIABLES)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    with ExitStack() as stack:
        stack.callback(_restore, before)
        stack.enter_context(warnings.catch_warnings())
        if wanted == "quiet":
            warnings.simplefilter("ignore")
        if wanted != "normal":
            _set_logs(wanted, stack)
        if is_without_bars:
            _hide_bars(stack)
        yield


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _set_logs(wanted: Level, stack: ExitStack) -> None:
    """Set the log level of the libraries that are loaded."""
    for module in (sys.modules[name] for name in _LOG_MODULES if name in sys.modules):
        stack.callback(module.set_verbosity, module.get_verbosity())
        module.set_verbosity_error() if wanted == "quiet" else module.set_verbosity_info()


def _hide_bars(stack: ExitStack) -> None:
    """Switch off the bars of the libraries that are loaded."""
    transformers = sys.modules.get("transformers.utils.logging")
    if transformers is not None and transformers.is_progress_bar_enabled():
        stack.callback(transformers.enable_progress_bar)
        transformers.disable_progress_bar()
    for module in (sys.modules[name] for name in _BAR_MODULES if name in sys.modules):
        if not module.are_progress_bars_disabled():
            stack.callback(module.enable_progress_bars)
            module.disable_progress_bars()
