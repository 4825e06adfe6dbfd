"""`wavefleet completion SHELL`: what has a shell complete verbs, options, recipes, their fields, runs and profiles.

The shell asks `wavefleet` itself how a line may go on; argcomplete is between the two. Only the verb that stands in
the line is loaded, and torch never is.
"""

import argparse
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

import argcomplete
from argcomplete.completers import FilesCompleter
from argcomplete.shell_integration import shellcode

from asr_train import resources
from asr_train.config import Recipe
from asr_train.errors import EXIT_DONE, say

_SHELLS: Final = ("bash", "zsh", "fish")
_WHERE: Final = {
    "bash": """eval "$(wavefleet completion bash)"   in ~/.bashrc""",
    "zsh": """eval "$(wavefleet completion zsh)"   in ~/.zshrc, after compinit""",
    "fish": """wavefleet completion fish | source   in ~/.config/fish/config.fish""",
}


def main(argv: Sequence[str]) -> int:
    """Print what a shell is to evaluate."""
    options = _parser().parse_intermixed_args(argv)
    print(shellcode(["wavefleet"], shell=options.shell))
    say(f"put this line into your shell's start-up file:  {_WHERE[options.shell]}")
    return EXIT_DONE


def complete(verbs: Iterable[str], find_parser: Callable[[str, Sequence[str]], argparse.ArgumentParser]) -> None:
    """Answer a shell that asks how the line in its environment may go on; ends the process.

    Args:
        verbs: that there are.
        find_parser: verb and words after it -> its command line.
    """
    words = _words(os.environ.get("COMP_LINE", ""), int(os.environ.get("COMP_POINT", "0") or 0))
    if len(words) > 2 and words[1] in verbs:
        os.environ["_ARGCOMPLETE"] = "2"  # the verb is the program, in argcomplete's eyes
        parser = find_parser(words[1], words[2:])
        for action in parser._actions:
            if (completer := _COMPLETERS.get(action.dest)) is not None:
                action.completer = completer  # type: ignore[attr-defined]
    else:
        parser = argparse.ArgumentParser(prog="wavefleet")
        parser.add_argument("--version", action="store_true")
        parser.add_argument("verb", choices=list(verbs))
    argcomplete.autocomplete(parser, always_complete_options="long", default_completer=FilesCompleter())


def _words(line: str, point: int) -> list[str]:
    """Words of a line up to the cursor, the last one begun and perhaps empty."""
    before = line[: point or None]
    try:
        words = shlex.split(before)
    except ValueError:  # a quote is open
        words = before.split()
    return [*words, ""] if before[-1:].isspace() else words


def _recipes(prefix: str, **_: Any) -> Iterable[str]:
    return [*resources.shipped("recipes"), *FilesCompleter(("yaml", "yml"))(prefix)]


def _runs(prefix: str, **_: Any) -> Iterable[str]:
    """Runs in runs/, by path, which every verb takes; and what else there is."""
    paths = [str(path.parent) for path in sorted(Path("runs").glob("*/run.json"))]
    return [*paths, *FilesCompleter()(prefix)]


def _profiles(prefix: str, **_: Any) -> Iterable[str]:
    return [*resources.shipped("slurm/clusters"), *FilesCompleter(("yaml", "yml"))(prefix)]


def _configs(prefix: str, **_: Any) -> Iterable[str]:
    return [*resources.shipped("accelerate_configs"), *FilesCompleter(("yaml", "yml"))(prefix)]


def _fields(prefix: str, **_: Any) -> Iterable[str]:
    """`optim.lr=` of every field; after `precision=` what it may be."""
    key, equals, _value = prefix.partition("=")
    if not equals:
        return [f"{name}=" for name, _kind in _walk(Recipe)]
    kind = dict(_walk(Recipe)).get(key)
    words = ["true", "false"] if kind is bool else _choices(kind)
    return [f"{key}={text}" for text in words]


def _walk(group: type, before: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted names of the fields of a recipe, with their types."""
    for name, kind in get_type_hints(group).items():
        if name.startswith("_"):
            continue
        if hasattr(kind, "__dataclass_fields__"):
            yield from _walk(kind, f"{before}{name}.")
        else:
            yield f"{before}{name}", kind


def _choices(kind: Any) -> Iterable[str]:
    """What a Literal allows, alone or beside None."""
    for part in get_args(kind):
        yield from [part] if isinstance(part, str) else _choices(part)


_COMPLETERS: Final[dict[str, Callable[..., Iterable[str]]]] = {
    "recipe": _recipes,
    "overrides": _fields,
    "run": _runs,
    "target": _runs,
    "model": _runs,
    "cluster": _profiles,
    "accelerate": _configs,
}
"""Name of an argument, the same in every verb -> what it may be."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet completion", description=__doc__, allow_abbrev=False)
    parser.add_argument("shell", choices=_SHELLS)
    return parser
