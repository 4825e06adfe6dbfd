"""Writes the pages that follow from the code: every field of a recipe, every verb with its options, exit codes.

python docs/generate.py            write docs/reference/
python docs/generate.py --check    only say whether the pages there are these
"""

import argparse
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

import yaml
from annotated_types import Ge, Gt, Interval
from pydantic import StringConstraints

from asr_train.config import DemoSource, FolderSource, HubSource, Recipe, TableSource
from asr_train.errors import EXIT_DONE, EXIT_FAILED, EXIT_MEANINGS
from launch.cli import VERBS

FOLDER = Path(__file__).resolve().parent / "reference"
_NOTE = "<!-- Written by `python docs/generate.py`; a test compares. Change the code, not this page. -->"
_SOURCES = (HubSource, TableSource, FolderSource, DemoSource)
_WORDS = {bool: "true, false", int: "whole number", float: "number", str: "text", dict: "mapping"}


def main(argv: Sequence[str]) -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 4 when a page is not what it should be")
    check = parser.parse_args(argv).check
    code = EXIT_DONE
    for name, text in pages().items():
        path = FOLDER / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            print(f"{path}: not what the code says; run python docs/generate.py")
            code = EXIT_FAILED
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return code


def pages() -> dict[str, str]:
    """File name -> text."""
    return {"recipe.md": "\n".join(_recipe()) + "\n", "verbs.md": "\n".join(_verbs()) + "\n"}


# --- fields of a recipe -----------------------------------------------------------------------------------------


def _recipe() -> Iterator[str]:
    yield "# Every field of a recipe"
    yield f"\n{_NOTE}"
    yield (
        "\nWhat a recipe is and how it is changed: [recipes](../recipes.md). `wavefleet show RECIPE` prints these "
        "fields with the values that a recipe gives them. *Defines the run*: a change makes another run, in a "
        "directory of its own; what *may change* is taken when a run goes on."
    )
    yield "\n## The recipe itself"
    groups = [entry for entry in fields(Recipe) if is_dataclass(_type(Recipe, entry))]
    yield from _table(Recipe, "", skip=groups)
    for entry in groups:
        group = _type(Recipe, entry)
        yield f"\n## `{entry.name}`"
        yield f"\n{_sentence(group.__doc__)}"
        yield from _table(group, f"{entry.name}.")
    yield "\n## Sources"
    yield (
        "\n`data.train` and every set of `eval.sets` is a source, or a list of several. Worked examples: "
        "[your own data](../data.md)."
    )
    for source in _SOURCES:
        kinds = get_args(get_type_hints(source)["kind"])
        yield f"\n### {', '.join(f'`kind: {kind}`' for kind in kinds)}"
        yield f"\n{_sentence(source.__doc__)}"
        yield from _table(source, "", skip=[entry for entry in fields(source) if entry.name == "kind"])


def _table(group: Any, prefix: str, skip: Sequence[Field[Any]] = ()) -> Iterator[str]:
    yield "\n| field | value | default | meaning | |\n|---|---|---|---|---|"
    for entry in fields(group):
        if entry not in skip:
            change = "defines the run" if entry.metadata["defines_run"] else "may change"
            cells = [f"`{prefix}{entry.name}`", _values(_type(group, entry)), _default(entry)]
            yield _row([*cells, entry.metadata["meaning"], change])


def _type(group: Any, entry: Field[Any]) -> Any:
    return get_type_hints(group, include_extras=True)[entry.name]


