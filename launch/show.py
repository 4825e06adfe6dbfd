"""`wavefleet show RECIPE`: the resolved recipe, each field with its meaning."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asr_train import resources
from asr_train.errors import EXIT_DONE
from asr_train.recipe import dump_recipe, load_recipe, recipe_hash, run_directory, walk


class Field(NamedTuple):
    """One field of a resolved recipe."""

    key: str
    value: Any
    meaning: str
    set: bool  # by the file or the command line, whatever its default
    defines_run: bool


def main(argv: Sequence[str]) -> int:
    """Print a recipe."""
    options = _parser().parse_intermixed_args(argv)
    recipe = load_recipe(options.recipe, options.overrides)
    given = _given_keys(resources.find("recipes", options.recipe), options.overrides)
    fields = [
        Field(key, value, meta["meaning"], _is_given(key, given), meta["defines_run"])
        for key, value, meta in walk(recipe)
    ]
    run = run_directory(recipe)
    if options.yaml:
        print(dump_recipe(recipe), end="")
    elif options.json:
        content = {"run_dir": str(run), "hash": recipe_hash(recipe), "fields": [field._asdict() for field in fields]}
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _print(fields, run)
    return EXIT_DONE


def _print(fields: Sequence[Field], run: Path) -> None:
    """A table on a terminal; elsewhere a line a field, so that grep finds it."""
    console = Console()
    if console.is_terminal:
        table = Table("field", "value", "meaning", box=None, pad_edge=False, header_style="dim")
        for field in fields:
            note = "" if field.defines_run else " (may change)"
            style = "bold" if field.set else "dim"
            table.add_row(Text(_name(field), style), Text(_short(field.value), style), Text(field.meaning + note))
        console.print(table)
    else:
        for field in fields:
            note = "" if field.defines_run else " (may change)"
            print(f"{_name(field)}: {_short(field.value)}  # {field.meaning}{note}")
    print("\n* set by the recipe or the command line; the others are defaults")
    print("(may change): may change between attempts of one run; every other field defines the run")
    print(f"run directory: {run}")


def _name(field: Field) -> str:
    return f"{'*' if field.set else ' '} {field.key}"


def _short(value: Any) -> str:
    """A value as it would stand in the recipe, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("...").rstrip("\n")


def _given_keys(path: Path, overrides: Sequence[str]) -> set[str]:
    """Dotted keys that a recipe file and `key=value` overrides set."""
    return _dotted(yaml.safe_load(path.read_text(encoding="utf-8"))) | {text.partition("=")[0] for text in overrides}


def _dotted(values: Mapping[str, Any], prefix: str = "") -> set[str]:
    keys = set()
    for name, value in values.items():
        keys.add(f"{prefix}{name}")
        if isinstance(value, Mapping):
            keys |= _dotted(value, f"{prefix}{name}.")
    return keys


def _is_given(key: str, given: set[str]) -> bool:
    """Whether the field itself was named, or something inside it (`eval.sets.dev.split`)."""
    return key in given or any(name.startswith(f"{key}.") for name in given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet show", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields to change, optim.lr=1e-5 say")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--yaml", action="store_true", help="as a recipe file")
    form.add_argument("--json", action="store_true", help="as JSON, with the meanings")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