def _values(kind: Any) -> str:
    """What may stand in a field, in words."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, *limits = inside
        found = [text for limit in limits if (text := _limit(limit))]
        if any(source in _leaves(base) for source in _SOURCES):
            return "[source](#sources)" if is_dataclass(base) else "[sources](#sources)"
        return " ".join([_values(base), *found])
    if origin in (Union, types.UnionType):
        return ", ".join("null" if part is type(None) else _values(part) for part in inside)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin is tuple:
        return f"list of {_values(inside[0])}" if inside[-1] is ... else ", ".join(map(_values, inside))
    if origin is dict:
        return f"name: {_values(inside[1])}" if inside[1] is not Any else "name: value"
    return _WORDS[kind]


def _leaves(kind: Any) -> Iterator[Any]:
    yield kind
    for part in get_args(kind):
        yield from _leaves(part)


def _limit(limit: Any) -> str:
    match limit:
        case Gt():
            return f"over {limit.gt}"
        case Ge():
            return f"from {limit.ge}"
        case Interval():
            low = f"over {limit.gt}" if limit.gt is not None else f"from {limit.ge}"
            return f"{low} {f'to under {limit.lt}' if limit.lt is not None else f'to {limit.le}'}"
        case StringConstraints() if limit.pattern and "epochs" in str(limit.pattern):
            return "such as `500` or `1 epoch`"
        case StringConstraints():
            return "of letters, digits, `.`, `_`, `-`"
    return ""


def _default(entry: Field[Any]) -> str:
    if entry.default is MISSING and entry.default_factory is MISSING:
        return "none: needed"
    value = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("...").strip()
    return f"`{text}`"


# --- verbs and exit codes ---------------------------------------------------------------------------------------


def _verbs() -> Iterator[str]:
    yield "# Every verb, and what it ends with"
    yield f"\n{_NOTE}"
    yield "\n`wavefleet VERB --help` says the same. `--debug`, with any verb, shows tracebacks.\n"
    yield "## Exit codes"
    yield "\n| code | means |\n|---|---|"
    for code, meaning in EXIT_MEANINGS.items():
        yield _row([str(code), meaning])
    yield _row(["128 + N", "ended by signal N before there was anything to save; 130 is Ctrl-C"])
    yield (
        "\nWhich verdict on a training ends with which code: [verdicts](../verdicts.md). Verbs that look at something "
        "end with 4 or 5 when what they found is bad: `doctor` when no run could work, `checkpoints` when none is "
        "whole."
    )
    for name, verb in VERBS.items():
        yield f"\n## {name}"
        yield f"\n{_sentence(verb.meaning)}"
        yield from _options(_parser_of(verb.target))
        if verb.on_cluster:
            yield "\nAs a job, with `--cluster P`:" if name != "prepare" else "\nAs a job array, with `--cluster P`:"
            yield from _options(_parser_of(verb.on_cluster))


class _Found(Exception):  # noqa: N818 - no error
    pass


def _parser_of(target: str) -> argparse.ArgumentParser:
    """The parser that a verb asks for help."""
    module, _, function = target.partition(":")
    program: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    found: list[argparse.ArgumentParser] = []

    def take(parser: argparse.ArgumentParser, file: object = None) -> None:
        found.append(parser)
        raise _Found

    with mock.patch.object(argparse.ArgumentParser, "print_help", take), suppress(_Found):
        program(["--help"])
    return found[0]


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield "\n| argument | meaning |\n|---|---|"
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and not {"--help", "--debug"} & set(action.option_strings):
            meaning = formatter._expand_help(action) if action.help else ""
            yield _row([", ".join(_names(action)), meaning])


def _names(action: argparse.Action) -> Iterator[str]:
    metavar = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
    value = metavar if isinstance(metavar, str) else " ".join(metavar)
    if action.choices is not None and action.metavar is None:
        value = "|".join(map(str, action.choices))
    if not action.option_strings:
        yield f"`{value}{' ...' if action.nargs in ('*', '+') else ''}`"
    for option in action.option_strings:
        yield f"`{option}`" if action.nargs == 0 else f"`{option} {value}`"


# --- Markdown ---------------------------------------------------------------------------------------------------


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text of a cell: `<name>` outside code is no HTML, and a | ends no column."""
    pieces = text.replace("\n", " ").replace("|", r"\|").split("`")
    return "`".join(piece if number % 2 else piece.replace("<", "&lt;") for number, piece in enumerate(pieces))


def _sentence(text: str | None) -> str:
    """Its first line, as a sentence."""
    line = (text or "").strip().partition("\n")[0].rstrip(".")
    return f"{line[:1].upper()}{line[1:]}."


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent.parent))
    sys.exit(main(sys.argv[1:]))
